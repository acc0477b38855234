"""Loss and gradients of the kernels against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from batches import PRESETS, assert_as_exact_as_plain, grad_output_of, leaves, loss_and_gradients, random_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rcl_fast.backends import triton as backend
from rcl_fast.batch import ContrastiveBatch
from rcl_fast.kernels import block_sizes

Tiles = Callable[..., None]


def test_golden_cases(golden: dict[str, np.ndarray], device: torch.device) -> None:
    def tensor(name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        return torch.from_numpy(golden[name]).to(device, dtype) if name in golden else None

    features, prototypes = tensor("features", torch.float32), tensor("prototypes", torch.float32)
    assert features is not None
    wanted = [rows.requires_grad_() for rows in (features, prototypes) if rows is not None]
    batch = ContrastiveBatch(
        features=features,
        labels=tensor("labels"),
        prototypes=prototypes,
        class_counts=tensor("class_counts") if golden["rebalance"] else None,
        compression=tensor("compression"),
        num_classes=len(golden["class_counts"]),
        temperature=float(golden["temperature"]),
        class_average=bool(golden["class_average"]),
        normalize=bool(golden["normalize"]),
    )
    losses = backend.losses(batch)
    np.testing.assert_allclose(losses.detach().cpu(), golden["loss_per_anchor"], rtol=2e-6, atol=2e-5)

    has_positive = tensor("has_positive")
    gradients = torch.autograd.grad(losses[has_positive].mean() if has_positive.any() else losses.sum(), wanted)
    for name, gradient in zip(("grad_features", "grad_prototypes"), gradients, strict=False):
        scale = max(np.abs(golden[name]).max(), 1e-9)
        np.testing.assert_allclose(gradient.cpu() / scale, golden[name] / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("register_width", [64, 16], ids=["registers", "workspace"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_over_several_tiles_on_every_axis(
    preset: str, register_width: int, tiny_tiles: Tiles, device: torch.device
) -> None:
    tiny_tiles(register_width=register_width)
    assert_as_exact_as_plain(random_batch(device, N=50, C=37, D=40, **PRESETS[preset]))


@pytest.mark.parametrize(
    "options",
    [
        {"class_average": True, "rebalance": False, "with_prototypes": False},
        {"class_average": False, "rebalance": True, "with_prototypes": True},
        {"compressed": True},  # no bound on the similarities is known
        {"normalize": False, "temperature": 1.0},
        {"normalize": False, "compressed": True, "temperature": 1.0},
        {"temperature": 0.02},  # the bound is too wide to do without a running maximum
        {"temperature": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("register_width", [64, 16], ids=["registers", "workspace"])
def test_other_options(options: dict, register_width: int, tiny_tiles: Tiles, device: torch.device) -> None:
    tiny_tiles(register_width=register_width)
    assert_as_exact_as_plain(random_batch(device, N=37, C=19, D=24, **options))


@pytest.mark.parametrize(
    ("N", "C", "D"),
    [
        (1, 1, 8),  # the least there is
        (1, 40, 8),  # one anchor, prototypes on more than one tile
        (33, 1, 16),  # one class; one row more than two tiles
        (32, 32, 32),  # exact multiples of every tile
        (31, 65, 17),  # one short of a tile; D just over one step
        (70, 3, 100),  # D over several steps and padded
        (20, 100, 2048 // 16),
    ],
)
@pytest.mark.parametrize("register_width", [128, 0], ids=["registers", "workspace"])
def test_ragged_shapes(N: int, C: int, D: int, register_width: int, tiny_tiles: Tiles, device: torch.device) -> None:
    tiny_tiles(register_width=register_width, depth=32)
    assert_as_exact_as_plain(random_batch(device, N, C, D))


def test_widest_rows(tiny_tiles: Tiles, device: torch.device) -> None:
    tiny_tiles(depth=256)
    assert_as_exact_as_plain(random_batch(device, N=20, C=18, D=2048, dtype=torch.bfloat16))


@pytest.mark.parametrize("with_prototypes", [True, False])
@pytest.mark.parametrize(
    "labels",
    [[3] * 20, list(range(20)), [0, 0, 5, 5, 5, 19], [7], [2, 9]],
    ids=["one class", "singletons", "empty classes", "one anchor", "two singletons"],
)
def test_label_distributions(labels: list[int], with_prototypes: bool, device: torch.device) -> None:
    batch = random_batch(
        device, len(labels), 20, 12, with_prototypes=with_prototypes, labels=torch.tensor(labels, dtype=torch.int64)
    )
    assert_as_exact_as_plain(batch)


def test_anchors_without_a_positive_have_neither_loss_nor_gradient(device: torch.device) -> None:
    batch = random_batch(device, 6, 6, 12, with_prototypes=False, labels=torch.arange(6))
    grad_output = torch.full((6,), float("nan"), device=device)  # not even from a grad_output that is no number
    losses, gradient = loss_and_gradients(backend.losses, batch, grad_output)
    assert losses.eq(0).all()
    assert gradient.eq(0).all()


def test_empty_batch(device: torch.device) -> None:
    batch = random_batch(device, 0, 5, 12)
    losses, for_features, for_prototypes = loss_and_gradients(backend.losses, batch, torch.ones(0, device=device))
    assert losses.shape == (0,)
    assert for_features.shape == (0, 12)
    assert for_prototypes.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_zero_rows_have_finite_gradients(dtype: torch.dtype, device: torch.device) -> None:
    batch = random_batch(device, 20, 7, 12, dtype=dtype)
    with torch.no_grad():
        batch.features[3:5] = 0
        batch.prototypes[2] = 0
    truth, ours = (loss_and_gradients(loss, batch) for loss in (_reference, backend.losses))
    for exact, our in zip(truth, ours, strict=True):
        scale = float(exact.abs().max())
        torch.testing.assert_close(our.double(), exact.double(), rtol=0, atol=4 * torch.finfo(dtype).eps * scale + 1e-5)


def _reference(batch: ContrastiveBatch) -> torch.Tensor:
    from rcl_fast.backends import reference

    return reference.losses(batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("register_width", [64, 16], ids=["registers", "workspace"])
@pytest.mark.parametrize("preset", PRESETS)
def test_sixteen_bits(
    preset: str, dtype: torch.dtype, register_width: int, tiny_tiles: Tiles, device: torch.device
) -> None:
    tiny_tiles(register_width=register_width)
    assert_as_exact_as_plain(random_batch(device, N=41, C=19, D=40, dtype=dtype, **PRESETS[preset]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"compressed": True}, {"normalize": False, "temperature": 1.0}], ids=str)
def test_sixteen_bits_with_other_options(options: dict, dtype: torch.dtype, device: torch.device) -> None:
    assert_as_exact_as_plain(random_batch(device, N=41, C=19, D=40, dtype=dtype, **options))


@pytest.mark.parametrize("register_width", [64, 16], ids=["registers", "workspace"])
def test_float16_keeps_gradients_of_a_small_grad_output(
    register_width: int, tiny_tiles: Tiles, device: torch.device
) -> None:
    """A mean over a large batch weighs each anchor below float16's range; long features make dlogits smaller still."""
    tiny_tiles(register_width=register_width)
    small = random_batch(device, 30, 7, 24, dtype=torch.float16)
    single = small._replace(
        features=small.features.detach().float().requires_grad_(),
        prototypes=small.prototypes.detach().float().requires_grad_(),
    )
    grad_output = grad_output_of(small)
    _, *exact = loss_and_gradients(backend.losses, single, grad_output)
    _, *half = loss_and_gradients(backend.losses, small, 64 * grad_output)
    _, *tiny = loss_and_gradients(backend.losses, small, 2.0**-12 * grad_output)
    for exactly, at_64, at_small in zip(exact, half, tiny, strict=True):
        scale = exactly.abs().max()
        torch.testing.assert_close(at_64.float() / 64 / scale, exactly / scale, rtol=0, atol=2e-3)
        # Stored as float16, the smallest step is 2^-24: nothing else may be lost.
        torch.testing.assert_close(
            at_small.float(), exactly * 2.0**-12, rtol=2e-3, atol=2.0**-24 + 2e-3 * float(scale) * 2.0**-12
        )


