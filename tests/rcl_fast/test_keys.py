"""More keys than anchors and prototypes: a scalar program's numbers, what they must equal, and how they compile."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import Case, draw_case
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_program import Answer, Problem, solve
from test_functional import assert_equals_reference, assert_same, run, several_chunks  # noqa: F401
from torch import Tensor

from rcl_fast import ContrastiveLoss, contrastive_loss
from rcl_fast.backends import dense, reference, tiled

FAST = ["dense", "tiled"]
BACKENDS = ["reference", *FAST]
MODULES = {"dense": dense, "reference": reference, "tiled": tiled}
COMBINATIONS = list(itertools.product([False, True], repeat=6))
WEIGHTS = torch.linspace(-1, 2, 9, dtype=torch.float64)


def worked_case(prototypes: bool, rebalance: bool, compression: bool, **options: Any) -> Case:
    """Classes that only anchors have (2, of a single one), only keys (4), both, and none (3)."""
    case = draw_case(
        9, 3, 5, keys=6, prototypes=prototypes, rebalance=rebalance, compression=compression, temperature=0.5, **options
    )
    case["labels"] = torch.tensor([0, 1, 0, 2, 1, 0, 0, 1, 1])
    case["key_labels"] = torch.tensor([1, 4, 0, 1, 4, 1])
    return case


def problem_of(case: Case) -> Problem:
    def numbers(name: str) -> Any:
        return [] if case.get(name) is None else case[name].tolist()

    return Problem(
        anchors=numbers("features"),
        labels=numbers("labels"),
        keys=numbers("keys"),
        key_labels=numbers("key_labels"),
        prototypes=numbers("prototypes"),
        class_counts=numbers("class_counts") if case["rebalance"] else None,
        compression=numbers("compression") or None,
        temperature=case["temperature"],
        class_average=case["class_average"],
        normalize=case["normalize"],
        anchors_are_keys=case["anchors_are_keys"],
    )


def assert_is(answer: Answer, case: Case, losses: Tensor, tolerance: float = 1e-12) -> None:
    """The losses, and the gradients that are in the case's leaves."""
    torch.testing.assert_close(losses, torch.tensor(answer.losses, dtype=torch.float64), rtol=tolerance, atol=tolerance)
    by_features, by_keys, by_prototypes = answer.gradients
    exact = [by_features, *([by_prototypes] if by_prototypes else []), by_keys]
    for ours, numbers in zip(case.gradients(), exact, strict=True):
        expected = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda flags: "".join("01"[flag] for flag in flags))
def test_worked_cases(backend: str, options: tuple[bool, ...]) -> None:
    prototypes, rebalance, compression, class_average, normalize, anchors_are_keys = options
    case = worked_case(
        *(prototypes, rebalance, compression),
        class_average=class_average,
        normalize=normalize,
        anchors_are_keys=anchors_are_keys,
    )
    of_mean, each = case.to(torch.float64), case.to(torch.float64)
    answer = solve(problem_of(case))
    mean = run(of_mean, backend)
    assert_is(answer, of_mean, torch.tensor(answer.losses, dtype=torch.float64))
    expected = sum(answer.losses) / sum(count > 0 for count in answer.positives)
    assert mean.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    answer = solve(problem_of(case), WEIGHTS.tolist())
    assert_is(answer, each, run(each, backend, "none", WEIGHTS))


