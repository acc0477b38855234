"""Batches by NVIDIA's DALI, on a GPU or the CPU: its pipeline reads images, decodes them once and makes the views."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import RandomCrop

from rcl_fast.train.data.samples import BadImage, Samples, describe, open_image
from rcl_fast.train.loaders.base import Batch, LoaderSpec, fingerprint
from rcl_fast.train.views.params import plan_view, sample_params
from rcl_fast.train.views.transforms import RequireSize

try:
    import nvidia.dali
    from nvidia.dali import Pipeline, fn, pipeline_def, types
    from nvidia.dali.data_node import DataNode
except ImportError as error:
    raise ImportError("NVIDIA DALI is not installed (pip install '.[dali]' in rcl_fast's folder, on Linux)") from error

from rcl_fast.train.views import dali_graph

Indices = NDArray[np.int64]


class DaliLoader:
    """A Loader of float32 views in channels_last memory, made on `device`.

    The pipeline has no random state: the random parameters go in with the images. So a view depends on (seed, epoch,
    index, view) alone, and an epoch can begin at any step.
    """

    def __init__(self, spec: LoaderSpec, *, device: torch.device, threads: int) -> None:
        """Builds the pipeline, with `threads` CPU threads. Raises ValueError for views that only torchvision makes."""
        dali_graph.check(spec.kinds, spec.options)
        self.steps_per_epoch = len(spec.batches(0))
        self.fingerprint = fingerprint(spec, f"DALI 3, without Numba (nvidia-dali {nvidia.dali.__version__})")
        self._spec = spec
        self._labels = torch.from_numpy(spec.samples.labels)
        self._device = device
        self._threads = threads
        self._bad: dict[int, BadImage] = {}
        self._source = _Source(spec, self._bad)
        self._pipeline = self._build()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._run_out()
        batches = self._spec.batches(epoch)[start:]
        self._source.begin(epoch, batches)
        for step, indices in enumerate(batches):
            batch = self._batch(step)
            for index in indices.tolist():
                if index in self._bad:
                    self._spec.on_bad(self._bad[index])
            if batch is not None:
                yield batch

    def _build(self) -> Pipeline:
        return _views(
            self._source,
            self._spec,
            batch_size=-(-self._spec.batch_size // self._spec.world_size),
            num_threads=self._threads,
            device_id=_gpu(self._device),
        )

    def _run_out(self) -> None:
        """Runs the pipeline to the end of an epoch that was broken off."""
        self._source.begin(0, [])
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # a bad image in a batch that is not needed any more
            self._pipeline = self._build()

    def _batch(self, step: int) -> Batch | None:
        """Returns the good images of a step; None where there is none."""
        stream = None if _gpu(self._device) is None else torch.cuda.current_stream(self._device)
        while self._source.good(step).size:
            try:
                outputs = self._pipeline.run(stream)
            except RuntimeError as error:
                self._recover(step, error)
            else:
                return self._tensors(*(torch.from_dlpack(output.as_tensor()) for output in outputs))
        return None

    def _recover(self, step: int, error: RuntimeError) -> None:
        """Builds the pipeline anew, to go on from a step without the bad files, the first of which ended it."""
        met = np.concatenate(self._source.batches[step : self._source.given])
        bad = _bad_files(self._spec.samples, met, _gpu(self._device))
        if not bad:
            raise error
        self._bad |= bad
        self._source.given = step
        self._pipeline = self._build()

    def _tensors(self, index: Tensor, shapes: Tensor, *outputs: Tensor) -> Batch | None:
        views = tuple(output.permute(0, 3, 1, 2) for output in outputs)
        bad = _bad_sizes(self._spec, index, shapes)
        if not bad:
            return Batch(views, self._labels[index], index)
        self._bad |= bad
        rows = torch.tensor([row for row, i in enumerate(index.tolist()) if i not in bad], dtype=torch.int64)
        if not len(rows):
            return None
        return Batch(tuple(view[rows.to(view.device)] for view in views), self._labels[index][rows], index[rows])


class _Source:
    """What the pipeline asks for each next batch: images, indices, and the random parameters of the views."""

    def __init__(self, spec: LoaderSpec, bad: dict[int, BadImage]) -> None:
        self._spec = spec
        self._bad = bad
        self.begin(0, [])

    def begin(self, epoch: int, batches: list[Indices]) -> None:
        self._epoch = epoch
        self.batches = batches
        self.given = 0
        """How many of these batches the pipeline has been given; it asks ahead."""

    def good(self, step: int) -> Indices:
        return np.array([i for i in self.batches[step].tolist() if i not in self._bad], dtype=np.int64)

    def __call__(self) -> list[Any]:
        while self.given < len(self.batches):
            index = self.good(self.given)
            self.given += 1
            if index.size:
                params = [tensor.numpy() for view in self.params(index) for tensor in view.values()]
                return [_images(self._spec.samples, index), index, *params]
        raise StopIteration  # DALI's end of an epoch

    def params(self, index: Indices) -> list[dict[str, Tensor]]:
        """Returns the inputs of each view's graph, by name."""
        options, seed = self._spec.options, self._spec.seed
        return [
            dali_graph.given(
                plan_view(kind, options),
                sample_params(kind, options, seed=seed, epoch=self._epoch, index=torch.from_numpy(index), view=view),
                options.image_size,
            )
            for view, kind in enumerate(self._spec.kinds)
        ]


