"""N processes give the loss, the gradients and, after steps of SGD, the parameters of one."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, draw_case
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import MOST, Processes
from test_golden import case_of
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from rcl_fast import ContrastiveLoss, contrastive_loss
from rcl_fast.backends import tiled
from rcl_fast.distributed import bytes_sent

WORLDS = range(1, MOST + 1)
BACKENDS = ["reference", "dense", "tiled"]
SIZES = {1: [30], 2: [21, 9], 3: [9, 0, 21], 4: [9, 0, 17, 4]}  # uneven, and one process without an anchor
PRESETS = {
    "scl": {"prototypes": False},
    "bcl": {"class_average": True},
    "scl_rcl": {"prototypes": False, "rebalance": True},
    "bcl_rcl": {"class_average": True, "rebalance": True},
    "compressed": {"class_average": True, "rebalance": True, "compression": True},
    "not normalised": {"rebalance": True, "normalize": False, "temperature": 2.0},
}


def rank_of(group: ProcessGroup) -> int:
    return distributed.get_rank(group)


def local_part(case: Case, sizes: list[int], rank: int) -> Case:
    """The part of a batch that lies in that process; prototypes and options are everyone's."""
    part = case.to(case["features"].dtype)
    part["features"] = case["features"].detach().split(sizes)[rank].clone().requires_grad_()
    part["labels"] = case["labels"].split(sizes)[rank]
    return part


def losses_and_gradients(case: Case, grad_output: Tensor, **options: Any) -> list[Tensor]:
    """[loss, gradient of the features, of the prototypes]; `grad_output` [n] weighs the losses that are not reduced."""
    loss = contrastive_loss(**case, **options)
    loss.backward(
        grad_output.to(loss.dtype) if options.get("reduction") == "none" else torch.tensor(3.0).to(loss.dtype)
    )
    return [loss.detach(), *case.gradients()]


def in_a_process(
    group: ProcessGroup, case: Case, grad_output: Tensor, sizes: list[int], chunk_bytes: int, options: dict[str, Any]
) -> list[Tensor]:
    tiled.CHUNK_BYTES["cpu"] = chunk_bytes  # small shapes must still exceed one chunk
    rank = rank_of(group)
    return losses_and_gradients(local_part(case, sizes, rank), grad_output.split(sizes)[rank], group=group, **options)


def together(results: list[list[Tensor]], reduction: str) -> list[Tensor]:
    """What one process has, of what DistributedDataParallel makes of the processes' results: sums over W."""
    losses, for_features, *for_prototypes = zip(*results, strict=True)
    assert reduction == "none" or all(torch.equal(loss, losses[0]) for loss in losses)
    return [
        torch.cat(losses) if reduction == "none" else losses[0],
        torch.cat(for_features) / len(results),
        *(sum(gradients) / len(results) for gradients in for_prototypes),
    ]


