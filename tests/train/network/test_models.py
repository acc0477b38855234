"""The networks: sizes of the literature, and no work that the loss does not need."""

import pytest
import torch
from torch import nn

from rcl_fast.train.errors import UserError
from rcl_fast.train.network.models import LongTailedClassifier, ResNet32, build_backbone
from rcl_fast.train.options import ModelOptions


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(embeds: bool = True, has_prototypes: bool = True, **options: object) -> LongTailedClassifier:
    options = {"head_hidden": 32, "head_out": 16, **options}
    return LongTailedClassifier(ModelOptions(**options), 10, embeds=embeds, has_prototypes=has_prototypes)


def test_resnet32_is_the_one_of_the_literature() -> None:
    model = small()
    assert parameters(model.backbone) + parameters(model.classifier) == 464_154
    assert len([module for module in model.backbone.modules() if isinstance(module, nn.Conv2d)]) == 31


@pytest.mark.parametrize(("arch", "expected"), [("resnet50", 23_508_032), ("resnext50", 22_979_904)])
def test_imagenet_backbones(arch: str, expected: int) -> None:
    with torch.device("meta"):
        backbone, width = build_backbone(arch)
        assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, width)
    assert parameters(backbone) == expected


def test_timm_backbones_by_name() -> None:
    for name in ("resnet10t", "mobilenetv3_small_050"):  # the second has a layer behind its pooling
        backbone, width = build_backbone(f"timm/{name}")
        assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, width)


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet_fifty"])
def test_an_unknown_architecture_says_what_there_is(arch: str) -> None:
    with pytest.raises(UserError, match="resnet"):
        build_backbone(arch)


def test_shapes_of_the_outputs() -> None:
    views = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    outputs = small()(views)
    assert outputs.logits.shape == (4, 10)
    assert outputs.embeddings.shape == (4, 2, 16)
    assert outputs.prototypes.shape == (10, 16)


def test_embeddings_belong_to_their_sample_and_view() -> None:
    model = small().eval()
    views = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    embeddings = model(views).embeddings
    for number, view in enumerate(views[1:]):
        torch.testing.assert_close(embeddings[:, number], model.projection_head(model.backbone(view)))


def test_the_head_sees_no_x1_and_the_classifier_nothing_else() -> None:
    model, rows = small(), {}
    for name in ("backbone", "classifier", "projection_head", "prototype_head"):
        getattr(model, name).register_forward_pre_hook(lambda _, args, name=name: rows.update({name: len(args[0])}))
    model([torch.randn(4, 3, 8, 8) for _ in range(3)])
    assert rows == {"backbone": 12, "classifier": 4, "projection_head": 8, "prototype_head": 10}


def test_without_a_contrastive_loss_there_are_no_heads() -> None:
    model = small(embeds=False, has_prototypes=False)
    assert model.projection_head is None
    assert model.prototype_head is None
    outputs = model([torch.randn(4, 3, 8, 8)])
    assert outputs.embeddings is None


def test_option_a_shortcuts_pass_every_second_pixel_and_pad_channels() -> None:
    block = ResNet32().stages[1][0].eval()
    nn.init.zeros_(block.body[-1].weight)  # the body then gives zeros
    images = torch.rand(2, 16, 6, 6)
    shortcut = block(images)
    assert torch.equal(shortcut[:, 8:24], images[:, :, ::2, ::2])
    assert not shortcut[:, :8].any()
    assert not shortcut[:, 24:].any()
