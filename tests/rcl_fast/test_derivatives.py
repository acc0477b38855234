"""Derivatives of any order, by any of PyTorch's ways: right, or refused by the backend's name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, draw_case
from processes import Processes
from test_distributed import local_part, rank_of
from test_functional import run
from torch import Tensor
from torch.distributed import ProcessGroup

from rcl_fast import ContrastiveLoss, contrastive_loss
from rcl_fast.backends import tiled
from rcl_fast.class_statistics import keys_per_class

TWICE = ["dense", "reference"]
REDUCTIONS = ["mean", "sum", "none"]
Loss = Callable[..., Tensor]


def small_case(**options: Any) -> Case:
    """Nine anchors of five classes, one of them without a positive but for its prototype."""
    case = draw_case(9, 3, 5, class_average=True, rebalance=True, **options)
    case["labels"] = torch.tensor([0, 1, 0, 2, 1, 0, 4, 2, 1])
    return case


def loss_of(case: Case, **options: Any) -> Loss:
    """The loss as a function of features and prototypes."""
    rest = {name: value for name, value in case.items() if name not in ("features", "prototypes")}
    return lambda features, prototypes=None: contrastive_loss(features, prototypes=prototypes, **rest, **options)


def leaves(case: Case) -> list[Tensor]:
    return [case[name] for name in ("features", "prototypes") if case[name] is not None]


@pytest.mark.parametrize("backend", TWICE)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("prototypes", [True, False])
def test_gradgradcheck(backend: str, normalize: bool, reduction: str, prototypes: bool) -> None:
    case = small_case(prototypes=prototypes, normalize=normalize, temperature=0.5, compression=normalize)
    assert torch.autograd.gradgradcheck(loss_of(case, backend=backend, reduction=reduction), leaves(case))


@pytest.mark.parametrize("backend", TWICE)
def test_a_zero_row_has_finite_second_derivatives(backend: str) -> None:
    case = small_case()
    with torch.no_grad():
        case["features"][3] = 0
        case["prototypes"][1] = 0
    gradients = torch.autograd.grad(run_loss(case, backend), leaves(case), create_graph=True)
    second = torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in gradients), leaves(case))
    assert all(one.isfinite().all() for one in second)


def run_loss(case: Case, backend: str, **options: Any) -> Tensor:
    return contrastive_loss(**case, backend=backend, **options).sum()


def assert_first_derivatives_only(case: Case, who: str, **options: Any) -> None:
    """Gradients that may be differentiated are the same, and raise where they are, by whatever they depend on."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(**case, **options).sum() * weight
    plain = torch.autograd.grad(loss, leaves(case), retain_graph=True)
    gradients = torch.autograd.grad(loss, leaves(case), create_graph=True)
    for one, same in zip(gradients, plain, strict=True):
        assert torch.equal(one, same)
    refused = pytest.raises(RuntimeError, match=f"{who} has first derivatives only.*backend='dense'")
    for gradient in gradients:
        for by in (*leaves(case), weight):
            with refused:
                torch.autograd.grad(gradient.sum(), by, retain_graph=True)
    cross_entropy = case["features"].pow(3).sum()
    (of_other,) = torch.autograd.grad(cross_entropy, case["features"], create_graph=True)
    with refused:
        (of_other + gradients[0]).pow(2).sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("prototypes", [True, False])
def test_tiled_has_first_derivatives_only(reduction: str, normalize: bool, prototypes: bool) -> None:
    case = small_case(prototypes=prototypes, normalize=normalize, temperature=0.5)
    assert_first_derivatives_only(case, "backend='tiled'", backend="tiled", reduction=reduction)
    assert_first_derivatives_only(case, "backend='tiled'", reduction=reduction)  # as "auto" has it here


def first_derivatives_together(group: ProcessGroup, case: Case, sizes: list[int], options: dict[str, Any]) -> None:
    part = local_part(case, sizes, rank_of(group))
    if options["reduction"] != "none":  # each backward pass of "none" is a collective
        assert_first_derivatives_only(part, "the loss with group=", group=group, **options)
        return
    gradients = torch.autograd.grad(
        contrastive_loss(**part, group=group, **options).sum(), leaves(part), create_graph=True
    )
    with pytest.raises(RuntimeError, match="the loss with group= has first derivatives only"):
        sum(gradient.pow(2).sum() for gradient in gradients).backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["tiled", "dense"])
