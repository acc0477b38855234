"""The heads: shapes, gradients, and what BCL says of them."""

import torch
from torch.nn import functional as F

from rcl_fast.heads import CosineClassifier, ProjectionHead, PrototypeHead


def test_projection_head_is_linear_norm_relu_linear() -> None:
    head = ProjectionHead(64, 512, 128)
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head(torch.randn(6, 64)).shape == (6, 128)


def test_the_classifier_learns_from_its_prototypes() -> None:
    classifier = CosineClassifier(16, 5)
    PrototypeHead(16, 32, 8)(classifier.weight).square().sum().backward()
    assert classifier.weight.grad is not None
    assert classifier.weight.grad.abs().sum() > 0


def test_cosine_classifier_is_bounded_by_its_scale_and_blind_to_length() -> None:
    classifier = CosineClassifier(16, 5, scale=30)
    features = torch.randn(7, 16)
    logits = classifier(features)
    torch.testing.assert_close(logits, 30 * F.cosine_similarity(features[:, None], classifier.weight[None], dim=2))
    torch.testing.assert_close(logits, classifier(100 * features))
    assert logits.abs().max() <= 30


def test_cosine_logits_are_float32_under_autocast() -> None:
    classifier = CosineClassifier(16, 5)
    features = torch.randn(7, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(classifier(features), classifier(features.double().float()))
        assert classifier(features.bfloat16()).dtype == torch.float32
        assert classifier(torch.zeros(1, 16).half()).isfinite().all()
