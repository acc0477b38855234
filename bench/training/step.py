"""The whole training step: images a second, memory, and the loss's share, beside a plain loop of BCL's kind.

    python -m bench.training.step --output FILE                       ResNeXt-50, 256 images × 3 views of 224 pixels
    python -m bench.training.step --arch resnet32 --batch-size 64     CIFAR's network and views of 32 pixels
    ... --data DIR      JPEG files below class folders; without, made-up ones
    ... --dry-run       a tiny case on any machine, nothing compiled: proves the script

The plain loop does what BCL's main.py does with the same network and batch: float32, channels first, the loss with its
N×M matrix (`dense`), each loss read in each step, cuDNN's search for its fastest algorithms on, torchvision's loader.
That code leaves TF32 as PyTorch has it: off in matrix products, *on* in cuDNN's convolutions from sm_80 on; a variant
without it is beside. Ours is the trainer's own epoch in the precision that it chooses, on a loader that it chooses.

Every loop meets noise, the same batch again and again on the device, and then images, so that the loader's part and the
step's can be told apart; ours is compared with the plain loop on the same kind. Everything is warm before anything is
timed; a round runs each variant once, over whole epochs of --steps steps; figures are medians of the rounds. On a GPU
each turn begins with a step that is not counted, as the allocator's pool was another variant's. A step touches far more
memory than any cache holds: inputs need no rotation. A variant that does not fit in the GPU's memory is a row without
figures: a smaller --batch-size is then one for all.

The loss is timed by itself, forward and backward, on the step's own embeddings and prototypes, waiting for the device
each time: an upper bound, as within a step a GPU would hide the host's work. The cross-entropy side is not in it.

Two limits, of no algorithm but of the machine:
  operations   of the network's products and convolutions, forward and backward (the loss left out), at the measured
               speed of one large product or convolution, the faster of the two, in our precision
  bytes        five passes over the outputs of the convolutions, as even perfect fusion would need: written and read
               forward, read again backward, their gradient written and read; at the measured speed of a large copy
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from bench.images.loaders import Case, an_epoch, made_up, repeated, spec
from bench.loss.cases import synchronize
from bench.loss.gpu import measured_peak
from bench.rows import append, spread
from rcl_fast.train.config import parse, recipe
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.data.samples import Samples
from rcl_fast.train.loaders.base import Batch, Loader
from rcl_fast.train.loaders.build import choose, make_loader
from rcl_fast.train.loaders.device import DeviceLoader
from rcl_fast.train.loaders.synthetic import SyntheticLoader
from rcl_fast.train.loop.cuda_graph import GraphedStep
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.network.models import LongTailedClassifier
from rcl_fast.train.options import Config
from rcl_fast.train.runtime.hardware import DTYPES, choose_runtime

LOSS_CALLS = 5  # of the loss alone in a variant's turn
PASSES = 5  # over a convolution's outputs, at least
NOISE = "noise"


@dataclass
class Options:
    """What to measure."""

    arch: Literal["resnext50", "resnet50", "resnet32"] = "resnext50"
    """resnet32 trains on CIFAR's sizes, the others on ImageNet's."""
    batch_size: int = 256
    """Images a step; each gives three views."""
    data: Path | None = None
    """Folder of JPEG files below class folders; without one, made-up pictures of 500×375 pixels."""
    rounds: int = 5
    """How often each variant is timed."""
    steps: int = 10
    """Steps of a variant's turn."""
    workers: int = os.cpu_count() or 1
    """Processes of torchvision, threads of DALI and of PyTorch."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Ours; the plain loop is float32."""
    compile: bool = True
    """Measure ours compiled too, which takes a minute or two to prepare."""
    output: Path | None = None
    """File of JSON lines to append the rows to."""
    dry_run: bool = False
    """A tiny case and few rounds, nothing compiled: proves the script."""


