"""16-bit products: `tiled` as it runs on a GPU's tensor cores, the products being made on the CPU."""

from __future__ import annotations

import pytest
import torch
from cases import Case, draw_case
from test_functional import run

from rcl_fast.backends import tiled, tiled_keys


@pytest.fixture(autouse=True)
def products_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that were multiplied; cuBLAS's product into float32 exists for CUDA only."""
    multiplied = []

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        multiplied.extend((left.dtype, right.dtype))
        return left.float() @ right.float()

    def on_tensor_cores(batch: tiled_keys.ContrastiveBatch) -> bool:
        return batch.features.dtype in (torch.float16, torch.bfloat16)

    monkeypatch.setattr(tiled_keys, "_product", product)
    for module in (tiled_keys, tiled):
        monkeypatch.setattr(module, "multiplies_16_bits", on_tensor_cores)
    monkeypatch.setitem(tiled.CHUNK_BYTES, "cpu", 9_000)  # several chunks
    return multiplied


def in_the_inputs_dtype(case: Case, reduction: str) -> torch.Tensor:
    """Plain PyTorch with every product in the inputs' dtype, as kernels/README.md compares it."""
    z, c = case["features"], case["prototypes"]
    labels = torch.cat([case["labels"], case.get("key_labels", case["labels"][:0]), torch.arange(len(c))])
    h = torch.nn.functional.normalize(torch.cat([z, case.get("keys", z[:0]), c]), dim=1)
    if case["compression"] is not None:
        h = h * case["compression"].to(h.dtype)[labels, None]
    s = (h[: len(z)] @ h.T).float() / case.get("temperature", 0.1)
    itself = torch.eye(*s.shape, dtype=torch.bool)
    positives = (labels[: len(z), None] == labels) & ~itself
    met = torch.bincount(labels)[labels] - (labels[: len(z), None] == labels).int()
    b = case["class_counts"].float().log()[labels] - met.clamp(min=1).log()
    lse = torch.logsumexp((s + b).masked_fill(itself, -torch.inf), 1)
    mean = (s * positives).sum(1) / positives.sum(1)
    losses = lse - mean - case["class_counts"].float().log()[labels[: len(z)]]
    loss = losses if reduction == "none" else losses.mean()
    loss.backward(torch.ones_like(loss))
    return loss.detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compression", [False, True])
@pytest.mark.parametrize(("n", "keys"), [(40, None), (150, None), (40, 90)])
def test_error_is_that_of_plain_pytorch_in_the_same_dtype(
    dtype: torch.dtype,
    reduction: str,
    compression: bool,
    n: int,
    keys: int | None,
    products_of_16_bits: list[torch.dtype],
) -> None:
    options = {"class_average": True, "rebalance": True, "compression": compression}
    rounded = draw_case(n, 130, 25, keys=keys, **options).to(dtype)
    truth = rounded.to(torch.float64)
    plain, ours = truth.to(dtype), truth.to(dtype)
    values = [run(truth, "reference", reduction), in_the_inputs_dtype(plain, reduction), run(ours, "tiled", reduction)]
    assert set(products_of_16_bits) == {dtype}
    triples = [values, *zip(truth.gradients(), plain.gradients(), ours.gradients(), strict=True)]
    for exact, by_plain, by_ours in triples:
        rounding = torch.finfo(by_ours.dtype).eps * exact.abs().max()
        assert (by_ours - exact).abs().max() <= 2 * (by_plain - exact).abs().max() + rounding
    assert values[2].dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_the_length_of_a_row_is_outside_the_product(scale: float) -> None:
    case = draw_case(60, 40, 9, class_average=True, rebalance=True).to(torch.float16)
    scaled = case.to(torch.float16)
    with torch.no_grad():
        scaled["features"].mul_(scale)
    rounded = scaled.to(torch.float64)
    loss = run(scaled, "tiled")
    torch.testing.assert_close(loss.double(), run(rounded, "reference"), rtol=1e-5, atol=1e-5)
    assert scaled["features"].grad.isfinite().all()


def test_zero_rows_and_no_prototypes() -> None:
    case = draw_case(30, 8, prototypes=False, class_average=True).to(torch.float16)
    with torch.no_grad():
        case["features"][3] = 0
    assert run(case, "tiled").isfinite()
    assert case["features"].grad.isfinite().all()


def test_small_weights_of_a_large_grad_output_survive() -> None:
    """In float16 a mean over many anchors would be below the smallest number, were it not for the gradient scale."""
    case = draw_case(60, 40, 9, class_average=True).to(torch.float16)
    exact = case.to(torch.float64)
    grad_output = torch.full((60,), 2.0**-30)
    run(case, "tiled", "none", grad_output * 2**15)
    run(exact, "reference", "none", grad_output.double() * 2**15)
    largest = exact["prototypes"].grad.abs().max()
    error = (case["prototypes"].grad.double() - exact["prototypes"].grad).abs().max()
    assert error <= 2**-10 * largest + 2**-24


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("prototypes", [False, True])
def test_anchors_that_are_no_keys(reduction: str, prototypes: bool) -> None:
    """Scales of anchors and of keys are two vectors: 2^-9 for dlogits' rounding, 2^-10 for the gradients'."""
    case = draw_case(60, 40, 9, keys=50, prototypes=prototypes, anchors_are_keys=False, class_average=True)
    case = case.to(torch.float16)
    exact = case.to(torch.float64)
    torch.testing.assert_close(
        run(case, "tiled", reduction).double(), run(exact, "reference", reduction), rtol=1e-5, atol=1e-5
    )
    for ours, theirs in zip(case.gradients(), exact.gradients(), strict=True):
        assert (ours.double() - theirs).abs().max() <= (2**-9 + 2**-10) * theirs.abs().max() + 2**-24


def test_part_of_the_anchors_as_one_of_several_processes_has_it() -> None:
    case = draw_case(60, 40, 9, class_average=True, rebalance=True).to(torch.float16)
    grad_output = torch.linspace(-1, 2, 60)
    losses = run(case, "tiled", "none", grad_output)
    batch = tiled_keys.ContrastiveBatch(
        case["features"].detach(),
        case["labels"],
        case["prototypes"].detach(),
        case["class_counts"],
        None,
        9,
        0.1,
        True,
        True,
    )
    _, softmax, *_ = tiled.forward_rows(batch, 60)
    part, _, _, saved = tiled.forward_rows(batch, 23)
    for_features, *_ = tiled.backward_rows(batch, 23, saved, softmax, grad_output)
    torch.testing.assert_close(part, losses[:23], rtol=0, atol=1e-5)
    # dlogits and gradients are each rounded to 11 bits once, after a scale for each chunk.
    tolerance = 2**-10 * case["features"].grad.abs().max()
    assert (for_features.float() - case["features"].grad[:23].float()).abs().max() <= tolerance


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        (torch.float16, (7, 0), True),
        (torch.bfloat16, (7, 0), False),
        (torch.bfloat16, (8, 0), True),
        (torch.float32, (8, 0), False),
    ],
)
def test_which_gpus_multiply_16_bits(
    dtype: torch.dtype, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tiled_keys, "_MIXED_PRODUCTS", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        features = torch.empty(4, 8, dtype=dtype, device="cuda")
    batch = tiled_keys.ContrastiveBatch(features, None, None, None, None, 0, 0.1, False, True)
    assert tiled_keys.multiplies_16_bits(batch) is expected
    monkeypatch.setattr(tiled_keys, "_MIXED_PRODUCTS", False)  # PyTorch 2.7, or a build for CPUs
    assert tiled_keys.multiplies_16_bits(batch) is False
