"""What is set on a loss after its construction outlives checkpoints, copies and casts; what is wrong is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from processes import Processes
from torch import Tensor, nn

from rcl_fast import (
    LDAM,
    BalancedSoftmax,
    CBFocal,
    ContrastiveLoss,
    LogitAdjusted,
    checks,
    contrastive_loss,
    functional,
)
from rcl_fast.batch import Factors

COUNTS = torch.tensor([900, 90, 10])
FACTORS = [1.0, 0.005, 0.3]
FEATURES = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
LOGITS = FEATURES[:, :3]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])


def compressed() -> ContrastiveLoss:
    criterion = ContrastiveLoss(COUNTS, rebalance=True)
    criterion.set_compression(FACTORS)
    return criterion


def reweighted() -> LDAM:
    criterion = LDAM(COUNTS)
    criterion.reweight()
    return criterion


def loss(criterion: nn.Module) -> Tensor:
    return criterion(FEATURES if isinstance(criterion, ContrastiveLoss) else LOGITS, LABELS)


def through_a_state_dict(criterion: nn.Module, fresh: nn.Module, **options: bool) -> nn.Module:
    loaded = fresh.load_state_dict(criterion.state_dict(), **options)
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    return fresh


def through_a_file(criterion: nn.Module, fresh: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def as_a_part_of_another(criterion: nn.Module, fresh: nn.Module) -> nn.Module:
    whole, other = (
        nn.ModuleDict({"net": nn.Linear(2, 2), "a": nn.ModuleDict({"b": part})}) for part in (criterion, fresh)
    )
    through_a_state_dict(whole, other)
    return fresh


ROUND_TRIPS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "state_dict": through_a_state_dict,
    "not strict": lambda criterion, fresh: through_a_state_dict(criterion, fresh, strict=False),
    "assign": lambda criterion, fresh: through_a_state_dict(criterion, fresh, assign=True),
    "file": through_a_file,
    "submodule": as_a_part_of_another,
    "pickle": lambda criterion, _: pickle.loads(pickle.dumps(criterion)),
    "deepcopy": lambda criterion, _: copy.deepcopy(criterion),
    "cast": lambda criterion, _: copy.deepcopy(criterion).half().to(torch.bfloat16).double(),
}


@pytest.mark.parametrize("way", ROUND_TRIPS)
@pytest.mark.parametrize(("make", "fresh"), [(compressed, ContrastiveLoss), (reweighted, LDAM)])
def test_state_outlives_a_round_trip(make: Callable[[], nn.Module], fresh: Callable[..., nn.Module], way: str) -> None:
    criterion = make()
    other = fresh(COUNTS, rebalance=True) if fresh is ContrastiveLoss else fresh(COUNTS)
    assert loss(other) != loss(criterion)
    again = ROUND_TRIPS[way](criterion, other)
    assert again is not criterion
    assert loss(again) == loss(criterion)


@pytest.mark.parametrize("way", ["state_dict", "not strict", "assign", "file", "submodule"])
def test_no_compression_is_a_state_as_well(way: str) -> None:
    plain = ContrastiveLoss(COUNTS, rebalance=True)
    assert ROUND_TRIPS[way](plain, compressed()).compression is None


def test_a_state_dict_of_an_earlier_version_means_no_compression() -> None:
    criterion = compressed()
    assert str(criterion.load_state_dict({})) == "<All keys matched successfully>"
    assert criterion.compression is None


def test_class_counts_are_never_in_a_state_dict() -> None:
    """They belong to the data, so that a checkpoint of one data set never sets another's."""
    assert not ContrastiveLoss.preset("bcl_rcl", COUNTS).state_dict()
    assert compressed().state_dict().keys() == {"compression"}
    assert LDAM(COUNTS).state_dict().keys() == {"class_weights"}


def test_a_loaded_state_is_not_the_state_dicts_own_tensor() -> None:
    state = compressed().state_dict()
    criterion = ContrastiveLoss(COUNTS)
    criterion.load_state_dict(state)
    state["compression"].fill_(7)
    assert criterion.compression.tolist() == FACTORS


