"""What every loader promises: order, labels and epochs; device and DALI, of the same random parameters, are twins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_batches import joined, same, tensors
from PIL import Image

from rcl_fast.train.data.samples import Samples
from rcl_fast.train.loaders.base import (
    Loader,
    StateMismatch,
    evaluation_spec,
    loader_state,
    read_loader_state,
    training_spec,
)
from rcl_fast.train.loaders.build import make_loader
from rcl_fast.train.options import LoaderName, ViewKind, ViewOptions

pytest.importorskip("nvidia.dali")

from nvidia.dali import Pipeline, data_node, ops
from nvidia.dali import math as dali_math

from rcl_fast.train.loaders import dali

OPTIONS = ViewOptions(
    image_size=16,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.25),
    x1="autoaugment",
    x2="sim",
    x3="randaugment",
    evaluation="as_is",
    cutout=6,
    crop_padding=2,
)
KINDS: tuple[ViewKind, ...] = ("autoaugment", "sim", "randaugment")
CPU = torch.device("cpu")
LOADERS = ("torchvision", "device", "dali")
COUNT = 22


def smooth(n: int, side: int) -> np.ndarray:
    """Images as soft as photographs: uint8 [n, side, side, 3]."""
    noise = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in noise]
    )


def marked(n: int = COUNT) -> Samples:
    """Image k is of one color, (k, k, k), and its label k % 5."""
    return Samples(
        np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3), np.arange(n) % 5
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """The same as PNG files."""
    folder, paths = tmp_path_factory.mktemp("images é"), []
    for number, image in enumerate(marked().images):
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(image).save(paths[-1])
    return Samples(paths, marked().labels)


def training(
    name: LoaderName, samples: Samples, kinds: tuple[ViewKind, ...] = KINDS, workers: int = 1, **changes: int
) -> Loader:
    spec = training_spec(samples, kinds, OPTIONS, **{"seed": 0, "batch_size": 8, "drop_last": False, **changes})
    return make_loader(name, spec, device=CPU, workers=0 if name == "torchvision" else workers)


def evaluation(name: LoaderName, samples: Samples, options: ViewOptions = OPTIONS, **changes: int) -> Loader:
    spec = evaluation_spec(samples, options, **{"batch_size": 6, **changes})
    return make_loader(name, spec, device=CPU, workers=0 if name == "torchvision" else 1)


@pytest.mark.parametrize("name", LOADERS)
def test_epochs_repeat_go_on_from_any_step_and_survive_being_broken_off(name: LoaderName) -> None:
    samples = Samples(smooth(COUNT, 16), np.arange(COUNT) % 5)
    loader = training(name, samples)
    whole = list(loader.epoch(1))
    assert len(whole) == loader.steps_per_epoch == 3
    assert [len(batch.labels) for batch in whole] == [8, 8, 6]
    next(iter(loader.epoch(7)))
    assert same(list(loader.epoch(1)), whole)
    for start in range(4):
        assert same(list(loader.epoch(1, start)), whole[start:])
    assert same(list(training(name, samples, workers=3).epoch(1, 2)), whole[2:])  # another process, other threads
    assert not same(list(loader.epoch(2)), whole)
    assert not same(list(training(name, samples, seed=1).epoch(1)), whole)


@pytest.mark.parametrize("name", LOADERS)
def test_what_a_batch_is(name: LoaderName) -> None:
    batch = next(iter(training(name, marked()).epoch(0)))
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors(batch)] == [
        *[(torch.float32, (8, 3, 16, 16))] * 3,
        (torch.int64, (8,)),
        (torch.int64, (8,)),
    ]
    assert all(torch.isfinite(view).all() for view in batch.views)


@pytest.mark.parametrize("in_files", [False, True], ids=["pixels", "files"])
@pytest.mark.parametrize("name", LOADERS)
def test_labels_follow_images_through_training(name: LoaderName, in_files: bool, files: Samples) -> None:
    """A crop of an image of one color is that color, but for the black border."""
    if in_files and name == "device":
        pytest.skip("the device loader takes no files")
    loader = training(name, files if in_files else marked(), kinds=("crop_flip",))
    seen = []
    for batch in loader.epoch(3):
        mean, std = (torch.tensor(value)[:, None, None] for value in (OPTIONS.mean, OPTIONS.std))
        colors = (255 * (batch.views[0] * std + mean)).round().amax((1, 2, 3)).long()
        assert torch.equal(colors, batch.indices)
        assert torch.equal(batch.labels, batch.indices % 5)
        seen += batch.indices.tolist()
    assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize("name", LOADERS)
def test_processes_see_what_one_process_sees(name: LoaderName) -> None:
    samples = Samples(smooth(COUNT, 16), np.arange(COUNT) % 5)
    whole = list(training(name, samples).epoch(0))
    ranks = [list(training(name, samples, rank=rank, world_size=2).epoch(0)) for rank in range(2)]
    assert same(joined(*ranks), whole)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", LOADERS)
def test_evaluation_sees_each_image_once(name: LoaderName, world_size: int, files: Samples) -> None:
    samples = marked() if name == "device" else files
    loaders = [evaluation(name, samples, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in loader.epoch(0)]
    index = torch.cat([batch.indices for batch in batches])
    assert index.tolist() == list(range(COUNT))
    marks = torch.cat([batch.views[0][:, 0, 0, 0] for batch in batches]) * OPTIONS.std[0] + OPTIONS.mean[0]
    assert torch.equal((255 * marks).round().long(), index)
    assert same([b for loader in loaders for b in loader.epoch(5)], batches)


@pytest.mark.parametrize("name", LOADERS)
def test_a_position_is_refused_where_it_does_not_fit(name: LoaderName) -> None:
    saved = loader_state(training(name, marked()), epoch=2, step=1)
    assert read_loader_state(training(name, marked()), saved) == (2, 1)
    other = "device" if name != "device" else "dali"
    for loader in (
        training(name, marked(21)),
        training(name, marked(), batch_size=4),
        training(name, marked(), kinds=("sim", "sim")),
        training(other, marked()),
    ):
        with pytest.raises(StateMismatch):
            read_loader_state(loader, saved)


def test_a_run_of_dali_with_numba_is_refused_by_name() -> None:
    """Numba's pixels were Pillow's, a rounding away from the graph's; its runs called themselves DALI 2."""
    loader = training("dali", marked())
    saved = loader_state(loader, epoch=2, step=1)
    with_numba = loader.fingerprint["loader"].replace("DALI 3, without Numba", "DALI 2")
    saved["identity"] = {**loader.fingerprint, "loader": with_numba}
    with pytest.raises(StateMismatch, match=r"was DALI 2 \(.*now DALI 3, without Numba"):
        read_loader_state(loader, saved)


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (40, 40), (17, 90)], ids=str)
def test_evaluation_resizes_and_crops_alike(size: tuple[int, int], tmp_path: Path) -> None:
    """Resize 20 + CenterCrop 16, within one level of Pillow: each rounds once more or less on the way."""
    options = dataclasses.replace(OPTIONS, evaluation="resize_center_crop", resize=20)
    pictures = smooth(3, 128)[:, : size[0], : size[1]]
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    in_files = Samples(paths, np.zeros(3, np.int64))
    expected = next(iter(evaluation("torchvision", in_files, options).epoch(0))).views[0]
    for found in (
        evaluation("dali", in_files, options),
        evaluation("device", Samples(np.ascontiguousarray(pictures), in_files.labels), options),
    ):
        assert levels_apart(next(iter(found.epoch(0))).views[0], expected) <= 1


