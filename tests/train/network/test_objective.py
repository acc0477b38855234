"""The sum of the two sides, and what changes in it during training."""

import dataclasses

import pytest
import torch

from rcl_fast import ContrastiveLoss, LogitAdjusted
from rcl_fast.train.config import recipe
from rcl_fast.train.network.models import Outputs
from rcl_fast.train.network.objective import Objective, compress, reweights, starts_compression
from rcl_fast.train.options import Config, has_prototypes

COUNTS = torch.tensor([50, 20, 5])
LABELS = torch.tensor([0, 1, 2, 0])
OUTPUTS = Outputs(torch.randn(4, 3), torch.randn(4, 2, 8), torch.randn(3, 8))


def config(loss: str, **options: object) -> Config:
    found = recipe("cifar100_lt", loss)
    return dataclasses.replace(found, loss=dataclasses.replace(found.loss, **options))


def test_the_total_is_alpha_times_one_side_and_beta_times_the_other() -> None:
    parts = Objective(config("bcl_rcl", alpha=2.0, beta=0.6, tau=1.3, temperature=0.2), COUNTS)(OUTPUTS, LABELS)
    cross_entropy = LogitAdjusted(COUNTS, 1.3)(OUTPUTS.logits, LABELS)
    contrastive = ContrastiveLoss.preset("bcl_rcl", COUNTS, temperature=0.2)(
        OUTPUTS.embeddings, LABELS, OUTPUTS.prototypes
    )
    torch.testing.assert_close(parts.total, 2 * cross_entropy + 0.6 * contrastive)
    assert parts.parts().keys() == {"loss", "cross_entropy", "contrastive"}


@pytest.mark.parametrize("loss", ["ce", "balanced_softmax", "logit_adjusted", "cb_focal", "ldam_drw"])
def test_baselines_have_no_contrastive_side(loss: str) -> None:
    parts = Objective(config(loss), COUNTS)(Outputs(OUTPUTS.logits, None, None), LABELS)
    assert parts.contrastive is None
    assert parts.total == parts.cross_entropy
    assert not has_prototypes(config(loss))


def test_prototypes_where_the_paper_has_them() -> None:
    assert [has_prototypes(config(loss)) for loss in ("scl", "bcl", "scl_rcl", "bcl_rcl")] == [False, True, False, True]


def test_compression_starts_once_at_half_time_and_only_with_rcl() -> None:
    starts = [epoch for epoch in range(200) if starts_compression(config("bcl_rcl"), epoch)]
    assert starts == [100]
    assert not any(starts_compression(config("bcl"), epoch) for epoch in range(200))
    assert not any(starts_compression(config("bcl_rcl", compression=False), epoch) for epoch in range(200))


def test_compression_waits_for_a_first_validation() -> None:
    short = config("bcl_rcl")
    short = dataclasses.replace(short, optimization=dataclasses.replace(short.optimization, epochs=1))
    assert not starts_compression(short, 0)


@pytest.mark.parametrize(("under", "rest"), [(1.0, 0.005), (0.005, 1.0)])
def test_both_readings_of_compression_and_their_log(under: float, rest: float) -> None:
    objective = Objective(config("bcl_rcl", compression_under=under, compression_rest=rest), COUNTS)
    note = compress(objective, torch.tensor([0.9, 0.1, float("nan")]))
    assert objective.contrastive.compression.tolist() == pytest.approx([rest, under, 1])
    assert "1 of 3 classes are under 20% on validation" in note
    assert f"factor {under:g}; 1 others get {rest:g}; 1 without a validation image keep 1" in note


def test_deferred_reweighting_starts_at_its_share_of_the_epochs() -> None:
    assert [reweights(config("ldam_drw"), epoch) for epoch in (0, 159, 160, 199)] == [False, False, True, True]
    assert not reweights(config("ce"), 199)
