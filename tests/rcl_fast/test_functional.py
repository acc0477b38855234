"""The loss beyond the golden cases: shapes, dtypes, gradients, traps."""

import itertools

import pytest
import torch
from cases import Case, draw_case
from hypothesis import given, settings
from hypothesis import strategies as st

from rcl_fast import ContrastiveLoss, contrastive_loss

FAST = ["dense", "tiled"]
COMBINATIONS = list(itertools.product([False, True], repeat=4))


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes must still exceed one chunk."""
    from rcl_fast.backends import tiled

    monkeypatch.setitem(tiled.CHUNK_BYTES, "cpu", 9_000)


def run(case: Case, backend: str, reduction: str = "mean", grad_output: torch.Tensor | None = None) -> torch.Tensor:
    loss = contrastive_loss(**case, backend=backend, reduction=reduction)
    loss.backward(grad_output if grad_output is not None else torch.ones_like(loss))
    return loss.detach()


def assert_same(case: Case, other: Case, tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(case.gradients(), other.gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def assert_equals_reference(case: Case, backend: str, reduction: str) -> None:
    """In float64, losses and gradients."""
    ours, oracle = case.to(torch.float64), case.to(torch.float64)
    torch.testing.assert_close(
        run(ours, backend, reduction), run(oracle, "reference", reduction), rtol=1e-10, atol=1e-10
    )
    assert_same(ours, oracle, 1e-10)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("prototypes", "compression", "class_average", "rebalance"), COMBINATIONS)
def test_every_combination_equals_the_reference(
    backend: str, reduction: str, prototypes: bool, compression: bool, class_average: bool, rebalance: bool
) -> None:
    case = draw_case(prototypes=prototypes, compression=compression, class_average=class_average, rebalance=rebalance)
    ours, oracle = case.to(torch.float64), case.to(torch.float64)
    weights = torch.linspace(-1, 2, 60, dtype=torch.float64) if reduction == "none" else torch.tensor(3.0).double()
    torch.testing.assert_close(
        run(ours, backend, reduction, weights), run(oracle, "reference", reduction, weights), rtol=1e-12, atol=1e-12
    )
    assert_same(ours, oracle)


@settings(max_examples=40)
@given(
    n=st.integers(0, 40),
    dimensions=st.integers(1, 33),
    classes=st.integers(1, 50),
    seed=st.integers(0, 10_000),
    prototypes=st.booleans(),
    class_average=st.booleans(),
    rebalance=st.booleans(),
    backend=st.sampled_from(FAST),
    reduction=st.sampled_from(["mean", "none"]),
)
def test_any_shape_and_class_distribution(
    n: int,
    dimensions: int,
    classes: int,
    seed: int,
    prototypes: bool,
    class_average: bool,
    rebalance: bool,
    backend: str,
    reduction: str,
) -> None:
    case = draw_case(
        n, dimensions, classes, seed=seed, prototypes=prototypes, class_average=class_average, rebalance=rebalance
    )
    assert_equals_reference(case, backend, reduction)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend: str, reduction: str) -> None:
    case = draw_case(14, 5, 6, class_average=True, rebalance=True, compression=True)
    options = {name: case[name] for name in ("labels", "class_counts", "compression", "class_average", "rebalance")}

    def loss(features: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(features, prototypes=prototypes, backend=backend, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, (case["features"], case["prototypes"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_is_that_of_plain_pytorch_in_the_same_dtype(dtype: torch.dtype, reduction: str) -> None:
    rounded = draw_case(90, 130, 25, class_average=True, rebalance=True).to(dtype)
    truth = rounded.to(torch.float64)
    plain, ours = truth.to(dtype), truth.to(dtype)
    values = [run(truth, "reference", reduction), run(plain, "dense", reduction), run(ours, "tiled", reduction)]
    triples = [values, *zip(truth.gradients(), plain.gradients(), ours.gradients(), strict=True)]
    for exact, by_plain, by_ours in triples:
        rounding = torch.finfo(by_ours.dtype).eps * exact.abs().max()
        assert (by_ours - exact).abs().max() <= 2 * (by_plain - exact).abs().max() + rounding
    assert values[2].dtype == torch.float32
    assert ours["features"].grad.dtype == dtype


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_views_stacked_are_the_flat_batch(backend: str) -> None:
    case = draw_case(20, 6, class_average=True, rebalance=True)
    stacked = case.to(torch.float64)
    stacked["features"] = case["features"].detach().reshape(10, 2, 6)
    stacked["labels"] = case["labels"][::2]
    flat = case.to(torch.float64)
    flat["labels"] = stacked["labels"].repeat_interleave(2)
    torch.testing.assert_close(
        contrastive_loss(**stacked, backend=backend, reduction="none"),
        contrastive_loss(**flat, backend=backend, reduction="none"),
    )


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("prototypes", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_gives_zero(backend: str, prototypes: bool, reduction: str) -> None:
    case = draw_case(0, 4, prototypes=prototypes, class_average=True)
    loss = contrastive_loss(**case, backend=backend, reduction=reduction)
    assert loss.sum() == 0
    loss.sum().backward()
    assert all(gradient is None or not gradient.any() for gradient in case.gradients())


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("n", [1, 5])
def test_anchors_without_a_positive_are_left_out(backend: str, reduction: str, n: int) -> None:
    case = draw_case(n, 4, classes=8, prototypes=False, class_average=True, rebalance=True)
    case["labels"] = torch.arange(n)
    loss = run(case, backend, reduction)
    assert not loss.any()
    assert not case["features"].grad.any()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_mean_is_over_the_anchors_that_have_a_positive(backend: str) -> None:
    case = draw_case(6, 4, classes=4, prototypes=False, rebalance=True)
    case["labels"] = torch.tensor([0, 0, 0, 1, 2, 3])
    losses = contrastive_loss(**case, reduction="none", backend=backend)
    assert losses[:3].all()
    assert not losses[3:].any()
    torch.testing.assert_close(contrastive_loss(**case, backend=backend), losses[:3].mean())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_zero_rows_give_finite_losses_and_gradients(backend: str, dtype: torch.dtype, reduction: str) -> None:
    case = draw_case(30, 8, class_average=True, rebalance=True)
    with torch.no_grad():
        case["features"][3] = 0
        case["prototypes"][0] = 0
    case = case.to(dtype)
    loss = run(case, backend, reduction)
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() and gradient.abs().max() < 100 for gradient in case.gradients())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_low_temperatures_do_not_overflow(reduction: str) -> None:
    case = draw_case(30, 8, class_average=True, rebalance=True, temperature=1e-3)
    ours, oracle = case.to(torch.float32), case.to(torch.float64)
    torch.testing.assert_close(
        run(ours, "tiled", reduction).double(), run(oracle, "reference", reduction), rtol=1e-4, atol=1e-2
    )
    assert all(gradient.isfinite().all() for gradient in ours.gradients())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_features_and_grad_output(backend: str, reduction: str) -> None:
    case = draw_case(24, 10, class_average=True)
    strided, plain = case.to(torch.float64), case.to(torch.float64)
    strided["features"] = torch.stack([case["features"].detach()] * 2, dim=-1)[..., 0].requires_grad_()
    strided["prototypes"] = case["prototypes"].detach().T.contiguous().T.requires_grad_()
    assert not strided["features"].is_contiguous()
    grad_output = torch.randn(24, 3, dtype=torch.float64)[:, 1] if reduction == "none" else torch.tensor(-2.5).double()
    run(strided, backend, reduction, grad_output)
    run(plain, backend, reduction, grad_output.clone())
    assert_same(strided, plain)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["features", "prototypes"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(backend: str, reduction: str, frozen: str) -> None:
    case = draw_case(24, 10, class_average=True)
    both, one = case.to(torch.float64), case.to(torch.float64)
    one[frozen] = one[frozen].detach()
    run(both, backend, reduction)
    run(one, backend, reduction)
    other = "prototypes" if frozen == "features" else "features"
    assert one[frozen].grad is None
    torch.testing.assert_close(one[other].grad, both[other].grad)


@pytest.mark.parametrize("backend", FAST)
def test_mixed_dtypes(backend: str) -> None:
    case = draw_case(24, 10, class_average=True).to(torch.float32)
    case["features"] = case["features"].detach().bfloat16().requires_grad_()
    loss = run(case, backend)
    assert loss.dtype == torch.float32
    assert case["features"].grad.dtype == torch.bfloat16
    assert case["prototypes"].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", FAST)
def test_autocast_does_not_touch_the_similarities(backend: str) -> None:
    case = draw_case(40, 64, class_average=True, rebalance=True).to(torch.float32)
    outside = contrastive_loss(**case, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(**case, backend=backend)
    assert inside.item() == outside.item()


def test_labels_may_be_any_integers_where_nothing_counts_the_classes() -> None:
    features = torch.randn(12, 5, dtype=torch.float64)
    small = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 3, 0])
    large = torch.tensor([-7, 10**12, 5, 99])[small]
    for backend in ["reference", *FAST]:
        for class_average in [False, True]:
            torch.testing.assert_close(
                contrastive_loss(features, large, class_average=class_average, backend=backend),
                contrastive_loss(
                    features, small, class_counts=[1, 1, 1, 1], class_average=class_average, backend=backend
                ),
            )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    case = draw_case(20, 5)
    expected = contrastive_loss(**case)
    case["labels"] = case["labels"].to(dtype)
    assert contrastive_loss(**case) == expected


@pytest.mark.parametrize("backend", FAST)
def test_the_order_of_anchors_does_not_matter(backend: str) -> None:
    case = draw_case(50, 8, class_average=True, rebalance=True)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    shuffled = case.to(torch.float64)
    shuffled["features"], shuffled["labels"] = case["features"].detach()[order], case["labels"][order]
    torch.testing.assert_close(
        contrastive_loss(**shuffled, reduction="none", backend=backend),
        contrastive_loss(**case, reduction="none", backend=backend)[order],
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(backend: str, reduction: str) -> None:
    criterion = ContrastiveLoss.preset("bcl_rcl", torch.arange(9, 0, -1) ** 3 + 1, backend=backend, reduction=reduction)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    case = draw_case(40, 8)
    eager, traced = case.to(torch.float64), case.to(torch.float64)
    for loss, data in ((criterion, eager), (compiled, traced)):
        loss(data["features"], data["labels"], data["prototypes"]).sum().backward()
    assert_same(eager, traced)


def test_two_backward_passes_through_one_graph() -> None:
    case = draw_case(20, 8)
    loss = contrastive_loss(**case)
    loss.backward(retain_graph=True)
    once = case["features"].grad.clone()
    loss.backward()
    torch.testing.assert_close(case["features"].grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_grad_gives_the_same_value_in_the_same_dtype(dtype: torch.dtype) -> None:
    case = draw_case(20, 8, class_average=True).to(dtype)
    with_grad = contrastive_loss(**case)
    with torch.no_grad():
        torch.testing.assert_close(contrastive_loss(**case), with_grad.detach())