def test_the_scalar_programs_gradients_are_those_of_its_losses() -> None:
    """By central differences: of h = 1e-5, h² of the third derivative and a rounding over h are below 1e-8."""
    case = worked_case(True, True, True, class_average=True, normalize=True, anchors_are_keys=True)
    problem = problem_of(case)
    weights, h = WEIGHTS.tolist(), 1e-5
    for rows, slopes in zip(
        (problem.anchors, problem.keys, problem.prototypes), solve(problem, weights).gradients, strict=True
    ):
        for row, slope in zip(rows, slopes, strict=True):
            for d, number in enumerate(row):
                totals = []
                for row[d] in (number + h, number - h):
                    losses = solve(problem, weights).losses
                    totals.append(sum(weight * loss for weight, loss in zip(weights, losses, strict=True)))
                row[d] = number
                assert slope[d] == pytest.approx((totals[0] - totals[1]) / (2 * h), abs=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """One anchor at 1, keys at 1 and 2 of its class and at −1 of another; T = 1."""
    one, zero, two = torch.ones(1, 1).double(), torch.zeros(1).long(), torch.tensor([[1.0], [2.0], [-1.0]]).double()
    options = {"normalize": False, "temperature": 1.0, "key_labels": torch.tensor([0, 0, 1]), "backend": backend}
    loss = contrastive_loss(one, zero, keys=two, **options)
    assert loss.item() == pytest.approx(math.log(math.e + math.e**2 + 1 / math.e) - 1.5, rel=1e-12)
    averaged = contrastive_loss(one, zero, keys=two, class_average=True, anchors_are_keys=False, **options)
    assert averaged.item() == pytest.approx(math.log((math.e + math.e**2) / 2 + 1 / math.e) - 1.5, rel=1e-12)


@settings(max_examples=40)
@given(
    n=st.integers(0, 30),
    keys=st.integers(0, 60),
    dimensions=st.integers(1, 20),
    classes=st.integers(1, 100),
    seed=st.integers(0, 10_000),
    flags=st.tuples(*[st.booleans()] * 5),
    backend=st.sampled_from(FAST),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_any_shape_equals_the_reference(
    n: int, keys: int, dimensions: int, classes: int, seed: int, flags: tuple[bool, ...], backend: str, reduction: str
) -> None:
    names = ("prototypes", "class_average", "rebalance", "normalize", "anchors_are_keys")
    options = dict(zip(names, flags, strict=True))
    case = draw_case(n, dimensions, classes, seed=seed, keys=keys, temperature=0.5, **options)
    assert_equals_reference(case, backend, reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("prototypes", [False, True])
def test_an_empty_queue_is_no_queue(backend: str, reduction: str, prototypes: bool) -> None:
    case = draw_case(20, 5, keys=0, prototypes=prototypes, class_average=True, rebalance=True)
    without = case.to(torch.float64)
    del without["keys"], without["key_labels"]
    assert torch.equal(run(case, backend, reduction), run(without, backend, reduction))
    for ours, expected in zip(case.gradients()[:-1], without.gradients(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_empty_queue_alone_gives_zero(backend: str, reduction: str) -> None:
    case = draw_case(20, 5, keys=0, prototypes=False, anchors_are_keys=False, class_average=True)
    assert not run(case, backend, reduction).any()
    assert not case["features"].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=3)))
def test_half_of_the_anchors_as_keys_give_the_other_half_the_same_losses(
    backend: str, options: tuple[bool, bool, bool]
) -> None:
    prototypes, rebalance, class_average = options
    case = draw_case(30, 6, prototypes=prototypes, rebalance=rebalance, class_average=class_average, compression=True)
    half = case.to(torch.float64)
    half["features"], half["keys"] = case["features"].detach()[:18], case["features"].detach()[18:]
    half["labels"], half["key_labels"] = case["labels"][:18], case["labels"][18:]
    torch.testing.assert_close(
        contrastive_loss(**half, reduction="none", backend=backend),
        contrastive_loss(**case, reduction="none", backend=backend)[:18],
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_anchors_that_are_their_own_keys_meet_themselves(backend: str) -> None:
    """Without the anchors' exclusion the loss is one over the whole matrix, its diagonal included."""
    case = draw_case(20, 6, prototypes=False, anchors_are_keys=False)
    h = torch.nn.functional.normalize(case["features"].detach())
    s = h @ h.T / 0.1
    same = (case["labels"][:, None] == case["labels"]).double()
    expected = s.logsumexp(dim=1) - (s * same).sum(dim=1) / same.sum(dim=1)
    case |= {"keys": case["features"].detach(), "key_labels": case["labels"]}
    torch.testing.assert_close(contrastive_loss(**case, reduction="none", backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("anchors_are_keys", [False, True])
def test_prototypes_are_keys_of_each_class(backend: str, anchors_are_keys: bool) -> None:
    case = draw_case(20, 6, rebalance=True, class_average=True, anchors_are_keys=anchors_are_keys)
    as_keys = case.to(torch.float64)
    as_keys |= {"keys": as_keys["prototypes"], "key_labels": torch.arange(9), "prototypes": None}
    torch.testing.assert_close(run(as_keys, backend), run(case, backend))
    assert_same(as_keys, case)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("anchors_are_keys", [False, True])
def test_gradcheck(backend: str, reduction: str, anchors_are_keys: bool) -> None:
    case = draw_case(8, 4, 5, keys=6, class_average=True, rebalance=True, anchors_are_keys=anchors_are_keys)
    leaves = [case.pop(name) for name in ("features", "prototypes", "keys")]

    def loss(features: Tensor, prototypes: Tensor, keys: Tensor) -> Tensor:
        return contrastive_loss(
            features, prototypes=prototypes, keys=keys, backend=backend, reduction=reduction, **case
        )

    assert torch.autograd.gradcheck(loss, leaves)
    if backend == "dense" and reduction == "mean":
        assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_keys_that_need_no_gradient_get_none_and_change_no_other(backend: str, reduction: str) -> None:
    case = draw_case(24, 10, keys=15, class_average=True)
    both, one = case.to(torch.float64), case.to(torch.float64)
    one["keys"] = one["keys"].detach()
    run(both, backend, reduction)
    run(one, backend, reduction)
    assert one["keys"].grad is None
    for name in ("features", "prototypes"):
        torch.testing.assert_close(one[name].grad, both[name].grad)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keys_of_another_dtype(backend: str, dtype: torch.dtype) -> None:
    case = draw_case(24, 10, keys=15, class_average=True).to(torch.float32)
    case["keys"] = case["keys"].detach().to(dtype).requires_grad_()
    loss = run(case, backend)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert [gradient.dtype for gradient in case.gradients()] == [torch.float32, torch.float32, dtype]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("anchors_are_keys", [False, True])
def test_error_is_that_of_plain_pytorch_in_the_same_dtype(
    reduction: str, dtype: torch.dtype, anchors_are_keys: bool
) -> None:
    options = {"class_average": True, "rebalance": True, "anchors_are_keys": anchors_are_keys}
    rounded = draw_case(60, 130, 25, keys=70, **options).to(dtype)
    truth = rounded.to(torch.float64)
    plain, ours = truth.to(dtype), truth.to(dtype)
    values = [run(truth, "reference", reduction), run(plain, "dense", reduction), run(ours, "tiled", reduction)]
    triples = [values, *zip(truth.gradients(), plain.gradients(), ours.gradients(), strict=True)]
    for exact, by_plain, by_ours in triples:
        rounding = torch.finfo(by_ours.dtype).eps * exact.abs().max()
        assert (by_ours - exact).abs().max() <= 2 * (by_plain - exact).abs().max() + rounding


def test_labels_may_be_any_integers_where_nothing_counts_the_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    features, keys = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (8, 6))
    labels, key_labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3]), torch.tensor([3, 1, 0, 4, 0, 4])
    large = torch.tensor([-7, 2**62 + 1, 5, 2**62, 99])
    for backend, average in itertools.product(BACKENDS, [False, True]):
        options = {"class_average": average, "backend": backend, "keys": keys}
        torch.testing.assert_close(
            contrastive_loss(features, large[labels], key_labels=large[key_labels].clone(), **options),
            contrastive_loss(features, labels, key_labels=key_labels.int(), class_counts=[1] * 5, **options),
        )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_zero_rows_of_keys_are_finite(backend: str, reduction: str) -> None:
    case = draw_case(20, 8, keys=9, class_average=True)
    with torch.no_grad():
        case["keys"][4] = 0
    assert run(case, backend, reduction).isfinite().all()
    assert all(gradient.isfinite().all() for gradient in case.gradients())


@pytest.mark.parametrize("over", ["keys", "features"])
def test_vmap_over_keys(over: str) -> None:
    case = draw_case(9, 3, 5, keys=6, class_average=True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, *case[over].shape, generator=generator, dtype=torch.float64)
    rest = {name: value.detach() if isinstance(value, Tensor) else value for name, value in case.items()}
    del rest[over]

    def loss(rows: Tensor) -> Tensor:
        return contrastive_loss(**rest, **{over: rows}, backend="dense")

    def gradient(rows: Tensor) -> Tensor:
        return torch.func.grad(loss)(rows)

    for function in (loss, gradient):
        torch.testing.assert_close(torch.func.vmap(function)(rows), torch.stack([function(row) for row in rows]))


def test_what_torch_func_may_not_transform_is_refused() -> None:
    case = draw_case(9, 3, 5, keys=6)
    keys, key_labels = case.pop("keys").detach(), case.pop("key_labels")
    with pytest.raises(RuntimeError, match=r"backend='tiled' does not run under torch\.func; use backend='dense'"):
        torch.func.grad(lambda keys: contrastive_loss(**case, keys=keys, key_labels=key_labels))(keys)
    with pytest.raises(ValueError, match=r"key_labels must be the same for all that torch\.func\.vmap runs over"):
        torch.func.vmap(lambda labels: contrastive_loss(**case, keys=keys, key_labels=labels, backend="dense"))(
            torch.stack([key_labels, key_labels.flip(0)])
        )


def test_tiled_has_first_derivatives_only() -> None:
    case = draw_case(9, 3, 5, keys=6)
    (gradient,) = torch.autograd.grad(contrastive_loss(**case), case["keys"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend='tiled' has first derivatives only.*backend='dense'"):
        gradient.pow(2).sum().backward()


@pytest.mark.parametrize("anchors_are_keys", [False, True])
def test_a_queue_that_changes_before_the_backward_pass_is_noticed_or_was_copied(anchors_are_keys: bool) -> None:
    case = draw_case(9, 3, 5, keys=6, normalize=False, temperature=1.0, anchors_are_keys=anchors_are_keys)
    case["keys"] = case["keys"].detach()
    expected = case.to(torch.float64)
    expected["keys"] = case["keys"]
    run(expected, "tiled")
    mean, of_labels, of_keys = (
        contrastive_loss(**case, backend="tiled", reduction=reduction) for reduction in ("mean", "none", "none")
    )
    case["key_labels"].copy_(case["key_labels"].flip(0))
    of_labels.mean().backward()
    assert_same(case, expected)
    case["features"].grad = case["prototypes"].grad = None
    case["keys"].mul_(2)
    mean.backward()  # its gradient was made with the loss
    assert_same(case, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_keys.mean().backward()


@pytest.mark.parametrize("backend", FAST)
def test_part_of_the_anchors_as_one_of_several_processes_has_it(backend: str) -> None:
    """The protocol: gradients of the first features, then of prototypes and keys, their terms of the first anchors."""
    from rcl_fast.functional import _checked_batch, _with_keys

    case = draw_case(20, 5, keys=7, class_average=True)
    whole = case.to(torch.float64)
    first = torch.arange(20) < 8
    grad_output = torch.linspace(-1, 2, 20, dtype=torch.float64)
    run(whole, backend, "none", grad_output * first)
    options = {"temperature": 0.1, "class_average": True, "rebalance": False, "normalize": True, "validate": False}
    batch = _checked_batch(
        case["features"], case["labels"], class_counts=None, prototypes=case["prototypes"], compression=None, **options
    )
    batch = _with_keys(batch, case["keys"], case["key_labels"], True, False)
    module: Any = MODULES[backend]
    softmax = module.forward_rows(batch, 20).softmax
    part = module.forward_rows(batch, 8)
    assert len(part.losses) == 8
    assert part.positives.tolist() == solve(problem_of(Case(case | options, anchors_are_keys=True))).positives
    for_features, for_prototypes, for_keys = module.backward_rows(batch, 8, part.saved, softmax, grad_output)
    run_all = case.to(torch.float64)
    run(run_all, backend, "none", grad_output)
    torch.testing.assert_close(for_features, run_all["features"].grad[:8])
    torch.testing.assert_close(for_prototypes, whole["prototypes"].grad)
    torch.testing.assert_close(for_keys, whole["keys"].grad)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("backend", "reduction", "anchors_are_keys", "compiler"),
    [
        ("dense", "mean", False, "aot_eager"),
        pytest.param("tiled", "mean", False, "aot_eager", marks=SLOW),
        pytest.param("tiled", "none", False, "aot_eager", marks=SLOW),
        pytest.param("tiled", "mean", True, "aot_eager", marks=SLOW),
        pytest.param("tiled", "none", True, "aot_eager", marks=SLOW),
        pytest.param("dense", "mean", True, "aot_eager", marks=SLOW),
        pytest.param("tiled", "mean", True, "inductor", marks=SLOW),
        pytest.param("tiled", "mean", False, "inductor", marks=SLOW),
    ],
)
def test_one_graph_for_all_sizes_of_batch_and_queue(
    backend: str, reduction: str, anchors_are_keys: bool, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiled.CHUNK_BYTES, "cpu", 10**7)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def loss(**case: Any) -> Tensor:
        return contrastive_loss(**case, backend=backend, reduction=reduction)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    options = {"class_average": True, "rebalance": True, "anchors_are_keys": anchors_are_keys}
    for n, keys in ((20, 30), (13, 41), (50, 17), (8, 90)):
        ours = draw_case(n, 8, prototypes=anchors_are_keys, keys=keys, **options)
        theirs = ours.to(torch.float64)
        for function, case in ((compiled, ours), (loss, theirs)):
            function(**case).sum().backward()
        assert_same(ours, theirs, 1e-10)
    if compiler == "aot_eager":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_module_takes_keys() -> None:
    case = draw_case(20, 5, keys=7, rebalance=True, class_average=True)
    criterion = ContrastiveLoss.preset("bcl_rcl", case["class_counts"])
    rows = [case[name] for name in ("features", "labels", "prototypes", "keys", "key_labels")]
    assert criterion(*rows) == contrastive_loss(**case)
    criterion = ContrastiveLoss.preset("bcl_rcl", case["class_counts"], anchors_are_keys=False)
    assert criterion(*rows) == contrastive_loss(**case, anchors_are_keys=False)
    assert "anchors_are_keys=False" in repr(criterion)
    assert "compression" not in criterion.state_dict()