def levels_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in 255ths."""
    std = torch.tensor(OPTIONS.std)[:, None, None]
    return float((255 * std * (one - other)).abs().max().round())


@pytest.mark.parametrize(
    "kind", ["crop_flip", "autoaugment", "sim", "randaugment", "sim_randaugment", "digits", "digits_sim"]
)
def test_device_and_dali_make_twins(kind: ViewKind) -> None:
    """The same random parameters twice, against those of another epoch; test_dali_graph.py bounds each operation."""
    samples = Samples(smooth(64, 16), np.arange(64) % 5)
    first, twin = (training(name, samples, kinds=(kind,), batch_size=64) for name in ("device", "dali"))
    apart = mean_levels_apart(by_index(first, 0), by_index(twin, 0))
    assert apart < 2
    assert mean_levels_apart(by_index(first, 0), by_index(twin, 1)) > 10 * apart


def by_index(loader: Loader, epoch: int) -> torch.Tensor:
    """View x1 of every image of a one-batch epoch, in the images' order."""
    (batch,) = loader.epoch(epoch)
    return batch.views[0][batch.indices.argsort()]


def mean_levels_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    std = torch.tensor(OPTIONS.std)[:, None, None]
    return float((255 * std * (one - other)).abs().mean())


def copied_unasked(pipeline: Pipeline) -> list[str]:
    """Where a GPU's graph reads a value from another device than it was made on or is wanted on, without `.gpu()`.

    The shape of a batch is no value: the CPU knows it anyway. What a "mixed" operator decodes is the CPU's.
    """
    found = []
    for instance in pipeline._ops:
        operator = instance._op
        for number, node in enumerate(instance.inputs):
            is_argument = number >= instance.spec.NumRegularInput()
            wanted = "cpu" if is_argument else operator.schema.GetInputDevice(number, None, operator.device)
            misplaced = node.device != wanted and operator.schema_name != "_Shape" and operator.device != "mixed"
            fetched = node.device == "cpu" and node.source._op.device != "cpu"
            if misplaced or fetched:
                found.append(f"{operator.schema_name} on the {operator.device}: input {number} of the {node.device}")
    return found


