"""Every backend against cases worked by an independent scalar-by-scalar program."""

import numpy as np
import pytest
import torch
from cases import Case

from rcl_fast import contrastive_loss

BACKENDS = ["reference", "dense", "tiled"]


def case_of(golden: dict[str, np.ndarray], dtype: torch.dtype) -> Case:
    names = ("features", "labels", "prototypes", "class_counts", "compression")
    options = {name: golden[name].item() for name in ("temperature", "class_average", "rebalance", "normalize")}
    return Case({name: torch.tensor(golden[name]) for name in names if name in golden}, **options).to(dtype)


def errors(golden: dict[str, np.ndarray], dtype: torch.dtype, backend: str) -> dict[str, float]:
    """Largest deviation from the golden values, of the loss per anchor, its mean, and the gradients of both ways."""
    case, per_anchor = case_of(golden, dtype), case_of(golden, dtype)
    mean = contrastive_loss(**case, backend=backend)
    losses = contrastive_loss(**per_anchor, reduction="none", backend=backend)
    mean.backward()
    (losses.sum() / golden["has_positive"].sum()).backward()
    found = {
        "mean": (mean, golden["loss_mean"]),
        "per anchor": (losses, np.where(golden["has_positive"], golden["loss_per_anchor"], 0)),
        "features": (case["features"].grad, golden["grad_features"]),
        "features, per anchor": (per_anchor["features"].grad, golden["grad_features"]),
    }
    if "prototypes" in golden:
        found["prototypes"] = (case["prototypes"].grad, golden["grad_prototypes"])
        found["prototypes, per anchor"] = (per_anchor["prototypes"].grad, golden["grad_prototypes"])
    return {name: np.abs(got.detach().double().numpy() - want).max() for name, (got, want) in found.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_exact(golden: dict[str, np.ndarray], backend: str) -> None:
    worst = errors(golden, torch.float64, backend)
    assert max(worst.values()) < 1e-9, worst


@pytest.mark.parametrize("chunk_bytes", [1, 6_000])  # one row a chunk; some rows and a ragged rest
def test_tiled_is_exact_over_several_chunks(
    golden: dict[str, np.ndarray], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rcl_fast.backends import tiled

    monkeypatch.setitem(tiled.CHUNK_BYTES, "cpu", chunk_bytes)
    worst = errors(golden, torch.float64, "tiled")
    assert max(worst.values()) < 1e-9, worst


def test_float32_dense_stays_within_the_rounding_of_its_dot_products(golden: dict[str, np.ndarray]) -> None:
    # |fl(h·k) - h·k| <= (D + 4) eps |h||k| (Higham, 3.1, and the rounded lengths); the loss adds up to two such errors
    # and a few roundings of its own size.
    D, T = golden["features"].shape[1], golden["temperature"].item()
    norms = 1.0 if golden["normalize"] else np.square(golden["features"]).sum(1).max()
    eps = torch.finfo(torch.float32).eps
    bound = eps * (2 * (D + 4) * norms / T + 8 * np.abs(golden["loss_per_anchor"]).max())
    worst = errors(golden, torch.float32, "dense")
    assert worst["per anchor"] <= bound
    assert worst["mean"] <= bound


def test_float32_tiled_is_as_near_as_plain_pytorch(golden: dict[str, np.ndarray]) -> None:
    """error <= 2 · plain PyTorch's + one rounding of the terms that the result is the difference of."""
    plain, ours = errors(golden, torch.float32, "dense"), errors(golden, torch.float32, "tiled")
    # An anchor's gradient is 1/(T·anchors) times (mean by p) − (mean over positives) of features, by row and by column.
    length = 1.0 if golden["normalize"] else np.linalg.norm(golden["features"], axis=1).max()
    averages = 2 * length / (golden["temperature"] * golden["has_positive"].sum())
    sizes = {
        "mean": golden["loss_mean"],
        "per anchor": np.abs(golden["loss_per_anchor"]).max(),
        "features": averages,
        "prototypes": averages,
    }
    for name, error in ours.items():
        one_rounding = torch.finfo(torch.float32).eps * sizes[name.split(", ")[0]]
        assert error <= 2 * plain[name] + one_rounding, name