def assert_equals_one_process(
    processes: Processes,
    case: Case,
    sizes: list[int],
    tolerance: float = 1e-12,
    chunk_bytes: int = 4_000,
    **options: Any,
) -> None:
    grad_output = torch.linspace(-1, 2, sum(sizes), dtype=torch.float64)
    results = processes.run(len(sizes), in_a_process, case, grad_output, sizes, chunk_bytes, options)
    alone = losses_and_gradients(case.to(torch.float64), grad_output, **{**options, "backend": "reference"})
    for ours, exact in zip(together(results, options["reduction"]), alone, strict=True):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradients_are_those_of_one_process(
    processes: Processes, world: int, backend: str, reduction: str, preset: str
) -> None:
    case = draw_case(30, 7, **PRESETS[preset])
    case["labels"][:5] = 8  # a class that the first process alone has
    case["labels"][5:] %= 8
    assert_equals_one_process(processes, case, SIZES[world], backend=backend, reduction=reduction)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=MOST),
    dimensions=st.integers(1, 20),
    classes=st.integers(1, 30),
    preset=st.sampled_from(list(PRESETS)),
    backend=st.sampled_from(BACKENDS),
    reduction=st.sampled_from(["mean", "none"]),
    seed=st.integers(0, 1000),
)
def test_any_sizes(
    processes: Processes,
    sizes: list[int],
    dimensions: int,
    classes: int,
    preset: str,
    backend: str,
    reduction: str,
    seed: int,
) -> None:
    case = draw_case(sum(sizes), dimensions, classes, seed=seed, **PRESETS[preset])
    assert_equals_one_process(processes, case, sizes, 1e-10, backend=backend, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_cases(processes: Processes, golden: dict[str, np.ndarray], backend: str) -> None:
    case = case_of(golden, torch.float64)
    n = len(case["labels"])
    sizes = [n - n // 3 - n // 4, n // 3, n // 4]
    grad_output = torch.ones(n, dtype=torch.float64) / max(1, int(golden["has_positive"].sum()))
    options = {"reduction": "none", "backend": backend}
    ours = together(processes.run(3, in_a_process, case, grad_output, sizes, 4_000, options), "none")
    losses = np.where(golden["has_positive"], golden["loss_per_anchor"], 0)
    wanted = [losses, golden["grad_features"], *([golden["grad_prototypes"]] if "prototypes" in golden else [])]
    for got, want in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_plain_pytorch_in_the_same_dtype(
    processes: Processes, dtype: torch.dtype, reduction: str
) -> None:
    rounded = draw_case(90, 130, 25, class_average=True, rebalance=True).to(dtype)
    grad_output, options = torch.linspace(-1, 2, 90, dtype=torch.float64), {"reduction": reduction}
    exact = losses_and_gradients(rounded.to(torch.float64), grad_output, backend="reference", **options)
    plain = losses_and_gradients(rounded.to(torch.float64).to(dtype), grad_output, backend="dense", **options)
    sizes, options = [40, 27, 23], {**options, "backend": "tiled"}
    results = processes.run(3, in_a_process, rounded, grad_output, sizes, 40_000, options)
    for_features = torch.cat([gradient.double() for _, gradient, _ in results]) / 3
    for_prototypes = sum(gradient.double() for _, _, gradient in results) / 3
    losses = torch.cat([loss for loss, _, _ in results]) if reduction == "none" else results[0][0]
    for truth, by_plain, by_ours in zip(exact, plain, [losses, for_features, for_prototypes], strict=True):
        eps = torch.finfo(by_plain.dtype).eps
        # Three processes' parts are each rounded to the dtype, and then added up.
        rounding = 3 * eps * max(truth.abs().max(), *(result[2].abs().max() / 3 for result in results))
        assert (by_ours - truth).abs().max() <= 2 * (by_plain - truth).abs().max() + rounding
    assert results[0][0].dtype == torch.float32
    assert {result[1].dtype for result in results} == {dtype}


def with_views(group: ProcessGroup, features: Tensor, labels: Tensor) -> float:
    rank = rank_of(group)
    return contrastive_loss(features.chunk(2)[rank], labels.chunk(2)[rank], class_average=True, group=group).item()


def test_views_and_labels_that_nothing_counts(processes: Processes) -> None:
    features = torch.randn(8, 3, 5, dtype=torch.float64)
    labels = torch.tensor([7, -2, 10**12, 7, 5, -2, 5, 7])
    expected = contrastive_loss(features, labels, class_average=True).item()
    assert processes.run(2, with_views, features, labels) == pytest.approx([expected] * 2, rel=1e-12)


class GlobalBatchNorm(nn.Module):
    """SyncBatchNorm, which PyTorch has for GPUs only: mean and variance of all processes' rows."""

    def __init__(self, width: int, group: ProcessGroup | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.group = group

    def forward(self, rows: Tensor) -> Tensor:
        sums = torch.cat([rows.sum(0), rows.square().sum(0), rows.new_full((1,), len(rows))])
        if self.group is not None:
            sums = distributed.nn.functional.all_reduce(sums, group=self.group)
        width = rows.shape[1]
        mean = sums[:width] / sums[-1]
        variance = sums[width : 2 * width] / sums[-1] - mean.square()
        return self.weight * (rows - mean) / (variance + 1e-5).sqrt()


class Model(nn.Module):
    """Embeddings and, as BCL has them, prototypes from the classifier's weights by way of a second head."""

    def __init__(self, group: ProcessGroup | None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 11), GlobalBatchNorm(11, group), nn.ReLU(), nn.Linear(11, 8))
        self.classifier = nn.Linear(8, 9, bias=False)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(inputs), self.head(self.classifier.weight)


STEPS = 6


def train(group: ProcessGroup | None, inputs: Tensor, labels: Tensor, sizes: list[int], backend: str) -> list[Tensor]:
    """Parameters after steps of SGD on the contrastive loss; the last entry: the losses."""
    torch.manual_seed(0)
    model: nn.Module = Model(group).double()
    parameters = dict(model.named_parameters())
    rank = 0
    if group is not None:
        rank = rank_of(group)
        model = DistributedDataParallel(model, process_group=group)
    criterion = ContrastiveLoss.preset("bcl_rcl", torch.arange(9, 0, -1) ** 2, backend=backend, group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for step in range(STEPS):
        features, prototypes = model(inputs[step].split(sizes)[rank])
        loss = criterion(features, labels[step].split(sizes)[rank], prototypes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*(copy.copy(parameter.detach()) for parameter in parameters.values()), torch.stack(losses)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("backend", ["tiled", "dense"])
def test_sgd_under_ddp_has_the_parameters_of_one_process(processes: Processes, world: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, 30, 6, dtype=torch.float64, generator=generator)
    labels = (9 * torch.rand(STEPS, 30, generator=generator) ** 2).long()
    sizes = {1: [30], 2: [19, 11], 3: [10, 3, 17], 4: [7, 9, 10, 4]}[world]
    alone = train(None, inputs, labels, [30], "reference")
    for result in processes.run(world, train, inputs, labels, sizes, backend):
        for ours, exact in zip(result, alone, strict=True):
            assert (ours - exact).abs().max() < 1e-9


def counted(
    group: ProcessGroup, case: Case, grad_output: Tensor, sizes: list[int], options: dict[str, Any]
) -> tuple[int, list[str]]:
    """Bytes that this process gives to collectives in a step, and the names of all that the profiler saw."""
    sent = 0
    gather = distributed.all_gather_into_tensor

    def gather_and_count(output: Tensor, mine: Tensor, **rest: Any) -> None:
        nonlocal sent
        sent += mine.numel() * mine.element_size()
        gather(output, mine, **rest)

    distributed.all_gather_into_tensor = gather_and_count
    try:
        with torch.profiler.profile() as profile:
            in_a_process(group, case, grad_output, sizes, 10**6, options)
    finally:
        distributed.all_gather_into_tensor = gather
    return sent, [event.name for event in profile.events() if event.name.startswith("c10d::")]


@pytest.mark.parametrize(
    ("dtype", "reduction"), list(itertools.product([torch.float64, torch.float32, torch.bfloat16], ["mean", "none"]))
)
def test_bytes_sent(processes: Processes, dtype: torch.dtype, reduction: str) -> None:
    case = draw_case(30, 7, class_average=True).to(dtype)
    sizes, options = [13, 8, 9], {"reduction": reduction, "backend": "tiled"}
    for sent, names in processes.run(3, counted, case, torch.ones(30), sizes, options):
        assert sent == bytes_sent(13, 7, dtype, softmax_numbers=2)
        # Headers, features and labels, then the softmax with losses or with grad_output: no other gradient.
        assert names == ["c10d::_allgather_base_"] * 3


def differing(group: ProcessGroup, what: str) -> str:
    odd = rank_of(group) == 1
    options: dict[str, Any] = {"temperature": 0.2 if odd and what == "temperature" else 0.1}
    if odd and what == "reduction":
        options["reduction"] = "sum"
    if what == "prototypes" and not odd:
        options["prototypes"] = torch.randn(3, 4)
    features = torch.randn(6, 5 if odd and what == "the width of the features" else 4)
    if odd and what == "the dtype of the features":
        features = features.bfloat16()
    try:
        contrastive_loss(features, torch.arange(6) % 3, group=group, **options)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    "what", ["temperature", "reduction", "prototypes", "the width of the features", "the dtype of the features"]
)
def test_calls_that_differ_are_refused_in_every_process(processes: Processes, what: str) -> None:
    for message in processes.run(2, differing, what):
        assert f"differ in {what}: process 0 has" in message


def compiled_and_autocast(group: ProcessGroup, case: Case, sizes: list[int]) -> list[Tensor]:
    part = local_part(case, sizes, rank_of(group))
    criterion = ContrastiveLoss.preset("bcl_rcl", case["class_counts"], group=group)

    def loss_of(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
        return 2 * criterion(features.tanh(), labels, prototypes)

    results = []
    for call in (loss_of, torch.compile(loss_of, backend="aot_eager")):
        fresh = part.to(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(fresh["features"], fresh["labels"], fresh["prototypes"])
            loss.backward()
        results.append([loss.detach(), *fresh.gradients()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)
    return results[0]


def test_under_compile_and_autocast(processes: Processes) -> None:
    case = draw_case(30, 7, class_average=True, rebalance=True).to(torch.float32)
    alone = case.to(torch.float32)
    loss = 2 * contrastive_loss(**{**alone, "features": alone["features"].tanh()})
    loss.backward()
    results = processes.run(2, compiled_and_autocast, case, [21, 9])
    for ours, exact in zip(together(results, "mean"), [loss.detach(), *alone.gradients()], strict=True):
        torch.testing.assert_close(ours, exact)


def backward_twice(group: ProcessGroup, case: Case, sizes: list[int]) -> bool:
    part = local_part(case, sizes, rank_of(group))
    loss = contrastive_loss(**part, group=group)
    loss.backward(retain_graph=True)
    once = part["features"].grad.clone()
    loss.backward()
    with torch.no_grad():
        again = contrastive_loss(**part, group=group)
    return torch.allclose(part["features"].grad, 2 * once) and torch.equal(again, loss.detach())


def test_two_backward_passes_and_none(processes: Processes) -> None:
    assert all(processes.run(3, backward_twice, draw_case(30, 7), SIZES[3]))