@pytest.mark.parametrize(("left", "right"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes_are_promoted(left: torch.dtype, right: torch.dtype, device: torch.device) -> None:
    mixed = random_batch(device, 20, 7, 12)
    mixed = mixed._replace(
        features=mixed.features.detach().to(left).requires_grad_(),
        prototypes=mixed.prototypes.detach().to(right).requires_grad_(),
    )
    losses, *gradients = loss_and_gradients(backend.losses, mixed)
    assert losses.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [left, right]
    exact, *_ = loss_and_gradients(_reference, mixed)
    torch.testing.assert_close(losses.double(), exact, rtol=0, atol=3e-5)


def test_float64_is_sent_to_tiled(device: torch.device) -> None:
    with pytest.raises(TypeError, match="tiled"):
        backend.losses(random_batch(device, dtype=torch.float64))


@pytest.mark.parametrize("splits", [1, 4, 1000], ids=["no split", "some", "one tile a split"])
@pytest.mark.parametrize("temperature", [0.1, 0.02], ids=["bounded", "online"])
def test_splits(splits: int, temperature: float, tiny_tiles: Tiles, device: torch.device) -> None:
    tiny_tiles(splits=splits)
    assert_as_exact_as_plain(random_batch(device, N=45, C=60, D=24, temperature=temperature))


def test_workspace_in_chunks(tiny_tiles: Tiles, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    tiny_tiles(rows=64, keys=64, depth=32, register_width=0)
    monkeypatch.setattr(block_sizes, "WORKSPACE_BYTES", 1)  # the least chunk is 128 rows
    assert_as_exact_as_plain(random_batch(device, N=150, C=11, D=24))


def test_histogram_of_large_batches(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(block_sizes, "SCAN_LIMIT", 0)
    assert_as_exact_as_plain(random_batch(device, N=45, C=19, D=24))


@pytest.mark.parametrize("register_width", [64, 16], ids=["registers", "workspace"])
def test_the_same_bits_every_run(register_width: int, tiny_tiles: Tiles, device: torch.device) -> None:
    tiny_tiles(register_width=register_width)
    batch = random_batch(device, 45, 19, 24, dtype=torch.bfloat16)
    first, second = (loss_and_gradients(backend.losses, batch) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("register_width", [64, 0], ids=["registers", "workspace"])
@pytest.mark.parametrize(
    "options",
    [
        *PRESETS.values(),
        {"compressed": True},
        {"temperature": 0.03},  # the online sum
        {"normalize": False, "temperature": 1.0},
    ],
    ids=str,
)
def test_jacobian_is_that_of_central_differences(
    options: dict, register_width: int, tiny_tiles: Tiles, device: torch.device
) -> None:
    """gradcheck, with float64 differences of the reference: every anchor's loss by every number of its inputs."""
    tiny_tiles(register_width=register_width)
    batch = random_batch(device, N=7, C=4, D=8, **options)
    losses, wanted = backend.losses(batch), leaves(batch)
    each_anchor = [torch.autograd.grad(loss, wanted, retain_graph=True) for loss in losses]
    for rows, *gradients in zip(wanted, *each_anchor, strict=True):
        name = "features" if rows is batch.features else "prototypes"
        exact, slopes, step = rows.detach().double(), [], 1e-5
        for number in range(rows.numel()):
            nudge = torch.zeros_like(exact)
            nudge.view(-1)[number] = step
            above, below = (_reference(batch._replace(**{name: exact + way * nudge})) for way in (1, -1))
            slopes.append((above - below) / (2 * step))
        expected, found = torch.stack(slopes, dim=1).detach(), torch.stack(gradients).flatten(1).double()
        # A gradient is a sum of terms that cancel: float32's rounding of terms up to the largest gradient and 1/T.
        rounding = 16 * torch.finfo(torch.float32).eps * (float(expected.abs().max()) + 1 / batch.temperature)
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding + 1e-8)


@settings(
    max_examples=15,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_generated_shapes_and_classes(data: st.DataObject, tiny_tiles: Tiles, device: torch.device) -> None:
    C = data.draw(st.integers(1, 40), label="C")
    labels = data.draw(st.lists(st.integers(0, C - 1), min_size=1, max_size=45), label="labels")
    D = data.draw(st.integers(1, 50), label="D")
    tiny_tiles(
        rows=data.draw(st.sampled_from([16, 32]), label="rows"),
        keys=data.draw(st.sampled_from([16, 32]), label="keys"),
        splits=data.draw(st.sampled_from([1, 3, 50]), label="splits"),
        register_width=data.draw(st.sampled_from([0, 64]), label="register_width"),
    )
    batch = random_batch(
        device,
        len(labels),
        C,
        D,
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype"),
        class_average=data.draw(st.booleans(), label="class_average"),
        rebalance=data.draw(st.booleans(), label="rebalance"),
        with_prototypes=data.draw(st.booleans(), label="with_prototypes"),
        compressed=data.draw(st.booleans(), label="compressed"),
        extra_keys=data.draw(st.sampled_from([None, 0, 1, 17, 40]), label="extra_keys"),
        anchors_are_keys=data.draw(st.booleans(), label="anchors_are_keys"),
        temperature=data.draw(st.sampled_from([0.05, 0.1, 1.0]), label="temperature"),
        labels=torch.tensor(labels),
        seed=data.draw(st.integers(0, 3), label="seed"),
    )
    assert_as_exact_as_plain(batch)


@pytest.mark.parametrize(
    ("anchors_are_keys", "register_width", "temperature"),
    [(True, 64, 0.02), (False, 64, 0.1), (True, 0, 0.1), (False, 0, 0.02)],
    ids=["registers, online", "MoCo, registers, bounded", "workspace, bounded", "MoCo, workspace, online"],
)
@pytest.mark.parametrize("preset", ["scl", "bcl_rcl"])
def test_extra_keys(
    preset: str,
    anchors_are_keys: bool,
    register_width: int,
    temperature: float,
    tiny_tiles: Tiles,
    device: torch.device,
) -> None:
    tiny_tiles(register_width=register_width)
    batch = random_batch(
        device, 45, 19, 24, temperature=temperature, extra_keys=37, anchors_are_keys=anchors_are_keys, **PRESETS[preset]
    )
    assert_as_exact_as_plain(batch)


def test_no_extra_key_is_none(device: torch.device) -> None:
    batch = random_batch(device, 45, 19, 24, extra_keys=0)
    without = batch._replace(keys=None, key_labels=None)
    none, *found = loss_and_gradients(backend.losses, batch)
    expected, *others = loss_and_gradients(backend.losses, without)
    assert torch.equal(none, expected)
    assert found[1].shape == (0, 24)
    assert all(map(torch.equal, (found[0], found[2]), others))


def test_without_a_key_the_loss_is_0(device: torch.device) -> None:
    batch = random_batch(device, 20, 7, 24, extra_keys=0, anchors_are_keys=False, with_prototypes=False)
    losses, *gradients = loss_and_gradients(backend.losses, batch)
    assert torch.equal(losses, torch.zeros(20, device=device))
    assert all(not gradient.any() for gradient in gradients)


def test_frozen_extra_keys_change_no_bit(device: torch.device) -> None:
    batch = random_batch(device, 45, 19, 24, extra_keys=37)
    losses, features, _, prototypes = loss_and_gradients(backend.losses, batch)
    frozen = batch._replace(keys=batch.keys.detach())
    again = loss_and_gradients(backend.losses, frozen)
    assert all(map(torch.equal, again, (losses, features, prototypes)))


def test_extra_keys_of_many_labels_are_counted_by_a_histogram(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(block_sizes, "SCAN_LIMIT", 0)
    for anchors_are_keys in (True, False):
        assert_as_exact_as_plain(random_batch(device, 45, 19, 24, extra_keys=37, anchors_are_keys=anchors_are_keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_up_to_1_take_the_bounded_form(dtype: torch.dtype, device: torch.device) -> None:
    batch = random_batch(device, 45, 19, 24, dtype=dtype)
    factors = torch.where(torch.arange(19, device=device) % 3 == 0, 1.0, 0.005)
    batch = batch._replace(compression=factors)
    assert not backend._bounded(batch)
    small = batch._replace(factors_at_most_one=True)
    assert backend._bounded(small)
    assert_as_exact_as_plain(small)


@pytest.mark.parametrize("anchors_are_keys", [True, False], ids=["anchors are keys", "MoCo"])
def test_full_rounds_of_large_tiles_and_small_ones_for_the_rest(
    anchors_are_keys: bool, tiny_tiles: Tiles, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    tiny_tiles(register_width=0)
    tiles = (block_sizes.BlockSizes(32, 32, 16, 4, 1, 1), block_sizes.BlockSizes(16, 16, 16, 4, 1, 2))
    monkeypatch.setattr(block_sizes, "candidates", lambda *_: tiles)
    monkeypatch.setattr(block_sizes, "processor", lambda device: block_sizes.Processor(80, 5))
    monkeypatch.setattr(block_sizes, "LAUNCH_PAIRS", -(10**9))  # a second launch always pays
    found = []
    launches = block_sizes.launches
    monkeypatch.setattr(block_sizes, "launches", lambda *given: found.append(launches(*given)) or found[-1])
    assert_as_exact_as_plain(random_batch(device, 50, 37, 40, extra_keys=41, anchors_are_keys=anchors_are_keys))
    assert [len(each) for each in found] == [2, 2, 1, 1]  # forward; dlogits of anchors, keys and prototypes
    for one, other in found[:2]:
        assert (one.sizes, one.first_key, other.sizes) == (tiles[0], 0, tiles[1])
        assert other.first_key == one.grid.tiles * 32
