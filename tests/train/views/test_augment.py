from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import auto_augment as timm
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from rcl_fast.train.options import ViewKind, ViewOptions
from rcl_fast.train.views import augment as views_module
from rcl_fast.train.views.augment import augment, normalized
from rcl_fast.train.views.params import NUMBER, OPERATIONS, Plan, ViewParams, plan_view, resized_boxes, sample_params

NOTHING = Plan("none", False, (1.0, 1.0), (1.0, 1.0), (), True, (0, 0, 0), False, 0, 0)
FILL = (125, 30, 220)
OPTIONS = ViewOptions(
    image_size=32,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.5),
    x1="autoaugment",
    x2="sim",
    x3="sim",
    evaluation="as_is",
    randaugment="rand-n2-m9-p0.9-mstd2",
)


def noise(n: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, height, width), np.uint8))


def gradients(n: int, height: int = 32, width: int = 32) -> Tensor:
    """Smooth images of few, wide-spread or equal values, like photographs and drawings; the first is all one color."""
    random = np.random.default_rng(1)
    slopes, start = random.normal(0, 6, (2, n, 3, 1, 1)), random.integers(0, 256, (n, 3, 1, 1))
    slopes[:, 0] = 0
    values = start + slopes[0] * np.arange(height)[:, None] + slopes[1] * np.arange(width)
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))


