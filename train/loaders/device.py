"""Batches of images that lie on the device and are augmented there, a whole batch at a time: for data like CIFAR."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rcl_fast.train.loaders.base import Batch, LoaderSpec, fingerprint
from rcl_fast.train.options import ViewKind, ViewOptions
from rcl_fast.train.views.augment import augment, normalized, resize_center_crop
from rcl_fast.train.views.params import ViewParams, plan_view, sample_params
from rcl_fast.train.views.transforms import size_as_is, size_of_digits


@dataclass(frozen=True, eq=False)
class IndexBatch(Batch):
    """A batch without its views, which are yet to be made: `views` is empty."""

    indices_on_device: Tensor
    """int64 [b]."""
    epoch: Tensor
    """int64 [], on the device."""


class DeviceLoader:
    """A Loader of float32 views in channels_last memory, made on `device`, without workers.

    All images are uploaded once, as bytes; a step then copies nothing to a GPU and does not wait for it.

    Args:
        compile: make the views by torch.compile: the same pixels, but for roundings of the device's compiler. On a CPU
            views are faster without it: operations that no image needs are then left out.

    Raises:
        ValueError: the images are not in memory, or the views can't be made of them here.
    """

    def __init__(self, spec: LoaderSpec, device: torch.device, *, compile: bool = False) -> None:
        images = spec.samples.images
        if not isinstance(images, np.ndarray):
            raise ValueError(
                "it keeps all images in the device's memory, and these are files: take --loader dali or torchvision"
            )
        _check(spec.kinds, spec.options, images)
        self.steps_per_epoch = len(spec.batches(0))
        self.fingerprint = fingerprint(spec, "device 1")
        self._spec = spec
        self._labels = torch.from_numpy(spec.samples.labels)
        self._labels_on_device = self._labels.to(device)
        self._images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous()
        self._mean, self._std = (
            torch.tensor(values, device=device) for values in (spec.options.mean, spec.options.std)
        )
        # timm's description of RandAugment's operations can't be traced.
        traceable = not any("randaugment" in kind for kind in spec.kinds)
        self._make_views = torch.compile(self._views, dynamic=False) if compile and traceable else self._views

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in self.index_batches(epoch, start):
            yield Batch(self.views(batch.indices_on_device, batch.epoch), batch.labels, batch.indices)

    def index_batches(self, epoch: int, start: int = 0) -> Iterator[IndexBatch]:
        """Gives the same batches as `epoch`, without views."""
        batches = self._spec.batches(epoch)[start:]
        if not batches:
            return
        all_indices, sizes = torch.from_numpy(np.concatenate(batches)), [len(batch) for batch in batches]
        on_device = all_indices.to(self._images.device)  # once an epoch: the host would wait for a copy in each step
        epoch_on_device = torch.full((), epoch, dtype=torch.int64, device=self._images.device)
        for indices, indices_on_device in zip(all_indices.split(sizes), on_device.split(sizes), strict=True):
            yield IndexBatch((), self._labels[indices], indices, indices_on_device, epoch_on_device)

    def views(self, indices: Tensor, epoch: Tensor) -> tuple[Tensor, ...]:
        """Returns the views x1, ... of the images `indices` int64 [b] in `epoch` int64 [], both on the device.

        The host neither waits nor copies, so this can be compiled, and captured in a CUDA graph.
        """
        return self._make_views(indices, epoch)

    def labels(self, indices: Tensor) -> Tensor:
        """Returns the labels int64 [b] on the device, where `indices` are."""
        return self._labels_on_device.index_select(0, indices)

    def _views(self, indices: Tensor, epoch: Tensor) -> tuple[Tensor, ...]:
        images = self._images.index_select(0, indices)
        return self._random_views(images, epoch, indices) if self._spec.kinds else (self._whole(images),)

    def _random_views(self, images: Tensor, epoch: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """Returns random views. One kind's are made together: starting operations takes as much time as the pixels."""
        options, kinds = self._spec.options, self._spec.kinds
        views: dict[int, Tensor] = {}
        for kind in dict.fromkeys(kinds):
            numbers = [number for number, other in enumerate(kinds) if other == kind]
            params = [
                sample_params(kind, options, seed=self._spec.seed, epoch=epoch, index=indices, view=number)
                for number in numbers
            ]
            made = augment(
                images.repeat(len(numbers), 1, 1, 1),
                plan_view(kind, options),
                ViewParams(*map(torch.cat, zip(*params, strict=True))),
                options.image_size,
            )
            views.update(zip(numbers, self._normalised(made).chunk(len(numbers)), strict=True))
        return tuple(views[number] for number in range(len(kinds)))

    def _whole(self, images: Tensor) -> Tensor:
        options = self._spec.options
        if options.evaluation == "resize_center_crop":
            images = resize_center_crop(images, options.resize, options.image_size)
        return self._normalised(images)

    def _normalised(self, images: Tensor) -> Tensor:
        return normalized(images, self._mean, self._std)


def _check(kinds: tuple[ViewKind, ...], options: ViewOptions, images: np.ndarray) -> None:
    """Raises ValueError where the images have a size that a view can't be made of."""
    height, width = images.shape[1:3]
    plans = [plan_view(kind, options) for kind in kinds]
    if len(images) and any(planned.crop == "none" for planned in plans):
        size_of_digits(options)(Image.fromarray(images[0]))
    if len(images) and not kinds and options.evaluation == "as_is":
        size_as_is(options)(Image.fromarray(images[0]))
    for planned in plans:
        if planned.crop == "padded" and min(height, width) + 2 * planned.padding < options.image_size:
            raise ValueError(
                f"the images have {width}x{height} pixels, too few to crop {options.image_size}x{options.image_size} "
                f"with a border of {planned.padding}: set a smaller --image-size, or a larger --crop-padding"
            )
