"""Batches by NVIDIA's DALI, on a GPU or the CPU: its pipeline reads images, decodes them once and makes the views."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rcl_fast.train.data.samples import BadImage, describe
from rcl_fast.train.loaders.base import Batch, LoaderSpec, fingerprint
from rcl_fast.train.loaders.dali_files import DaliFiles, Given
from rcl_fast.train.views.params import plan_view, sample_params
from rcl_fast.train.views.transforms import RequireCrop, RequireSize, size_as_is, size_of_digits

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
        in_memory = isinstance(spec.samples.images, np.ndarray)
        version = "DALI 3, without Numba" if in_memory else "DALI 4, unusual files by Pillow"
        self.steps_per_epoch = len(spec.batches(0))
        self.fingerprint = fingerprint(spec, f"{version} (nvidia-dali {nvidia.dali.__version__})")
        self._spec = spec
        self._labels = torch.from_numpy(spec.samples.labels)
        self._device = device
        self._threads = threads
        self._bad: dict[int, BadImage] = {}
        side = spec.options.image_size
        self._files = None if in_memory else DaliFiles(spec.samples, self._bad, side=side, threads=threads)
        self._source = _Source(spec, self._files)
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

    def _batch(self, step: int) -> Batch:
        """Returns the good images of a step."""
        stream = None if _gpu(self._device) is None else torch.cuda.current_stream(self._device)
        while True:
            try:
                outputs = self._pipeline.run(stream)
            except RuntimeError as error:
                self._recover(step, error)
            else:
                return self._good(*(torch.from_dlpack(output.as_tensor()) for output in outputs))

    def _recover(self, step: int, error: RuntimeError) -> None:
        """Builds the pipeline anew, to go on from a step; the files that ended it are Pillow's from now on."""
        if self._files is None:
            raise error
        met = [int(index) for batch in self._source.batches[step : self._source.given] for index in batch]
        failing = _failing(self._files, met, _gpu(self._device))
        if not failing:
            raise error
        self._files.leave_to_pillow(failing)
        self._source.go_on_from(step)
        self._pipeline = self._build()

    def _good(self, index: Tensor, shapes: Tensor, *outputs: Tensor) -> Batch:
        """Returns the batch of the pipeline's outputs without the bad images."""
        views = tuple(output.permute(0, 3, 1, 2) for output in outputs)
        self._bad |= _bad_sizes(self._spec, index, shapes)
        rows = torch.tensor([row for row, i in enumerate(index.tolist()) if i not in self._bad], dtype=torch.int64)
        if len(rows) == len(index):
            return Batch(views, self._labels[index], index)
        return Batch(tuple(view[rows.to(view.device)] for view in views), self._labels[index][rows], index[rows])


class _Source:
    """What the pipeline asks for each next step: images, indices, and the random parameters of the views."""

    def __init__(self, spec: LoaderSpec, files: DaliFiles | None) -> None:
        """Has `files`, unless the images are in memory."""
        self._spec = spec
        self._files = files
        self.begin(0, [])

    def begin(self, epoch: int, batches: list[Indices]) -> None:
        self._epoch = epoch
        self.batches = batches
        self.go_on_from(0)

    def go_on_from(self, step: int) -> None:
        self.given = step
        """How many of these batches the pipeline has been given; it asks ahead."""
        self._asked: dict[int, list[Given | Future[Given]]] = {}

    def __call__(self) -> list[Any]:
        if self.given == len(self.batches):
            raise StopIteration  # DALI's end of an epoch
        step = self.given
        self.given += 1
        index = self.batches[step]
        params = [tensor.numpy() for view in self.params(index) for tensor in view.values()]
        return [*self._images(step), index, *params]

    def _images(self, step: int) -> list[Any]:
        """Returns the pixels of a step's images; of files paths or PPMs, and which of these they are."""
        images = self._spec.samples.images
        if isinstance(images, np.ndarray):
            return [images[self.batches[step]]]
        assert self._files is not None
        for near in range(step, min(step + 2, len(self.batches))):  # the next step's are decoded meanwhile
            if near not in self._asked:
                self._asked[near] = self._files.ask(self.batches[near].tolist())
        given = [it if isinstance(it, Given) else it.result() for it in self._asked.pop(step)]
        return [[it.content for it in given], np.array([it.is_path for it in given])]

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
    in_files = not isinstance(spec.samples.images, np.ndarray)
    count = 2 + in_files + sum(map(len, names))
    images, *params = fn.external_source(source, num_outputs=count, batch=True)
    gpu = Pipeline.current().device_id is not None
    if in_files:
        images = _decoded(_content(images, is_path=params.pop(0)), gpu)
    else:
        images = fn.reinterpret(images, layout="HWC")
        images = images.gpu() if gpu else images
    index = params.pop(0)
    views = []
    for view, kind in enumerate(spec.kinds):
        inputs = {name: params.pop(0) for name in names[view]}
        views.append(dali_graph.random_view(images, plan_view(kind, spec.options), spec.options, inputs))
    if not spec.kinds:
        views.append(dali_graph.evaluation_view(images, spec.options))
    return index, images.shape(), *[dali_graph.normalized(view, spec.options) for view in views]


@pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1)
def _decoding(paths: Iterator[list[NDArray[np.uint8]]]) -> DataNode:
    return _decoded(fn.io.file.read(fn.external_source(paths, batch=True)), Pipeline.current().device_id is not None)


def _content(given: DataNode, is_path: DataNode) -> DataNode:
    """Reads the files whose paths are given."""
    if is_path:  # noqa: SIM108  # DALI takes no conditional expression
        content = fn.io.file.read(given)
    else:
        content = given
    return content


def _decoded(files: DataNode, gpu: bool) -> DataNode:
    """Decodes the files as Pillow does, which ignores EXIF's rotation."""
    return fn.decoders.image(
        files,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )


def _failing(files: DaliFiles, met: list[int], gpu: int | None) -> list[int]:
    """Returns those of the files that DALI was to decode by itself, and can't."""
    left = files.dalis(met)
    failing: list[int] = []
    while left:
        pipeline = _decoding(iter([[files.path(index)] for index in left]), device_id=gpu)
        try:
            for index in left:  # noqa: B007
                pipeline.run()
        except RuntimeError:
            failing.append(index)
            left = left[left.index(index) + 1 :]
        else:
            break
    return failing


def _bad_sizes(spec: LoaderSpec, index: Tensor, shapes: Tensor) -> dict[int, BadImage]:
    """Returns the errors of the images that views can't be made of, by index, in the torchvision loader's words."""
    options = spec.options
    size, crops = options.image_size, {plan_view(kind, options).crop for kind in spec.kinds}
    check: RequireSize | RequireCrop
    if "none" in crops:
        check, wrong = size_of_digits(options), shapes[:, :2] != size
    elif "padded" in crops:
        check, wrong = RequireCrop(size, options.crop_padding), shapes[:, :2] + 2 * options.crop_padding < size
    elif not crops and options.evaluation == "as_is":
        check, wrong = size_as_is(options), shapes[:, :2] != size
    else:
        return {}
    bad = {}
    for row in wrong.any(1).nonzero().flatten().tolist():
        height, width, _ = shapes[row].tolist()
        try:
            check(Image.new("RGB", (width, height)))
        except ValueError as error:
            image = int(index[row])
            bad[image] = BadImage(f"cannot use {describe(spec.samples, image)}: {error}")
    return bad


def _gpu(device: torch.device) -> int | None:
    """Returns DALI's number of the GPU; None for the CPU."""
    return (device.index or 0) if device.type == "cuda" else None