@pytest.mark.parametrize("in_files", [False, True], ids=["pixels", "files"])
@pytest.mark.parametrize("kinds", [KINDS, ("sim_randaugment", "crop_flip"), ("digits", "digits_sim"), ()], ids="+".join)
def test_a_gpus_graph_copies_nothing_unasked(
    kinds: tuple[ViewKind, ...], in_files: bool, files: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is defined, without a GPU to run it. Arithmetic with both devices would itself bring all to the GPU."""
    mixed = []

    def arithmetic(name: str, *inputs: object, **more: object) -> data_node.DataNode:
        if len({node.device for node in inputs if isinstance(node, data_node.DataNode)}) > 1:
            mixed.append(name)
        return ops._arithm_op(name, *inputs, **more)

    for module in (data_node, dali_math):
        monkeypatch.setattr(module, "_arithm_op", arithmetic)
    options = dataclasses.replace(OPTIONS, evaluation="resize_center_crop", resize=20)
    samples = files if in_files else marked()
    if kinds:
        spec = training_spec(samples, kinds, options, seed=0, batch_size=8)
    else:
        spec = evaluation_spec(samples, options, batch_size=8)
    pipeline = dali._views(dali._Source(spec, {}), spec, batch_size=8, num_threads=1, device_id=0)
    pipeline._build_graph()
    assert {instance._op.device for instance in pipeline._ops} >= {"cpu", "gpu"}
    assert mixed == []
    assert copied_unasked(pipeline) == []


def test_a_large_image_goes_through_three_different_views(tmp_path: Path) -> None:
    Image.fromarray(smooth(1, 300)[0]).save(tmp_path / "image.jpg", quality=95)
    samples = Samples([str(tmp_path / "image.jpg")], np.zeros(1, np.int64))
    (batch,) = training("dali", samples, kinds=("sim", "sim", "randaugment")).epoch(0)
    assert len({view.numpy().tobytes() for view in batch.views}) == 3


def test_exif_rotation_is_ignored_as_pillow_does(tmp_path: Path) -> None:
    picture = Image.fromarray(smooth(1, 16)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    samples = Samples([str(tmp_path / "turned.jpg")], np.zeros(1, np.int64))
    dali, pillow = (next(iter(evaluation(name, samples).epoch(0))).views[0] for name in ("dali", "torchvision"))
    assert levels_apart(dali, pillow) <= 1


@pytest.mark.parametrize("name", ["dali", "torchvision"])
def test_a_bad_image_is_left_out_when_asked_and_the_loader_lives(
    name: LoaderName, files: Samples, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    samples = Samples([*files.images[:10], str(empty), *files.images[11:]], files.labels)
    said: list[str] = []
    keep: Callable[[Exception], None] = lambda error: said.append(str(error))  # noqa: E731
    spec = training_spec(samples, KINDS, OPTIONS, seed=0, batch_size=8, drop_last=False, on_bad=keep)
    loader = make_loader(name, spec, device=CPU, workers=0)
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        index = torch.cat([batch.indices for batch in batches])
        assert sorted(index.tolist()) == [number for number in range(COUNT) if number != 10]
        assert torch.equal(torch.cat([batch.labels for batch in batches]), index % 5)
    assert said == [f"cannot read the image {empty}: the file is empty"] * 2