class Loop(NamedTuple):
    """A way to train: what it changes, how an epoch of it runs, and under which switches of cuDNN."""

    name: str
    training: Training
    epoch: Callable[[Training, Loader], Any]
    switches: Callable[[], AbstractContextManager[None]] = nullcontext
    is_graph: bool = False  # whose memory is held between steps: a step's peak would not show it


class Variant(NamedTuple):
    """A loop on images, ready to be timed."""

    loop: Loop
    images: str  # NOISE, or the name of the loader
    loader: Loader
    first: Loader  # one step on noise
    loss: Callable[[], None]  # the contrastive loss alone, forward and backward
    memory: float | None  # MB


def name_of(loop: Loop, images: str) -> str:
    return f"{loop.name}, {images}{'' if images == NOISE else ' loader'}"


def main(options: Options) -> None:
    if options.dry_run:
        options = replace(options, arch="resnet32", batch_size=8, rounds=2, steps=2, compile=False)
    if options.rounds < 2:
        raise SystemExit(f"--rounds must be at least 2, got {options.rounds}: the spread is a figure too")
    torch.set_num_threads(options.workers)
    with tempfile.TemporaryDirectory() as folder:
        case, splits = build_case(options, Path(folder))
        rows = measure(case, splits, options)
    Console(width=130).print(table(case, rows))
    common = {"case": case.name, "arch": options.arch, "views": 3, "steps": options.steps}
    append(options.output, [{**common, **row} for row in rows], options.dry_run)


def build_case(options: Options, folder: Path) -> tuple[Case, Splits]:
    """Makes images enough for a turn, in long-tailed classes: as many as the data set of that network has."""
    small = options.arch == "resnet32"
    base = recipe("cifar100_lt" if small else "imagenet_lt", "bcl_rcl")
    counts = np.geomspace(500, 5, 100).astype(int) if small else np.geomspace(1280, 5, 1000).astype(int)
    make = np.random.default_rng(0)
    labels = make.permutation(np.repeat(np.arange(len(counts)), counts))
    if small:
        images: Any = make.integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
    else:
        files = sorted(map(str, options.data.glob("*/*"))) if options.data is not None else made_up(folder)
        if not files:
            raise SystemExit(f"--data {options.data}: no files below class folders there")
        images = [files[number % len(files)] for number in range(len(labels))]
    train = Samples(images, labels)
    splits = Splits(train, train, train, list(map(str, range(len(counts)))), counts, "nothing")
    name = f"{options.arch}, {32 if small else 224} px, {options.batch_size} × 3 views"
    return Case(name, base, repeated(train, options.steps * options.batch_size), options.batch_size), splits


def measure(case: Case, splits: Splits, options: Options) -> list[dict[str, Any]]:
    variants, too_large = prepared(case, splits, options)
    print(f"everything is warm; {options.rounds} rounds of {len(variants)} variants", flush=True)
    rates: list[list[float]] = [[] for _ in variants]
    losses: list[list[float]] = [[] for _ in variants]
    for number in range(1, options.rounds + 1):
        for variant, rate, loss in zip(variants, rates, losses, strict=True):
            seconds = turn(variant, number)
            rate.append(case.batch_size * options.steps / seconds)
            loss += loss_seconds(variant)
    bounds = limits(case, splits, options)
    bound = min(row["images_per_second"] for row in bounds)
    rows = [describe_variant(*each, case.batch_size) for each in zip(variants, rates, losses, strict=True)]
    for row in rows:
        row["rounds"] = options.rounds
        peer = peer_of(row, rows)
        row["times_plain"] = None if peer is None else row["images_per_second"] / peer["images_per_second"]
        row["share_of_limit"] = row["images_per_second"] / bound
    return [*rows, *({**row, "device": rows[0]["device"]} for row in (*too_large, *bounds))]


