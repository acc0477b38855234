import dataclasses
import pickle
import random
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from rcl_fast.train.options import ViewKind, ViewOptions, training_kinds
from rcl_fast.train.views.transforms import Cutout, evaluation_view, view

KINDS = get_args(ViewKind)
OPTIONS = ViewOptions(
    image_size=32,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.5),
    x1="autoaugment",
    x2="sim",
    x3="digits",
    evaluation="as_is",
)


def picture(width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def normalized(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(OPTIONS.mean)[:, None, None]) / torch.tensor(OPTIONS.std)[:, None, None]


def steps(kind: str, options: ViewOptions = OPTIONS) -> list[str]:
    """The names of the transforms that make up a view, in their order."""
    return [type(step).__name__ for step in view(kind, options).transforms]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 8])
def test_every_view_is_a_normalised_float_image_and_leaves_its_input_alone(kind: str, size: int) -> None:
    options = dataclasses.replace(OPTIONS, image_size=size)
    transform, image = view(kind, options), picture(size, size)
    before = image.tobytes()
    for seed in range(20):
        torch.manual_seed(seed)
        made = transform(image)
        assert type(made) is torch.Tensor
        assert made.dtype == torch.float32
        assert made.shape == (3, size, size)
        pixels = made * torch.tensor(OPTIONS.std)[:, None, None] + torch.tensor(OPTIONS.mean)[:, None, None]
        assert pixels.min() >= -1e-5
        assert pixels.max() <= 1 + 1e-5
    assert image.tobytes() == before


@pytest.mark.parametrize("kind", ["randaugment", "sim", "sim_randaugment"])
def test_photographs_of_any_shape_become_square(kind: str) -> None:
    assert view(kind, OPTIONS)(picture(61, 40)).shape == (3, 32, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_random_can_be_seeded_and_travel_to_workers(kind: str) -> None:
    transform = view(kind, OPTIONS)
    copy = pickle.loads(pickle.dumps(transform))

    def sampled(transform: Callable, seed: int) -> bytes:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        return transform(picture()).numpy().tobytes()

    assert len({sampled(transform, seed) for seed in range(5)}) > 3
    assert sampled(transform, 3) == sampled(copy, 3)


def test_the_recipes_order() -> None:
    end = ["ToDtype", "Normalize"]
    crop_flip = ["RandomResizedCrop", "RandomHorizontalFlip"]
    sim = [*crop_flip, "RandomApply", "RandomGrayscale"]
    assert steps("autoaugment") == [
        *("RequireCrop", "RandomCrop", "RandomHorizontalFlip", "AutoAugment", "PILToTensor", "Cutout"),
        *end,
    ]
    assert steps("randaugment") == [*crop_flip, "ColorJitter", "RandAugment", "PILToTensor", *end]
    assert steps("sim") == [*sim, "PILToTensor", *end]
    assert steps("sim_randaugment") == [*sim, "RandAugment", "PILToTensor", *end]
    assert "Cutout" not in steps("autoaugment", dataclasses.replace(OPTIONS, cutout=0))


def test_sim_obeys_its_options() -> None:
    """With nothing left to chance but the flip, a view is the image or its mirror image, here in gray."""
    options = dataclasses.replace(OPTIONS, crop_scale=(1.0, 1.0), jitter_probability=0.0, gray_probability=1.0)
    gray = v2.functional.rgb_to_grayscale(picture(), num_output_channels=3)
    expected = normalized(gray)
    made = view("sim", options)(picture())
    assert any(torch.allclose(made, image, atol=1e-5) for image in (expected, expected.flip(-1)))


def test_randaugment_jitters_all_but_the_hue() -> None:
    jitter = view("randaugment", OPTIONS).transforms[2]
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == ((0.6, 1.4),) * 3
    assert jitter.hue is None


def test_randaugment_fills_with_the_data_sets_mean_and_shifts_by_the_image_size() -> None:
    operations = view("randaugment", OPTIONS).transforms[3].ops
    assert {operation.kwargs["fillcolor"] for operation in operations} == {(128, 102, 76)}
    assert {operation.hparams["translate_const"] for operation in operations} == {14}
    assert {operation.magnitude for operation in operations} == {10}
    assert {operation.hparams["magnitude_std"] for operation in operations} == {0.5}


@pytest.mark.parametrize("kind", ["digits", "digits_sim"])
def test_digits_are_never_flipped(kind: str) -> None:
    """A bright left half stays on the left, a bright top at the top."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :16] = 255
    transform = view(kind, OPTIONS)
    for seed in range(60):
        torch.manual_seed(seed)
        made = transform(Image.fromarray(pixels))
        assert made[..., :16].mean() > made[..., 16:].mean()
        assert made[:, :16].mean() > made[:, 16:].mean()


@pytest.mark.parametrize("kind", ["crop_flip", "autoaugment", "sim"])
def test_photographs_are_flipped_half_of_the_time(kind: str) -> None:
    flips = [t for t in view(kind, OPTIONS).transforms if isinstance(t, v2.RandomHorizontalFlip)]
    assert [flip.p for flip in flips] == [0.5]


class TestCutout:
    @pytest.mark.parametrize(
        ("row", "column", "rows", "columns"),
        [
            (16, 16, (8, 24), (8, 24)),
            (0, 0, (0, 8), (0, 8)),
            (31, 4, (23, 32), (0, 12)),
            (9, 31, (1, 17), (23, 32)),
        ],
    )
    def test_the_square_is_exact_and_clipped_at_the_border(
        self, monkeypatch: pytest.MonkeyPatch, row: int, column: int, rows: tuple, columns: tuple
    ) -> None:
        centre = iter((row, column))
        monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(next(centre)))
        expected = torch.full((3, 32, 32), 7, dtype=torch.uint8)
        expected[:, slice(*rows), slice(*columns)] = 0
        image = torch.full((3, 32, 32), 7, dtype=torch.uint8)
        assert torch.equal(Cutout(16)(image), expected)
        assert (image == 7).all()

    def test_the_centre_may_be_any_pixel(self) -> None:
        torch.manual_seed(0)
        image = torch.ones(3, 8, 12)
        squares = {tuple((Cutout(1)(image)[0] == 0).nonzero()[0].tolist()) for _ in range(2_000)}
        assert squares == {(row, column) for row in range(8) for column in range(12)}

    def test_it_is_black_before_normalisation(self) -> None:
        options = dataclasses.replace(OPTIONS, cutout=1_000)
        made = view("autoaugment", options)(picture())
        assert torch.allclose(made, normalized(Image.new("RGB", (32, 32))))


def test_three_views_for_a_contrastive_loss_and_one_without() -> None:
    assert training_kinds(OPTIONS, contrastive=True) == ("autoaugment", "sim", "digits")
    assert training_kinds(OPTIONS, contrastive=False) == ("autoaugment",)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of view 'blur'"):
        view("blur", OPTIONS)


def test_evaluation_as_is_only_normalises() -> None:
    assert torch.allclose(evaluation_view(OPTIONS)(picture()), normalized(picture()), atol=1e-6)


def test_evaluation_as_is_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="48x32 pixels, and --evaluation as_is expects 32x32"):
        evaluation_view(OPTIONS)(picture(48, 32))


def test_evaluation_resizes_and_crops_the_centre() -> None:
    options = dataclasses.replace(OPTIONS, evaluation="resize_center_crop", resize=40)
    image = picture(160, 80)
    expected = image.resize((80, 40), Image.Resampling.BILINEAR).crop((24, 4, 56, 36))
    assert torch.allclose(evaluation_view(options)(image), normalized(expected), atol=1e-6)
