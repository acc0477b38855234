"""Batches of images that lie on the device and are augmented there, a whole batch at a time: for sets like CIFAR."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rcl_fast.train.loaders.base import Batch, Reading, identity
from rcl_fast.train.options import ViewKind, ViewOptions
from rcl_fast.train.views.augment import augment, normalized, resize_center_crop
from rcl_fast.train.views.params import Draws, draw, plan
from rcl_fast.train.views.transforms import RequireSize


class DeviceLoader:
    """A Loader of float32 views in channels_last memory, made on `device`, without workers.

    All images are uploaded once, as bytes; a step then moves nothing to a GPU and waits for nothing there.
    """

    def __init__(self, reading: Reading, device: torch.device) -> None:
        """Raises ValueError where the images are not in memory, or the views can't be made of them here."""
        images = reading.samples.images
        if not isinstance(images, np.ndarray):
            raise ValueError(
                "it keeps all images in the device's memory, and these are files: take --loader dali or torchvision"
            )
        _check(reading.kinds, reading.options, images)
        self.steps_per_epoch = len(reading.batches(0))
        self.identity = identity(reading, "device 1")
        self._reading = reading
        self._labels = torch.from_numpy(reading.samples.labels)
        self._labels_there = self._labels.to(device)
        self._images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous()
        self._mean, self._std = (
            torch.tensor(values, device=device) for values in (reading.options.mean, reading.options.std)
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in self.order(epoch, start):
            index = batch["index_there"]
            yield {**self.views(index, batch["epoch"]), "label": batch["label"], "index": batch["index"]}

    def order(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As `epoch`, without views: `label` and `index`, and on the device `index_there` [b] and `epoch` []."""
        batches = self._reading.batches(epoch)[start:]
        if not batches:
            return
        order, sizes = torch.from_numpy(np.concatenate(batches)), [len(batch) for batch in batches]
        there = order.to(self._images.device)  # once an epoch: a copy in each step would be waited for
        epoch_there = torch.full((), epoch, dtype=torch.int64, device=self._images.device)
        for index, index_there in zip(order.split(sizes), there.split(sizes), strict=True):
            yield {"label": self._labels[index], "index": index, "index_there": index_there, "epoch": epoch_there}

    def views(self, index: Tensor, epoch: Tensor) -> Batch:
        """x1, ... of the images `index` int64 [b] in `epoch` int64 [], both on the device, as the batch would be there.

        The host neither waits nor copies: this can be compiled, and captured in a CUDA graph.
        """
        images = self._images.index_select(0, index)
        return self._random_views(images, epoch, index) if self._reading.kinds else {"x1": self._whole(images)}

    def compile(self) -> None:
        """From here on views come from torch.compile: the same pixels, but for roundings of the device's compiler.

        Not where RandAugment is in them: what timm says of its operations can't be traced. A CPU is faster without, for
        it leaves out what was not drawn.
        """
        if not any("randaugment" in kind for kind in self._reading.kinds):
            self.views = torch.compile(self.views, dynamic=False)  # type: ignore[method-assign]

    def labels(self, index: Tensor) -> Tensor:
        """int64 [b], on the device, as `index`."""
        return self._labels_there.index_select(0, index)

    def _random_views(self, images: Tensor, epoch: Tensor, index: Tensor) -> Batch:
        """Views of the same kind are made together: the time goes into starting operations as much as into pixels."""
        options, kinds = self._reading.options, self._reading.kinds
        views = {}
        for kind in dict.fromkeys(kinds):
            numbers = [number for number, other in enumerate(kinds) if other == kind]
            drawn = [
                draw(kind, options, seed=self._reading.seed, epoch=epoch, index=index, view=number)
                for number in numbers
            ]
            made = augment(
                images.repeat(len(numbers), 1, 1, 1),
                plan(kind, options),
                Draws(*map(torch.cat, zip(*drawn, strict=True))),
                options.image_size,
            )
            for number, view in zip(numbers, self._normalized(made).chunk(len(numbers)), strict=True):
                views[f"x{number + 1}"] = view
        return views

    def _whole(self, images: Tensor) -> Tensor:
        options = self._reading.options
        if options.evaluation == "resize_center_crop":
            images = resize_center_crop(images, options.resize, options.image_size)
        return self._normalized(images)

    def _normalized(self, images: Tensor) -> Tensor:
        return normalized(images, self._mean, self._std)


def _check(kinds: tuple[ViewKind, ...], options: ViewOptions, images: np.ndarray) -> None:
    """Raises ValueError where the images have a size that a view can't be made of."""
    height, width = images.shape[1:3]
    plans = [plan(kind, options) for kind in kinds]
    as_they_are = any(planned.crop == "none" for planned in plans)
    if len(images) and (as_they_are or (not kinds and options.evaluation == "as_is")):
        RequireSize(options.image_size)(Image.fromarray(images[0]))
    for planned in plans:
        if planned.crop == "padded" and min(height, width) + 2 * planned.padding < options.image_size:
            raise ValueError(
                f"the images have {width}x{height} pixels, too few to crop {options.image_size}x{options.image_size} "
                f"with a border of {planned.padding}: set a smaller --image-size, or a larger --crop-padding"
            )