def prepared(case: Case, splits: Splits, options: Options) -> tuple[list[Variant], list[dict[str, Any]]]:
    """Returns the variants, warm, and a row for each that is too large for the GPU; raises SystemExit if all are."""
    variants: list[Variant] = []
    too_large: list[dict[str, Any]] = []
    for loop, kinds in loops(case, splits, options):
        for images in kinds:
            try:
                variants.append(warm(loop, images, case, options))
            except torch.OutOfMemoryError as error:
                name = name_of(loop, images)
                print(f"{name}: too large for the GPU's memory", flush=True)
                too_large.append({"variant": name, "batch_size": case.batch_size, "error": str(error)[:200]})
                loop.training.optimizer.zero_grad()
                release(loop.training.runtime.device)
    if not variants:
        raise SystemExit(f"--batch-size {case.batch_size}: no variant fits in the GPU's memory; take a smaller one")
    return variants, too_large


def loops(case: Case, splits: Splits, options: Options) -> Iterator[tuple[Loop, list[str]]]:
    """Gives each loop with the images that it is measured on, noise first."""
    plain = start(case, splits, options, "--precision", "fp32", "--no-channels-last", "--backend", "dense")
    device = plain.runtime.device
    yield Loop("plain loop", plain, plain_epoch, plain_switches(tf32=True)), [NOISE, "torchvision"]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        yield Loop("plain loop without TF32", plain, plain_epoch, plain_switches(tf32=False)), [NOISE]
    chosen, _ = choose(spec(case), device)
    ours = start(case, splits, options, "--precision", options.precision)
    yield Loop("ours", ours, an_epoch), [NOISE] if options.compile else [NOISE, chosen]
    if options.compile:
        compiled = start(case, splits, options, "--precision", options.precision, "--compile")
        yield Loop("ours, compiled", compiled, an_epoch), [NOISE, chosen]
        if device.type == "cuda" and chosen == "device":
            captured = start(case, splits, options, "--precision", options.precision, "--compile")
            yield Loop("ours, compiled, in a CUDA graph", captured, graph_epoch(), is_graph=True), [chosen]
    if device.type == "cuda" and chosen == "device":
        captured = start(case, splits, options, "--precision", options.precision)
        yield Loop("ours, in a CUDA graph", captured, graph_epoch(), is_graph=True), [chosen]


def start(case: Case, splits: Splits, options: Options, *arguments: str) -> Training:
    """Starts the data set's recipe at a learning rate at which noise does not diverge; no step's time depends on it."""
    dataset = case.recipe.data.dataset
    config = parse(["--dataset", dataset, "--arch", options.arch, "--lr", "0.0001", *arguments])
    return start_training(config, splits, choose_runtime(config.run))


def graph_epoch() -> Callable[[Training, Loader], Any]:
    """Returns an epoch of CUDA-graph steps, captured at a loader's first; noise, which warms up, goes step by step."""
    steps: dict[Loader, GraphedStep] = {}

    def epoch(training: Training, loader: Loader) -> dict[str, float]:
        if not isinstance(loader, DeviceLoader):
            return an_epoch(training, loader)
        step = steps.setdefault(loader, GraphedStep(loader))
        return an_epoch(training, step.loader, step)

    return epoch


def plain_epoch(training: Training, loader: Loader) -> None:
    """Trains as BCL's main.py does, but for its copy of the views on the CPU, which would only cost it time."""
    training.model.train()
    for batch in loader.epoch(training.epoch):
        views, labels = on_device(training, batch)
        loss = training.objective(training.model(views), labels)
        for part in loss.parts().values():
            part.item()
        training.optimizer.zero_grad()
        loss.total.backward()
        training.optimizer.step()


def plain_switches(tf32: bool) -> Callable[[], AbstractContextManager[None]]:
    return lambda: torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32)


def on_device(training: Training, batch: Batch) -> tuple[list[Tensor], Tensor]:
    views = [training.runtime.images(view) for view in batch.views]
    return views, training.runtime.labels(batch.labels)