def digits(n: int) -> Tensor:
    gray = np.rint(load_digits().images[:n] * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(gray)[:, None].expand(n, 3, 8, 8).contiguous()


def pictures(n: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.cat([noise(n // 2, height, width), gradients(n - n // 2, height, width)])


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def with_pillow(images: Tensor, change: Callable[..., Image.Image], *arguments: Tensor) -> Tensor:
    changed = [
        change(to_pil(image), *(value.item() for value in values))
        for image, *values in zip(images, *arguments, strict=True)
    ]
    return torch.stack([from_pil(image) for image in changed])


def chosen(n: int, **changes: Tensor) -> ViewParams:
    """Random parameters of nothing but `changes`."""
    nothing = torch.empty(n, 0)
    none = ViewParams(nothing, nothing, nothing, torch.zeros(n, dtype=torch.bool), nothing.long(), *(nothing,) * 3)
    return none._replace(**changes)


def only(name: str, images: Tensor, magnitudes: Tensor, **planned: object) -> Tensor:
    """That operation alone."""
    params = chosen(len(images), operations=torch.full((len(images), 1), NUMBER[name]), magnitudes=magnitudes[:, None])
    return augment(images, NOTHING._replace(slots=((name,),), **planned), params, images.shape[2])


def largest_difference(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


# Pillow's operations, with the magnitude that OPERATIONS describes.
IN_PLACE: dict[str, Callable[..., Image.Image]] = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
    "gray": lambda image, _: F.rgb_to_grayscale(image, num_output_channels=3),
    "auto_contrast": lambda image, _: F.autocontrast(image),
    "equalize": lambda image, _: F.equalize(image),
    "invert": lambda image, _: F.invert(image),
    "posterize": lambda image, bits: timm.posterize(image, int(bits)),
    "solarize": F.solarize,
    "solarize_add": lambda image, add: timm.solarize_add(image, int(add)),
    "sharpness": F.adjust_sharpness,
}
GEOMETRY: dict[str, Callable[..., Image.Image]] = {
    "shear_x": timm.shear_x,
    "shear_y": timm.shear_y,
    "translate_x": timm.translate_x_abs,
    "translate_y": timm.translate_y_abs,
    "rotate": timm.rotate,
}
MAGNITUDES = {
    "brightness": (0.0, 2.0),
    "contrast": (0.0, 2.0),
    "saturation": (0.0, 2.0),
    "hue": (-0.5, 0.5),
    "posterize": (1, 8),
    "solarize": (0, 256),
    "solarize_add": (0, 128),
    "sharpness": (0.0, 2.0),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "translate_x": (-16, 16),
    "translate_y": (-16, 16),
    "rotate": (-30, 30),
}


def magnitudes_of(name: str, n: int) -> Tensor:
    """Evenly over the operation's range, ends and middle included."""
    low, high = MAGNITUDES.get(name, (0.0, 0.0))
    values = torch.from_numpy(np.linspace(low, high, n)).float()
    return values.round() if isinstance(low, int) and name != "rotate" else values


IMAGES = {"noise": noise(101), "gradients": gradients(101), "digits": digits(101)}


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_each_operation_on_colors_is_pillows_to_the_bit(name: str, images: Tensor) -> None:
    magnitudes = magnitudes_of(name, len(images))
    expected = with_pillow(images, IN_PLACE[name], magnitudes)
    assert torch.equal(only(name, images, magnitudes), expected)


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_each_movement_is_pillows_to_the_bit(name: str, resample: str, images: Tensor) -> None:
    magnitudes = magnitudes_of(name, len(images))
    mode = Image.Resampling[resample.upper()]
    expected = with_pillow(
        images, lambda image, by: GEOMETRY[name](image, by, resample=mode, fillcolor=FILL), magnitudes
    )
    assert torch.equal(only(name, images, magnitudes, nearest=resample == "nearest", fill=FILL), expected)


def test_every_operation_is_tested() -> None:
    assert {"identity", *IN_PLACE, *GEOMETRY} == set(OPERATIONS)


VIEW_KINDS: tuple[ViewKind, ...] = ("autoaugment", "sim", "randaugment", "digits_sim")


def view_of(kind: ViewKind, images: Tensor) -> tuple[Plan, ViewParams]:
    return plan_view(kind, OPTIONS), sample_params(
        kind, OPTIONS, seed=0, epoch=0, index=torch.arange(len(images)), view=0
    )


def one_by_one(images: Tensor, planned: Plan, params: ViewParams) -> Tensor:
    """A resized crop and its operations on colors by Pillow, each image with its own random parameters."""
    side = torch.tensor(images.shape[2])
    views = []
    for row, image in enumerate(images):
        mine = ViewParams(*(part[row : row + 1] for part in params))
        top, left, height, width = resized_boxes(mine, planned.ratio, side[None], side[None])[0].int().tolist()
        view = F.resized_crop(to_pil(image), top, left, height, width, [32, 32])
        view = F.horizontal_flip(view) if mine.flip else view
        views.append(from_pil(in_order(view, mine.operations[0], mine.magnitudes[0])))
    return torch.stack(views)


def in_order(image: Image.Image, numbers: Tensor, magnitudes: Tensor) -> Image.Image:
    """Operations on colors by Pillow, one after the other."""
    for number, magnitude in zip(numbers.tolist(), magnitudes.tolist(), strict=True):
        if number:
            image = IN_PLACE[OPERATIONS[number]](image, magnitude)
    return image


def test_a_whole_view_is_pillows() -> None:
    """But for a rounding of the crop here and there, which later operations multiply."""
    images = gradients(64)
    planned, params = view_of("sim", images)
    apart = (augment(images, planned, params, 32).int() - one_by_one(images, planned, params).int()).abs()
    assert (apart == 0).float().mean() > 0.98
    assert apart.float().mean() < 0.1


@pytest.mark.parametrize("kind", VIEW_KINDS)
def test_shapes_that_do_not_depend_on_the_random_parameters_give_the_same_bits(
    kind: ViewKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU, torch.compile and CUDA graphs get, against what a CPU does with each operation's own views."""
    images = noise(48)
    arguments = (images, *view_of(kind, images), 32)
    expected = augment(*arguments)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.delattr(views_module, "_family_by_family")
    assert torch.equal(augment(*arguments), expected)


def test_randaugments_view_is_one_graph_of_the_same_bits() -> None:
    """test_cuda_graph.py compiles the views of the recipes that hold their images in memory."""
    images = noise(48)
    arguments = (images, *view_of("randaugment", images), 32)
    compiled = torch.compile(augment, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), augment(*arguments))


def test_normalized_views_lie_in_memory_as_convolutions_want_them() -> None:
    mean, std = torch.tensor(OPTIONS.mean), torch.tensor(OPTIONS.std)
    images = noise(4)
    views = normalized(images, mean, std)
    assert views.is_contiguous(memory_format=torch.channels_last)
    expected = F.normalize(images.float() / 255, list(OPTIONS.mean), list(OPTIONS.std))
    torch.testing.assert_close(views, expected, rtol=1e-6, atol=1e-6)


def test_cutout_is_the_square_of_the_views() -> None:
    """`Cutout` samples a pixel; `sample_params` a position in [0, 1), which falls into it."""
    white = torch.full((32 * 32, 3, 32, 32), 255, dtype=torch.uint8)
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    center = torch.stack([row, column], dim=-1).reshape(-1, 2)
    params = chosen(len(white), cutout=(center + 0.5).double() / 32)
    found = augment(white, NOTHING._replace(cutout=16), params, 32)
    for (top, left), view in zip((center - 8).tolist(), found, strict=True):
        expected = torch.full((3, 32, 32), 255, dtype=torch.uint8)
        expected[:, max(top, 0) : top + 16, max(left, 0) : left + 16] = 0
        assert torch.equal(view, expected)
