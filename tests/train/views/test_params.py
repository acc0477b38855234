"""Random parameters are distributed as in torchvision's and timm's transforms, and depend on nothing but their key."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms as v1
from torchvision.transforms import v2

from rcl_fast.train.config import recipe
from rcl_fast.train.options import ViewKind
from rcl_fast.train.views.params import JITTER, NUMBER, OPERATIONS, ViewParams, plan_view, resized_boxes, sample_params

MANY = 20_000
VIEWS = {name: recipe(name, "bcl_rcl").views for name in ("digits_lt", "cifar100_lt", "imagenet_lt")}
NOT_BY_CHANCE = 1e-4  # seeds are fixed: a test that passes passes always


def sampled(kind: ViewKind, dataset: str, count: int = MANY, **key: int) -> ViewParams:
    key = {"seed": 0, "epoch": 0, "view": 0, **key}
    return sample_params(kind, VIEWS[dataset], index=torch.arange(count), **key)


def assert_same_distribution(ours: Sequence[float] | torch.Tensor, theirs: Sequence[float] | torch.Tensor) -> None:
    """Two samples, by Kolmogorov and Smirnov."""
    assert stats.ks_2samp(np.asarray(ours), np.asarray(theirs)).pvalue > NOT_BY_CHANCE


def assert_same_rates(ours: Counter[Hashable], theirs: Counter[Hashable]) -> None:
    """Each outcome as often in one sample as in the other, within 4.5 standard errors."""
    n, m = ours.total(), theirs.total()
    for outcome in ours.keys() | theirs.keys():
        rate = (ours[outcome] + theirs[outcome]) / (n + m)
        error = math.sqrt(rate * (1 - rate) * (1 / n + 1 / m))
        assert abs(ours[outcome] / n - theirs[outcome] / m) <= 4.5 * error, outcome


def assert_rate(outcomes: torch.Tensor, rate: float) -> None:
    assert stats.binomtest(int(outcomes.sum()), outcomes.numel(), rate).pvalue > NOT_BY_CHANCE


class TestStreams:
    @pytest.mark.parametrize("kind", ["sim", "autoaugment", "randaugment", "digits_sim"])
    def test_random_parameters_depend_on_their_own_image_alone(self, kind: ViewKind) -> None:
        options = VIEWS["cifar100_lt"]
        index = torch.tensor([7, 3, 100_000, 3])
        together = sample_params(kind, options, seed=5, epoch=2, index=index, view=1)
        for row, image in enumerate(index):
            alone = sample_params(kind, options, seed=5, epoch=2, index=image[None], view=1)
            for ours, single in zip(together, alone, strict=True):
                assert torch.equal(ours[row], single[0])

    @pytest.mark.parametrize("part", ["seed", "epoch", "view"])
    def test_neighbouring_keys_have_nothing_in_common(self, part: str) -> None:
        one, other = sampled("sim", "cifar100_lt"), sampled("sim", "cifar100_lt", **{part: 1})
        for ours, theirs in ((one.place[:, 0], other.place[:, 0]), (one.areas[:, 0], other.areas[:, 0])):
            for shift in (0, 1):  # the same image, and the next
                correlation = np.corrcoef(ours[: MANY - shift], theirs[shift:])[0, 1]
                assert abs(correlation) < 4.5 / math.sqrt(MANY)

    def test_neighbouring_images_have_nothing_in_common(self) -> None:
        place = sampled("sim", "cifar100_lt").place
        assert abs(np.corrcoef(place[:-1, 0], place[1:, 0])[0, 1]) < 4.5 / math.sqrt(MANY)
        assert abs(np.corrcoef(place[:, 0], place[:, 1])[0, 1]) < 4.5 / math.sqrt(MANY)
        assert stats.kstest(place.flatten().numpy(), "uniform").pvalue > NOT_BY_CHANCE

    def test_seeds_may_be_large(self) -> None:
        one, other = (sampled("sim", "cifar100_lt", 10, seed=seed) for seed in (2**40, 2**40 + 1))
        assert not torch.equal(one.place, other.place)


class TestCrops:
    @pytest.mark.parametrize("size", [(32, 32), (375, 500), (60, 400), (400, 60)], ids=str)
    def test_resized_boxes_are_torchvisions(self, size: tuple[int, int]) -> None:
        """Among them long images, whose attempts often fail."""
        planned, params = plan_view("sim", VIEWS["imagenet_lt"]), sampled("sim", "imagenet_lt", 6000)
        height, width = (torch.full((6000,), side) for side in size)
        ours = resized_boxes(params, planned.ratio, height, width)
        torch.manual_seed(0)
        image = torch.empty(3, *size)
        theirs = np.array(
            [v1.RandomResizedCrop.get_params(image, list(planned.scale), list(planned.ratio)) for _ in range(6000)]
        )
        for column in range(4):
            assert_same_distribution(ours[:, column], theirs[:, column])
        assert_same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
        assert_same_distribution(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2])
        assert (ours >= 0).all()
        assert (ours[:, 0] + ours[:, 2] <= size[0]).all()
        assert (ours[:, 1] + ours[:, 3] <= size[1]).all()

    def test_padded_crops_and_cutout_may_lie_anywhere(self) -> None:
        params = sampled("autoaugment", "cifar100_lt")
        for places, count in ((params.place, 9), (params.cutout, 32)):
            for axis in range(2):
                found = np.bincount((places[:, axis] * count).long(), minlength=count)
                assert stats.chisquare(found).pvalue > NOT_BY_CHANCE

    @pytest.mark.parametrize("kind", ["crop_flip", "autoaugment", "sim", "randaugment"])
    def test_half_of_the_images_are_flipped(self, kind: ViewKind) -> None:
        assert_rate(sampled(kind, "cifar100_lt").flip, 0.5)

    def test_digits_are_never_flipped(self) -> None:
        assert not sampled("digits", "digits_lt").flip.any()


class TestJitter:
    def test_strengths_and_order_are_torchvisions(self) -> None:
        params = sampled("sim", "cifar100_lt")
        applied = params.operations[:, 0] > 0
        assert_rate(applied, VIEWS["cifar100_lt"].jitter_probability)
        assert ((params.operations[:, :4] > 0) == applied[:, None]).all()  # all four or none
        operations, magnitudes = params.operations[applied, :4], params.magnitudes[applied, :4]
        orders = Counter(map(tuple, operations.tolist()))
        assert len(orders) == 24
        assert stats.chisquare(list(orders.values())).pvalue > NOT_BY_CHANCE
        jitter = v1.ColorJitter(*VIEWS["cifar100_lt"].jitter)
        torch.manual_seed(0)
        ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        theirs = np.array([v1.ColorJitter.get_params(*ranges)[1:] for _ in range(5000)])
        for number, name in enumerate(JITTER):
            assert_same_distribution(magnitudes[operations == NUMBER[name]], theirs[:, number])

    def test_randaugments_jitter_has_no_hue_and_always_applies(self) -> None:
        operations = sampled("randaugment", "imagenet_lt").operations[:, :3]
        expected = sorted(NUMBER[name] for name in ("brightness", "contrast", "saturation"))
        assert (operations.sort(1).values == torch.tensor(expected)).all()

    @pytest.mark.parametrize("kind", ["sim", "sim_randaugment"])
    def test_gray_has_its_rate(self, kind: ViewKind) -> None:
        gray = sampled(kind, "imagenet_lt").operations[:, 4]
        assert_rate(gray == NUMBER["gray"], VIEWS["imagenet_lt"].gray_probability)
        assert set(gray.unique().tolist()) == {0, NUMBER["gray"]}


OURS = {
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
    "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
    "Color": "saturation",
    "AutoContrast": "auto_contrast",
    "SolarizeAdd": "solarize_add",
}


def test_autoaugment_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """How often each pair of operations comes, with the magnitudes that torchvision hands to its functions."""
    transform = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    recorded: list[tuple] = []

    def record(image: Image.Image, name: str, magnitude: float, **_: object) -> Image.Image:
        ours = OURS.get(name, name.lower())
        if ours in ("brightness", "contrast", "saturation", "sharpness"):
            magnitude += 1
        magnitude = (
            math.ceil(255 * magnitude) if ours == "solarize" else magnitude
        )  # the first whole value from there on
        magnitude = math.trunc(magnitude) if ours.startswith("translate") else magnitude
        recorded.append((ours, round(magnitude, 3)))
        return image

    monkeypatch.setattr(transform, "_apply_image_or_video_transform", record)
    torch.manual_seed(0)
    image = Image.new("RGB", (32, 32))
    theirs: Counter[Hashable] = Counter()
    for _ in range(10_000):
        recorded.clear()
        transform(image)
        theirs[tuple(recorded)] += 1
    params = sampled("autoaugment", "cifar100_lt")
    ours: Counter[Hashable] = Counter()
    for numbers, magnitudes in zip(params.operations.tolist(), params.magnitudes.tolist(), strict=True):
        pair = zip(numbers, magnitudes, strict=True)
        ours[tuple((OPERATIONS[number], round(magnitude, 3)) for number, magnitude in pair if number)] += 1
    assert_same_rates(ours, theirs)


def test_randaugment_is_timms() -> None:
    """How often each pair of operations comes, and the distribution of each one's arguments."""
    options = VIEWS["imagenet_lt"]
    transform = rand_augment_transform(options.randaugment, {})
    recorded: list[tuple[str, float]] = []

    def recorder(name: str):
        def record(image: Image.Image, *arguments: float, **_: object) -> Image.Image:
            recorded.append((OURS.get(name, name.lower()), arguments[0] if arguments else 0.0))
            return image

        return record

    for operation in transform.ops:
        operation.aug_fn = recorder(operation.name)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    pairs: Counter[Hashable] = Counter()
    theirs = defaultdict(list)
    for _ in range(MANY):
        recorded.clear()
        transform(None)
        pairs[tuple(name for name, _ in recorded)] += 1
        for name, argument in recorded:
            theirs[name].append(argument * (options.image_size if name.startswith("translate") else 1))
    params = sampled("randaugment", "imagenet_lt")
    operations, magnitudes = params.operations[:, 3:], params.magnitudes[:, 3:]
    ours: Counter[Hashable] = Counter(
        tuple(OPERATIONS[number] for number in numbers if number) for numbers in operations.tolist()
    )
    assert_same_rates(ours, pairs)
    assert len(theirs) == 15
    for name, arguments in theirs.items():
        found = magnitudes[operations == NUMBER[name]].double()
        # Both round to float32 somewhere: one grid for both, lest equal values tie apart.
        assert_same_distribution(found.numpy().round(3), np.array(arguments).round(3))


def test_the_digits_affine_is_torchvisions() -> None:
    affine = sampled("digits", "digits_lt").affine
    torch.manual_seed(0)
    theirs = np.array(
        [
            (angle, *shift, scale)
            for angle, shift, scale, _ in (
                v1.RandomAffine.get_params([-10, 10], [0.1, 0.1], [0.9, 1.1], None, [8, 8]) for _ in range(5000)
            )
        ]
    )
    for column in range(4):
        assert_same_distribution(affine[:, column], theirs[:, column])


@pytest.mark.parametrize("variant", ["rand-n2-m10-inc1", "rand-n2-m10-mstd101", "rand-n2-m10-tweights"])
def test_other_randaugments_are_refused(variant: str) -> None:
    with pytest.raises(ValueError, match="--loader torchvision"):
        plan_view("randaugment", dataclasses.replace(VIEWS["imagenet_lt"], randaugment=variant))