class Again:
    """A Loader of one batch, again and again; it lies on the device in the network's own layout."""

    fingerprint: dict[str, str]

    def __init__(self, training: Training, batch: Batch, steps: int) -> None:
        views, labels = on_device(training, batch)
        self.batch = Batch(tuple(views), labels, batch.indices)
        self.steps_per_epoch = steps
        self.fingerprint = {}

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for _ in range(start, self.steps_per_epoch):
            yield self.batch


def warm(loop: Loop, images: str, case: Case, options: Options) -> Variant:
    training, what = loop.training, spec(case)
    device = training.runtime.device
    noise = next(SyntheticLoader(what, device).epoch(0))
    first = Again(training, noise, 1)
    loader: Loader = Again(training, noise, options.steps)
    if images != NOISE:
        compile = training.config.run.compile and device.type == "cuda"
        loader = make_loader(images, what, device=device, workers=options.workers, compile=compile)  # type: ignore[arg-type]  # a LoaderName
    with loop.switches():
        for _ in range(2):
            loop.epoch(training, first)
        if images != NOISE:
            loop.epoch(training, loader)  # its processes stay
        memory = None if loop.is_graph else peak_increase(loop, first)
        loss = loss_alone(training, first.batch)
        loss()
    return Variant(loop, images, loader, first, loss, memory)


def peak_increase(loop: Loop, first: Loader) -> float | None:
    """Returns the MB that a step takes beside the weights and the optimiser's state: activations and gradients."""
    device = loop.training.runtime.device
    if device.type != "cuda":
        return None
    loop.training.optimizer.zero_grad()
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loop.epoch(loop.training, first)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def loss_alone(training: Training, batch: Batch) -> Callable[[], None]:
    """Returns a call of the contrastive loss, forward and backward, on the embeddings and prototypes of a step."""
    contrastive = training.objective.contrastive
    assert contrastive is not None
    views, labels = on_device(training, batch)
    with training.runtime.autocast():
        outputs = training.model(views)
    inputs = [outputs.embeddings.detach().requires_grad_(), outputs.prototypes.detach().requires_grad_()]

    def loss() -> None:
        with training.runtime.autocast():
            value = contrastive(inputs[0], labels, inputs[1])
        torch.autograd.grad(value, inputs)

    return loss


def turn(variant: Variant, number: int) -> float:
    """Runs an epoch; returns its seconds, from the first request for a batch to the last update."""
    loop, training = variant.loop, variant.loop.training
    device = training.runtime.device
    training.epoch = number
    with loop.switches():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            loop.epoch(training, variant.first)
        synchronize(device)
        began = time.perf_counter()
        loop.epoch(training, variant.loader)
        synchronize(device)
        return time.perf_counter() - began


def loss_seconds(variant: Variant) -> list[float]:
    """Returns the seconds of each of several calls of the loss alone, after one that is not counted."""
    device = variant.loop.training.runtime.device
    taken = []
    for _ in range(1 + LOSS_CALLS):
        synchronize(device)
        began = time.perf_counter()
        variant.loss()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return taken[1:]


def describe_variant(variant: Variant, rates: list[float], losses: list[float], batch_size: int) -> dict[str, Any]:
    training = variant.loop.training
    config, runtime = training.config, training.runtime
    loss = statistics.median(losses)
    return {
        "variant": name_of(variant.loop, variant.images),
        "images": variant.images,
        "device": runtime.device.type,
        "precision": runtime.precision,
        "channels_last": config.run.channels_last,
        "compiled": config.run.compile,
        "backend": config.loss.backend,
        "batch_size": batch_size,
        **spread("images_per_second", rates),
        "loss_milliseconds": 1e3 * loss,
        "loss_share": loss * statistics.median(rates) / batch_size,
        "step_mb": variant.memory,
    }