@pipeline_def(enable_conditionals=True)
def _views(source: _Source, spec: LoaderSpec) -> tuple[DataNode, ...]:
    """Defines the pipeline, which gives the indices, the shapes of the images, and their views."""
    names = [list(view) for view in source.params(np.zeros(1, np.int64))]
    images, index, *params = fn.external_source(source, num_outputs=2 + sum(map(len, names)), batch=True)
    gpu = Pipeline.current().device_id is not None
    if isinstance(spec.samples.images, np.ndarray):
        images = fn.reinterpret(images, layout="HWC")
        images = images.gpu() if gpu else images
    else:
        images = _decoded(images, gpu)
    views = []
    for view, kind in enumerate(spec.kinds):
        inputs = {name: params.pop(0) for name in names[view]}
        views.append(dali_graph.random_view(images, plan_view(kind, spec.options), spec.options, inputs))
    if not spec.kinds:
        views.append(dali_graph.evaluation_view(images, spec.options))
    return index, images.shape(), *[dali_graph.normalized(view, spec.options) for view in views]


@pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1)
def _decoding(paths: Iterator[list[NDArray[np.uint8]]]) -> DataNode:
    return _decoded(fn.external_source(paths, batch=True), Pipeline.current().device_id is not None)


def _decoded(paths: DataNode, gpu: bool) -> DataNode:
    """Decodes the files as Pillow does, which ignores EXIF's rotation."""
    return fn.decoders.image(
        fn.io.file.read(paths),
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )


def _images(samples: Samples, index: Indices) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
    """Returns the pixels of the images, or the bytes of their paths."""
    images = samples.images
    if isinstance(images, np.ndarray):
        return images[index]
    return [np.frombuffer(images[i].encode(), np.uint8) for i in index]


def _bad_files(samples: Samples, indices: Indices, gpu: int | None) -> dict[int, BadImage]:
    """Returns the errors of the files that DALI can't read, by index; Pillow's error where it can't read one either."""
    bad: dict[int, BadImage] = {}
    if isinstance(samples.images, np.ndarray):
        return bad
    while indices.size:
        pipeline = _decoding(iter([_images(samples, indices[[i]]) for i in range(len(indices))]), device_id=gpu)
        try:
            for index in indices.tolist():  # noqa: B007
                pipeline.run()
        except RuntimeError:
            bad[index] = _bad_file(samples, index)
            indices = indices[indices.tolist().index(index) + 1 :]
        else:
            break
    return bad


def _bad_file(samples: Samples, index: int) -> BadImage:
    try:
        open_image(samples, index)
    except BadImage as error:
        return error
    return BadImage(f"cannot read {describe(samples, index)}: DALI does not decode it; --loader torchvision does")


def _bad_sizes(spec: LoaderSpec, index: Tensor, shapes: Tensor) -> dict[int, BadImage]:
    """Returns the errors of the images that views can't be made of, by index, in the torchvision loader's words."""
    options = spec.options
    size, crops = options.image_size, {plan_view(kind, options).crop for kind in spec.kinds}
    if "none" in crops or (not crops and options.evaluation == "as_is"):
        wrong, transform = (shapes[:, :2] != size).any(1), RequireSize(size)
    elif "padded" in crops:
        padding = options.crop_padding
        wrong, transform = (shapes[:, :2] + 2 * padding < size).any(1), RandomCrop(size, padding=padding)
    else:
        return {}
    bad = {}
    for row in wrong.nonzero().flatten().tolist():
        height, width, _ = shapes[row].tolist()
        try:
            transform(Image.new("RGB", (width, height)))
        except ValueError as error:
            image = int(index[row])
            bad[image] = BadImage(f"cannot use {describe(spec.samples, image)}: {error}")
    return bad


def _gpu(device: torch.device) -> int | None:
    """Returns DALI's number of the GPU; None for the CPU."""
    return (device.index or 0) if device.type == "cuda" else None