@pytest.mark.parametrize(
    ("make", "name", "value", "part"),
    [
        (compressed, "compression", torch.ones(2), "class_counts has 3, compression has 2"),
        (compressed, "compression", torch.ones(3, 1), "compression must be [C]"),
        (compressed, "compression", torch.tensor([1.0, -0.5, 1.0]), "class 1 has -0.5"),
        (compressed, "compression", torch.tensor([1.0, 1.0, float("nan")]), "class 2 has nan"),
        (compressed, "compression", torch.ones(3) > 0, "torch.bool"),
        (reweighted, "class_weights", torch.tensor([1.0, -0.5, 1.0]), "class 1 has -0.5"),
        (reweighted, "class_weights", torch.tensor([1.0, 1.0, float("nan")]), "class 2 has nan"),
        (reweighted, "class_weights", torch.ones(2), "size mismatch"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
def test_a_wrong_state_is_refused_by_name_and_changes_nothing(
    make: Callable[[], nn.Module], name: str, value: Tensor, part: str, options: dict[str, bool]
) -> None:
    criterion = make()
    whole = nn.ModuleDict({"criterion": criterion})
    with pytest.raises(RuntimeError) as raised:
        whole.load_state_dict({f"criterion.{name}": value}, **options)
    assert "Error(s) in loading state_dict for ModuleDict" in str(raised.value)
    assert f"criterion.{name}" in str(raised.value)
    assert part in str(raised.value)
    assert loss(criterion) == loss(make())


def test_other_keys_are_still_unexpected() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*class_counts"):
        compressed().load_state_dict({"class_counts": COUNTS})


LARGE = torch.tensor([70001.0, 301.0, 1.0])  # more than float16 holds, and more digits than bfloat16 has


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ContrastiveLoss(LARGE, rebalance=True, compression=FACTORS),
        lambda: LogitAdjusted(LARGE),
        lambda: BalancedSoftmax(LARGE),
        lambda: CBFocal(LARGE),
        lambda: LDAM(LARGE),
    ],
)
def test_a_cast_changes_no_number(make: Callable[[], nn.Module], cast: str) -> None:
    plain, model = make(), nn.ModuleDict({"net": nn.Linear(2, 2), "criterion": make()})
    getattr(model, cast)()
    assert model["net"].weight.dtype == getattr(torch.zeros(()), cast)().dtype
    assert loss(model["criterion"]) == loss(plain)
    if isinstance(plain, LDAM):
        plain.reweight()
        model["criterion"].reweight()
        assert loss(model["criterion"]) == loss(plain)


class WithParameters(LogitAdjusted):
    """A user's own: the parts of a loss that are not its buffers are cast as those of any module."""

    def __init__(self) -> None:
        super().__init__(COUNTS)
        self.head = nn.BatchNorm1d(3)


def test_a_cast_is_anothers_as_ever() -> None:
    criterion = WithParameters().half()
    assert {tensor.dtype for tensor in criterion.head.parameters()} == {torch.float16}
    assert criterion.head.running_mean.dtype == torch.float16


def test_buffers_move_with_their_module() -> None:
    for criterion in (compressed(), reweighted(), LogitAdjusted(COUNTS), CBFocal(COUNTS)):
        before = {name: (buffer.shape, buffer.dtype) for name, buffer in criterion.named_buffers()}
        moved = criterion.to("meta", torch.float16)
        assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
        assert {name: (buffer.shape, buffer.dtype) for name, buffer in moved.named_buffers()} == before
        assert {buffer.device.type for buffer in moved.to_empty(device="cpu").buffers()} == {"cpu"}


def test_losses_without_values_are_made_and_loaded() -> None:
    with torch.device("meta"):
        criteria = ContrastiveLoss(COUNTS.tolist(), rebalance=True), LDAM(COUNTS.tolist())
    for criterion, real in zip(criteria, (compressed(), reweighted()), strict=True):
        criterion.load_state_dict(real.state_dict(), assign=True)
        for name, value in real.state_dict().items():
            assert torch.equal(criterion.state_dict()[name], value)


def test_factors_go_where_those_before_were() -> None:
    criterion = ContrastiveLoss(compression=FACTORS).to("meta")
    criterion.set_compression(FACTORS)
    assert criterion.compression.device.type == "meta"


def copied_with_its_group(group: Any) -> tuple[bool, bool, str]:
    criterion = ContrastiveLoss(COUNTS, rebalance=True, compression=FACTORS, group=group)
    copied = copy.deepcopy(nn.ModuleList([criterion, criterion]))
    with pytest.raises(TypeError) as raised:
        pickle.dumps(criterion)
    assert copied[0] is copied[1]
    return copied[0].group is group, bool(loss(copied[0]) == loss(criterion)), str(raised.value)


def test_a_copy_shares_the_process_group_and_a_file_does_not_drop_it(processes: Processes) -> None:
    for shared, same, error in processes.run(2, copied_with_its_group):
        assert shared
        assert same
        assert "ProcessGroup" in error


def _knows_small(criterion: ContrastiveLoss, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Returns whether a call of the loss says that no factor is above 1."""
    seen = []
    monkeypatch.setattr(functional, "_loss", lambda batch, *_: seen.append(batch.factors_at_most_one))
    criterion(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    return seen[-1]


SMALL = {
    "set": lambda loss: loss,
    "moved": lambda loss: loss.to(torch.float16).to("cpu"),
    "pickled": lambda loss: pickle.loads(pickle.dumps(loss)),
    "pickled after it was loaded": lambda loss: pickle.loads(pickle.dumps(_loaded(loss.state_dict()))),
    "copied": copy.deepcopy,
    "loaded": lambda loss: _loaded(loss.state_dict()),
    "moved after it was loaded": lambda loss: _loaded(loss.state_dict()).double(),
    "copied after it was loaded": lambda loss: copy.deepcopy(_loaded(loss.state_dict())),
}


def _loaded(state: dict[str, torch.Tensor]) -> ContrastiveLoss:
    criterion = ContrastiveLoss(COUNTS, rebalance=True)
    criterion.load_state_dict(state)
    return criterion


@pytest.mark.parametrize("way", SMALL)
@pytest.mark.parametrize(("factors", "expected"), [([0.005, 1.0, 0.0], True), ([0.005, 1.0 + 2**-20, 0.0], False)])
def test_factors_up_to_1_are_known_to_be(
    way: str, factors: list[float], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion = ContrastiveLoss(COUNTS, rebalance=True)
    criterion.set_compression(factors)
    criterion = SMALL[way](criterion)
    _on_a_gpu(monkeypatch)
    assert _knows_small(criterion, monkeypatch) == expected


def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes values unreadable where reading them would be a synchronisation."""
    monkeypatch.setattr(checks, "values_can_be_read", lambda _, validate: validate)


def test_changed_factors_are_not_known_after_they_travelled(monkeypatch: pytest.MonkeyPatch) -> None:
    for travelled in (lambda loss: pickle.loads(pickle.dumps(loss)), copy.deepcopy, lambda loss: loss.double()):
        criterion = _loaded({"compression": torch.tensor([0.5, 1.0, 1.0])})
        criterion.compression.fill_(2.95)
        other = travelled(criterion)
        with monkeypatch.context() as patched:
            _on_a_gpu(patched)
            assert not _knows_small(other, patched)


def test_compiled_code_takes_no_word_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not see a change in place."""
    criterion = ContrastiveLoss(COUNTS, rebalance=True, compression=[0.5, 1.0, 1.0])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not criterion._are_small()


def test_factors_that_something_else_changed_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = ContrastiveLoss(COUNTS, rebalance=True, compression=[0.5, 1.0, 1.0])
    _on_a_gpu(monkeypatch)
    assert _knows_small(criterion, monkeypatch)
    criterion.compression[0] = 3.0
    assert not _knows_small(criterion, monkeypatch)
    criterion.set_compression([0.5, 1.0, 1.0])
    assert _knows_small(criterion, monkeypatch)
    criterion.compression = torch.full((3,), 3.0)
    assert not _knows_small(criterion, monkeypatch)
    criterion.set_compression(None)
    assert not _knows_small(criterion, monkeypatch)


def test_factors_that_can_be_read_are_looked_at_in_every_call() -> None:
    features, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    wrong = Factors(torch.tensor([1.0, 3.0, 1.0]), at_most_one=True)
    for given, expected in (
        ([1, 1, 0], True),
        ([1, 1, 2], False),
        (torch.tensor([1.0, 1.0, 0.5]), True),
        (wrong, False),
    ):
        seen = []
        with mock.patch.object(functional, "_loss", lambda batch, *_, seen=seen: seen.append(batch)):
            contrastive_loss(features, labels, compression=given)
        assert seen[0].factors_at_most_one == expected