def peer_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the plain loop's row on the same kind of images, noise or a loader's; None where it did not fit."""
    peers = (peer for peer in rows if peer["variant"].startswith("plain loop,"))
    return next((peer for peer in peers if (peer["images"] == NOISE) == (row["images"] == NOISE)), None)


def limits(case: Case, splits: Splits, options: Options) -> list[dict[str, Any]]:
    """Returns a row for the operations of a step and one for its bytes: no loop in our precision can exceed either."""
    config = parse(["--dataset", case.recipe.data.dataset, "--arch", options.arch, "--precision", options.precision])
    on = choose_runtime(config.run)
    release(on.device)
    dtype = DTYPES[on.precision] or torch.float32
    operations, outputs = counted(config, splits.num_classes)
    transferred = PASSES * outputs * dtype.itemsize
    peak = measured_speed(on.device, dtype)
    bandwidth = measured_bandwidth(on.device)
    common = {"precision": on.precision}
    return [
        {
            **common,
            "variant": "limit: operations",
            "images_per_second": peak / operations,
            "gflop_an_image": operations / 1e9,
            "tflops": peak / 1e12,
        },
        {
            **common,
            "variant": "limit: bytes",
            "images_per_second": bandwidth / transferred,
            "mb_an_image": transferred / 1e6,
            "gb_per_second": bandwidth / 1e9,
        },
    ]


def counted(config: Config, num_classes: int, images: int = 4) -> tuple[float, float]:
    """Returns, of an image's three views: operations forward and backward, elements that convolutions put out."""
    operations: list[int] = []  # forward; PyTorch's own counter takes no account of groups in the backward pass
    outputs: list[int] = []

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        outputs.append(output.numel() if isinstance(module, nn.Conv2d) else 0)
        operations.append(2 * output.numel() * module.weight[0].numel())

    with FakeTensorMode():  # shapes alone
        model = LongTailedClassifier(config.model, num_classes, embeds=True, has_prototypes=False)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        model([torch.empty(images, 3, *2 * [config.views.image_size]) for _ in range(3)])
    # Backward once more for the inputs and once for the weights, but images need no gradient.
    return (3 * sum(operations) - operations[0]) / images, sum(outputs) / images


def measured_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the operations a second of a large product or a 3×3 convolution, the faster: on some CPUs the latter."""
    on_cpu = device.type == "cpu"
    images, channels, side = (32, 256, 14) if on_cpu else (256, 256, 56)
    inputs = torch.randn(images, channels, side, side, device=device, dtype=dtype)
    weights = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    inputs, weights = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (inputs, weights))
    seconds = best_seconds(lambda: F.conv2d(inputs, weights, padding=1), device)
    convolution = 2 * inputs.numel() * weights[0].numel() / seconds
    return max(convolution, measured_peak(device, dtype, size=1024 if on_cpu else None))


def measured_bandwidth(device: torch.device) -> float:
    """Returns the bytes a second, read and written, of a copy larger than any cache."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def best_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds of the shortest of ten calls."""
    best = math.inf
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def table(case: Case, rows: list[dict[str, Any]]) -> Table:
    shown = Table("", title=f"{case.name}, on {rows[0]['device']}")
    shown.columns[0].no_wrap = True
    for heading in ("images/s", "p20 to p80", "× plain", "of the limit", "loss", "loss, ms", "step, MB", "batch"):
        shown.add_column(heading, justify="right")
    for row in rows:
        if row["variant"].startswith("limit"):
            shown.add_row(f"{row['variant']} ({row['precision']})", f"{row['images_per_second']:,.1f}")
            continue
        if "error" in row:
            shown.add_row(row["variant"], "too large")
            continue
        shown.add_row(
            f"{row['variant']} ({row['precision']})",
            f"{row['images_per_second']:,.1f}",
            f"{row['images_per_second_p20']:,.1f} to {row['images_per_second_p80']:,.1f}",
            "–" if row["times_plain"] is None else f"{row['times_plain']:.2f}",
            f"{row['share_of_limit']:.0%}",
            f"{row['loss_share']:.1%}",
            f"{row['loss_milliseconds']:.2f}",
            "–" if row["step_mb"] is None else f"{row['step_mb']:,.0f}",
            str(row["batch_size"]),
        )
    return shown


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