def test_a_group_has_first_derivatives_only(processes: Processes, reduction: str, backend: str) -> None:
    options = {"reduction": reduction, "backend": backend}
    processes.run(2, first_derivatives_together, small_case(), [5, 4], options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
def test_torch_func_on_dense(reduction: str, normalize: bool) -> None:
    """Gradients, Hessians forward over reverse and reverse over reverse, and Hessian-vector products."""
    case = small_case(normalize=normalize, temperature=0.5)
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64) if reduction == "none" else torch.ones(()).double()
    loss, features, prototypes = loss_of(case, backend="dense", reduction=reduction), *leaves(case)

    def total(features: Tensor) -> Tensor:
        return (loss(features, prototypes) * weights).sum()

    (gradient,) = torch.autograd.grad(total(features), features, create_graph=True)
    direction = torch.linspace(-1, 1, 27, dtype=torch.float64).reshape(9, 3)
    (product,) = torch.autograd.grad((gradient * direction).sum(), features)
    torch.testing.assert_close(torch.func.grad(total)(features.detach()), gradient.detach())
    for hessian in (torch.func.hessian(total), torch.func.jacrev(torch.func.jacrev(total))):
        torch.testing.assert_close((hessian(features.detach()) * direction).sum(dim=(2, 3)), product)
    _, forward = torch.func.jvp(torch.func.grad(total), (features.detach(),), (direction,))
    torch.testing.assert_close(forward, product)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_vmap_over_features_and_prototypes(
    reduction: str, normalize: bool, in_dims: tuple[int | None, int | None]
) -> None:
    case = small_case(normalize=normalize, temperature=0.5)
    loss = loss_of(case, backend="dense", reduction=reduction)
    generator = torch.Generator().manual_seed(0)
    rows = [
        leaf.detach() if dim is None else torch.randn(4, *leaf.shape, generator=generator, dtype=torch.float64)
        for leaf, dim in zip(leaves(case), in_dims, strict=True)
    ]
    one_by_one = [[rows[k] if dim is None else rows[k][i] for k, dim in enumerate(in_dims)] for i in range(4)]
    torch.testing.assert_close(
        torch.func.vmap(loss, in_dims=in_dims)(*rows), torch.stack([loss(*each) for each in one_by_one])
    )
    gradient = torch.func.grad(lambda features, prototypes: loss(features, prototypes).sum(), argnums=(0, 1))
    for ours, expected in zip(
        torch.func.vmap(gradient, in_dims=in_dims)(*rows),
        zip(*(gradient(*each) for each in one_by_one), strict=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, torch.stack(expected))


def test_vmap_over_labels_is_refused() -> None:
    case = small_case()
    features, labels = case["features"].detach(), torch.stack([case["labels"], case["labels"].flip(0)])
    with pytest.raises(ValueError, match=r"labels must be the same for all that torch\.func\.vmap runs over"):
        torch.func.vmap(lambda labels: contrastive_loss(features, labels, backend="dense"))(labels)


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("over", ["features", "prototypes"])
def test_vmap_on_another_backend_is_refused(backend: str, over: str) -> None:
    loss = loss_of(small_case(), backend=backend)
    features, prototypes = torch.randn(4, 9, 3), torch.randn(5, 3)
    in_dims = (0, None)
    if over == "prototypes":
        features, prototypes, in_dims = torch.randn(9, 3), torch.randn(4, 5, 3), (None, 0)
    name = "tiled" if backend == "auto" else backend
    with pytest.raises(
        RuntimeError, match=rf"backend='{name}' does not run under torch\.func(\.vmap)?; use backend='dense'"
    ):
        torch.func.vmap(loss, in_dims=in_dims)(features, prototypes)


@pytest.mark.parametrize("backend", ["dense", "tiled", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_backward_inside_autocast_gives_the_same_gradient(backend: str, reduction: str, normalize: bool) -> None:
    temperature = 0.1 if normalize else 2.0
    case = draw_case(40, 64, class_average=True, rebalance=True, normalize=normalize, temperature=temperature)
    outside, inside = case.to(torch.float32), case.to(torch.float32)
    run(outside, backend, reduction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(inside, backend, reduction)
    for one, other in zip(outside.gradients(), inside.gradients(), strict=True):
        assert torch.equal(one, other)


def test_a_second_derivative_inside_autocast_is_the_same() -> None:
    case = draw_case(20, 16, class_average=True).to(torch.float32)
    (gradient,) = torch.autograd.grad(run_loss(case, "dense"), case["features"], create_graph=True)
    (outside,) = torch.autograd.grad(gradient.pow(2).sum(), case["features"], retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(gradient.pow(2).sum(), case["features"])
    assert torch.equal(inside, outside)


class Graphs:
    """A backend of torch.compile that counts the graphs that are run eagerly."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    def compiled(self, loss: Loss, backend: str = "aot_eager") -> Loss:
        return torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)

    @property
    def count(self) -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@functools.cache
def graphs_of_a_number() -> int:
    """How many graphs PyTorch makes of code with a number that changes: 2.7's first one holds its value."""
    graphs = Graphs()
    compiled = graphs.compiled(lambda rows, number: rows * number)
    for number in (0.1, 0.2, 0.3):
        compiled(torch.ones(2), number)
    return graphs.count


def assert_compiled_is_eager(compiled: Loss, loss: Loss, case: Case, tolerance: float = 1e-12, **options: Any) -> None:
    ours, theirs = case.to(torch.float64), case.to(torch.float64)
    for each, one in ((compiled, ours), (loss, theirs)):
        each(**one, **options).sum().backward()
    for one, other in zip(ours.gradients(), theirs.gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("backend", "reduction", "prototypes"),
    [
        ("dense", "mean", True),
        ("dense", "none", True),
        ("tiled", "mean", True),
        pytest.param("tiled", "none", True, marks=pytest.mark.slow),
        pytest.param("tiled", "mean", False, marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_all_batch_sizes_and_temperatures(backend: str, reduction: str, prototypes: bool) -> None:
    expected, graphs = graphs_of_a_number(), Graphs()

    def loss(temperature: float, **case: Any) -> Tensor:
        return contrastive_loss(**case, temperature=temperature, backend=backend, reduction=reduction)

    compiled = graphs.compiled(loss)
    for n, temperature in ((40, 0.1), (23, 0.07), (9, 0.3), (5, 1e-3), (64, 1e5), (12, 0.015)):
        case = draw_case(n, 8, class_average=True, rebalance=True, prototypes=prototypes)
        assert_compiled_is_eager(compiled, loss, case, temperature=temperature)
        assert graphs.count == (1 if temperature == 0.1 else expected), (n, temperature)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_for_each_number_of_chunks(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.CHUNK_BYTES, "cpu", 20_000)
    graphs = Graphs()

    def loss(**case: Any) -> Tensor:
        return contrastive_loss(**case, backend="tiled", reduction=reduction)

    compiled = graphs.compiled(loss)
    for n, expected in ((20, 1), (40, 2), (30, 2), (41, 2), (25, 2)):  # one chunk up to 31 anchors, and then two
        assert_compiled_is_eager(compiled, loss, draw_case(n, 8, class_average=True))
        assert graphs.count == expected, n


@pytest.mark.slow
def test_one_graph_of_a_module_whose_temperature_changes() -> None:
    expected, graphs = graphs_of_a_number(), Graphs()
    criterion = ContrastiveLoss.preset("bcl_rcl", torch.arange(9, 0, -1))
    compiled = graphs.compiled(criterion)
    case = draw_case(30, 8)
    for temperature in (0.1, 0.2, 0.05):
        criterion.temperature = temperature
        torch.testing.assert_close(
            compiled(case["features"], case["labels"], case["prototypes"]),
            criterion(case["features"], case["labels"], case["prototypes"]),
        )
        assert graphs.count == (1 if temperature == 0.1 else expected)


def test_a_wrong_temperature_is_refused_in_compiled_code_too() -> None:
    graphs = Graphs()
    case = draw_case(20, 8)

    def loss(temperature: float) -> Tensor:
        return contrastive_loss(case["features"], case["labels"], temperature=temperature, backend="dense")

    compiled = graphs.compiled(loss)
    assert compiled(0.1).isfinite()
    for wrong in (0.0, -1.0, 1e-40, float("nan")):
        with pytest.raises(Exception, match=r"temperature must be above 0|Invalid NaN|Observed exception"):
            compiled(wrong)


@pytest.mark.parametrize("backend", ["dense", pytest.param("tiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_refuses_second_derivatives(backend: str, compiler: str) -> None:
    """In PyTorch's words: for create_graph, or where the gradient is differentiated."""
    case = draw_case(20, 8)
    compiled = Graphs().compiled(loss_of(case, backend=backend), compiler)
    loss = compiled(case["features"], case["prototypes"]) + case["features"].pow(3).sum()
    with pytest.raises(RuntimeError, match=r"requires create_graph=False|does not currently support double backward"):
        torch.autograd.grad(loss, case["features"], create_graph=True)[0].pow(2).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inductor_where_there_are_as_many_anchors_as_classes(backend: str, reduction: str) -> None:
    def loss(**case: Any) -> Tensor:
        return contrastive_loss(**case, backend=backend, reduction=reduction)

    compiled = Graphs().compiled(loss, "inductor")
    for n in (9, 20):
        assert_compiled_is_eager(compiled, loss, draw_case(n, 8, class_average=True, rebalance=True), 1e-10)


@pytest.mark.slow
def test_inductor_counts_keys_where_there_are_as_many_anchors_as_classes() -> None:
    """The part at which Inductor failed, without the minute that all of it takes."""
    from rcl_fast.batch import ContrastiveBatch

    labels = torch.tensor([0, 1, 0, 2])
    batch = ContrastiveBatch(torch.ones(4, 2), labels, torch.ones(4, 2), None, None, 4, 0.1, True, True)
    assert torch.compile(keys_per_class, fullgraph=True, dynamic=True)(batch).tolist() == [3, 2, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_inductor_with_a_single_anchor(reduction: str, normalize: bool) -> None:
    def loss(**case: Any) -> Tensor:
        return contrastive_loss(**case, backend="tiled", reduction=reduction)

    case = draw_case(1, 5, 4, class_average=True, normalize=normalize)
    compiled = Graphs().compiled(loss, "inductor")
    torch.testing.assert_close(compiled(**case), loss(**case), rtol=1e-12, atol=1e-12)
    assert_compiled_is_eager(compiled, loss, case)


@pytest.mark.parametrize("name", ["class_counts", "compression"])
def test_a_gradient_by_what_belongs_to_the_classes_is_right_or_refused(processes: Processes, name: str) -> None:
    case = small_case(compression=True)
    case[name] = case[name].double().requires_grad_()
    gradients = [torch.autograd.grad(run_loss(case, backend), case[name])[0] for backend in TWICE]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=f"{name} must not require grad.*backend='dense'"):
        run_loss(case, "tiled")
    with torch.no_grad():
        assert run_loss(case, "tiled").isfinite()


@pytest.mark.parametrize("changed", ["prototypes", "labels"])
def test_what_changes_in_place_before_the_backward_pass_is_noticed(changed: str) -> None:
    case = small_case(normalize=False, temperature=1.0)
    case["prototypes"] = case["prototypes"].detach()
    loss = run_loss(case, "tiled", reduction="none")
    case[changed].copy_(case[changed].flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def changed_together(group: ProcessGroup, case: Case, sizes: list[int], name: str, options: dict[str, Any]) -> str:
    part = local_part(case, sizes, rank_of(group))
    loss = contrastive_loss(**part, group=group, **options)
    part[name].detach().mul_(2)  # also of a leaf
    try:
        loss.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("name", ["class_counts", "compression"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_changes_in_place_is_noticed_with_a_group_too(processes: Processes, name: str, reduction: str) -> None:
    case = small_case(compression=True)
    for answer in processes.run(2, changed_together, case, [5, 4], name, {"reduction": reduction}):
        assert "modified by an inplace operation" in answer


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_torch_func_on_tiled_is_refused(transform: Callable[..., Any]) -> None:
    case = small_case()
    loss = loss_of(case, backend="auto")
    with pytest.raises(RuntimeError, match=r"backend='tiled' does not run under torch\.func; use backend='dense'"):
        transform(lambda features: loss(features, case["prototypes"]))(case["features"].detach())
