"""The random parameters of a view, as tensors: a pure function of (seed, epoch, index, view).

The device and DALI loaders carry out what is sampled here. The torchvision loader samples inside its transforms;
tests/train/views/test_params.py holds the distributions to torchvision's and timm's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2

from rcl_fast.train.options import ViewKind, ViewOptions
from rcl_fast.train.views import rng
from rcl_fast.train.views.rng import Uniform

# The operations, and what the magnitude of each means. As in Pillow, a geometric one maps an output pixel to the place
# that it is read from, with the origin in the image's corner.
OPERATIONS = (
    "identity",
    "brightness",  # factor
    "contrast",  # factor, about the image's mean gray
    "saturation",  # factor
    "hue",  # shift, in turns
    "gray",
    "auto_contrast",
    "equalize",
    "invert",
    "posterize",  # bits kept
    "solarize",  # values from this one on are inverted
    "solarize_add",  # added to values below 128
    "sharpness",  # factor
    "shear_x",  # x + magnitude · y
    "shear_y",  # y + magnitude · x
    "translate_x",  # x + magnitude, pixels
    "translate_y",  # y + magnitude, pixels
    "rotate",  # degrees counter-clockwise, about the centre
)
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
JITTER = ("brightness", "contrast", "saturation", "hue")
CROP_ATTEMPTS = 10  # as in torchvision: where all fail, a resized crop takes the middle of the image


class Plan(NamedTuple):
    """The steps of a kind of view, in this order, and all that is not random in them."""

    crop: Literal["none", "padded", "resized"]
    flips: bool
    scale: tuple[float, float]  # share of the area that a resized crop takes
    ratio: tuple[float, float]  # width over height of a resized crop
    slots: tuple[tuple[str, ...], ...]  # places for one operation: the operations possible there besides "identity"
    nearest: bool  # geometry takes the nearest pixel, not a bilinear mean
    fill: tuple[int, int, int]  # red, green, blue of pixels that geometry reads from outside the image
    affine: bool  # a small shift, turn and scaling about the centre, bilinear, black outside
    cutout: int  # side of the black square, in pixels; 0: none
    padding: int  # black border that a padded crop is taken from, in pixels


class ViewParams(NamedTuple):
    """The random parameters of a view of B images. A tensor that the plan has no use for is empty: [B, 0]."""

    areas: Tensor  # float32 [B, 10]: share of the image's area, for each attempt at a resized crop
    ratios: Tensor  # float32 [B, 10]: width over height, for each attempt
    place: Tensor  # float64 [B, 2] in [0, 1): row and column of the crop, among all that fit
    flip: Tensor  # bool [B]
    operations: Tensor  # int64 [B, slots]: numbers in OPERATIONS
    magnitudes: Tensor  # float32 [B, slots]
    affine: Tensor  # float32 [B, 4]: degrees clockwise, columns and rows shifted (whole pixels), scale
    cutout: Tensor  # float64 [B, 2] in [0, 1): row and column of the square's centre


@cache
def plan_view(kind: ViewKind, options: ViewOptions) -> Plan:
    """Returns the plan of a kind of view. Raises ValueError for a RandAugment that only timm itself carries out."""
    base = Plan("none", False, options.crop_scale, (3 / 4, 4 / 3), (), True, (0, 0, 0), False, 0, 0)
    if kind == "digits":
        return base._replace(affine=True)
    if kind == "digits_sim":
        return base._replace(crop="resized", scale=(0.5, 1.0), ratio=(0.9, 1.1), affine=True)
    if kind in ("crop_flip", "autoaugment"):
        padded = base._replace(crop="padded", padding=options.crop_padding, flips=True)
        if kind == "crop_flip":
            return padded
        return padded._replace(slots=(_autoaugment_names(),) * 2, cutout=options.cutout)
    resized = base._replace(crop="resized", flips=True, nearest=False)
    if kind == "sim":
        return resized._replace(slots=_sim_slots(options))
    red, green, blue = (round(255 * value) for value in options.mean)
    names = tuple(_name(operation) for operation in _timm(options).ops)
    rand_augment = resized._replace(fill=(red, green, blue), slots=(names,) * _timm(options).num_layers)
    if kind == "randaugment":
        return rand_augment._replace(slots=_jitter_slots(options.jitter[:3]) + rand_augment.slots)
    if kind == "sim_randaugment":
        return rand_augment._replace(slots=_sim_slots(options) + rand_augment.slots)
    raise ValueError(f"unknown kind of view {kind!r}: expected one of {', '.join(get_args(ViewKind))}")


def sample_params(
    kind: ViewKind, options: ViewOptions, *, seed: int, epoch: int | Tensor, index: Tensor, view: int
) -> ViewParams:
    """Returns the random parameters of view number `view` (0 for x1) of the images `index` int64 [B], on its device.

    `epoch` may be a tensor int64 [] on that device: what is compiled or captured once then serves every epoch.
    """
    planned = plan_view(kind, options)
    uniform = rng.uniforms(seed, epoch, index, view)
    none = torch.empty(len(index), 0, device=index.device)
    resized = planned.crop == "resized"
    areas = rng.between(uniform(CROP_ATTEMPTS), *planned.scale) if resized else none
    ratios = rng.between(uniform(CROP_ATTEMPTS), *map(math.log, planned.ratio)).exp() if resized else none
    place = none if planned.crop == "none" else uniform(2)
    flip = uniform(1)[:, 0] < 0.5 if planned.flips else torch.zeros_like(index, dtype=torch.bool)
    operations, magnitudes = _operations(kind, options, uniform)
    affine = _small_affine(uniform, options.image_size) if planned.affine else none
    cutout = uniform(2) if planned.cutout else none
    return ViewParams(
        areas.float(), ratios.float(), place, flip, operations, magnitudes.float(), affine.float(), cutout
    )


def resized_boxes(params: ViewParams, ratio: tuple[float, float], height: Tensor, width: Tensor) -> Tensor:
    """Returns (top, left, height, width) of resized crops of images `height` × `width`: float64 [B, 4], whole pixels.

    It is the first attempt that fits, or else the middle of the image with its ratio clamped, as in torchvision.
    """
    rows, columns = height.double(), width.double()
    area = (rows * columns)[:, None] * params.areas.double()
    w, h = (area * params.ratios).sqrt().round(), (area / params.ratios).sqrt().round()
    fits = (w > 0) & (w <= columns[:, None]) & (h > 0) & (h <= rows[:, None])
    first = fits.int().argmax(1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    top = (params.place[:, 0] * (rows - h + 1)).floor()
    left = (params.place[:, 1] * (columns - w + 1)).floor()
    whole = columns / rows
    middle_w = torch.where(whole > ratio[1], (rows * ratio[1]).round(), columns)
    middle_h = torch.where(whole < ratio[0], (columns / ratio[0]).round(), rows)
    middle = torch.stack(
        [((rows - middle_h) / 2).floor(), ((columns - middle_w) / 2).floor(), middle_h, middle_w], dim=1
    )
    return torch.where(fits.any(1, keepdim=True), torch.stack([top, left, h, w], dim=1), middle)


def _operations(kind: ViewKind, options: ViewOptions, uniform: Uniform) -> tuple[Tensor, Tensor]:
    """Samples numbers int64 [B, slots] and magnitudes [B, slots] of operations, in the order of the plan's slots."""
    parts = []
    if kind in ("sim", "sim_randaugment"):
        parts += [_jitter(options.jitter, options.jitter_probability, uniform), _gray(options, uniform)]
    if kind == "randaugment":
        parts += [_jitter(options.jitter[:3], 1.0, uniform)]
    if kind in ("randaugment", "sim_randaugment"):
        parts += [_rand_augment(options, uniform) for _ in range(_timm(options).num_layers)]
    if kind == "autoaugment":
        parts += [_autoaugment(options.image_size, uniform)]
    if not parts:
        nothing = uniform(0)
        return nothing.long(), nothing
    return torch.cat([numbers for numbers, _ in parts], 1), torch.cat([values for _, values in parts], 1)


def _sim_slots(options: ViewOptions) -> tuple[tuple[str, ...], ...]:
    return (*_jitter_slots(options.jitter), ("gray",))


def _jitter_slots(strengths: tuple[float, ...]) -> tuple[tuple[str, ...], ...]:
    names = tuple(name for name, strength in zip(JITTER, strengths, strict=False) if strength)
    return (names,) * len(names)


def _jitter(strengths: tuple[float, ...], probability: float, uniform: Uniform) -> tuple[Tensor, Tensor]:
    """Samples torchvision's ColorJitter: each of the operations once, in random order; or none of them."""
    applied = uniform(1) < probability
    numbers, low, high = _jitter_table(strengths, applied.device).unbind(1)
    order = uniform(len(numbers)).argsort(1)
    factors = low + (high - low) * uniform(len(numbers))
    return torch.where(applied, numbers.long()[order], 0), factors.gather(1, order)


@torch.compiler.assume_constant_result  # traced, it would lose digits
def _jitter_table(strengths: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns float64 [operations, 3]: each one's number, smallest and largest magnitude."""
    return _table(_jitter_rows, strengths, device)


def _jitter_rows(strengths: tuple[float, ...]) -> NDArray[np.float64]:
    rows = [
        (NUMBER[name], -strength if name == "hue" else max(0.0, 1 - strength), (name != "hue") + strength)
        for name, strength in zip(JITTER, strengths, strict=False)
        if strength
    ]
    return np.array(rows, np.float64).reshape(-1, 3)


@cache
def _table(make: Callable[[Any], NDArray[np.float64]], argument: Any, device: torch.device) -> Tensor:
    """Returns make(argument) on the device, made once: Dynamo asks for a constant to be the same object each time."""
    return torch.from_numpy(make(argument)).to(device)


def _gray(options: ViewOptions, uniform: Uniform) -> tuple[Tensor, Tensor]:
    chosen = uniform(1) < options.gray_probability
    return torch.where(chosen, NUMBER["gray"], 0), torch.zeros_like(chosen, dtype=torch.float64)


# AutoAugment's operations (Cubuk et al., 2019), by torchvision's names.
_AUTOAUGMENT = {
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
    "Rotate": "rotate",
    "Brightness": "brightness",
    "Color": "saturation",
    "Contrast": "contrast",
    "Sharpness": "sharpness",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "AutoContrast": "auto_contrast",
    "Equalize": "equalize",
    "Invert": "invert",
}


@cache
def _torchvision() -> v2.AutoAugment:
    """Returns torchvision's policy. Its `_policies` and `_AUGMENTATION_SPACE` are private; the lock file pins them."""
    return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)


def _autoaugment_names() -> tuple[str, ...]:
    return tuple(dict.fromkeys(_AUTOAUGMENT[name] for policy in _torchvision()._policies for name, _, _ in policy))


def _autoaugment(side: int, uniform: Uniform) -> tuple[Tensor, Tensor]:
    """Samples one of the 25 pairs, and applies each of its operations with its probability."""
    chosen, applied, sign = uniform(1)[:, 0], uniform(2), 1 - 2 * (uniform(2) < 0.5).double()
    policies = _policies(side, applied.device)
    numbers, probability, start, change = policies[(chosen * len(policies)).long()].unbind(-1)
    return torch.where(applied <= probability, numbers.long(), 0), start + sign * change


@torch.compiler.assume_constant_result  # traced, it would lose digits
def _policies(side: int, device: torch.device) -> Tensor:
    """Returns the CIFAR-10 policy, float64 [25, 2, 4]: number, probability, the magnitude's mean and random part."""
    return _table(_policy_rows, side, device)


def _policy_rows(side: int) -> NDArray[np.float64]:
    rows = [
        [(NUMBER[_AUTOAUGMENT[name]], probability, *_magnitude(name, step, side)) for name, probability, step in policy]
        for policy in _torchvision()._policies
    ]
    return np.array(rows, np.float64)


def _magnitude(name: str, step: int | None, side: int) -> tuple[float, float]:
    """Returns an operation's mean magnitude, and what is added to it or subtracted from it at random."""
    magnitudes, signed = _torchvision()._AUGMENTATION_SPACE[name]
    if step is None:
        return 0.0, 0.0
    magnitude = magnitudes(10, side, side)[step].item()
    if name == "Solarize":
        return math.ceil(255 * magnitude), 0.0  # pixels are whole numbers, so this is the same threshold
    if name.startswith("Translate"):
        return 0.0, int(magnitude)
    start = 1.0 if _AUTOAUGMENT[name] in (*JITTER, "sharpness") else 0.0
    return (start, magnitude) if signed else (magnitude, 0.0)


def _small_affine(uniform: Uniform, side: int) -> Tensor:
    """Samples the digits' RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1))."""
    degrees, shift, scale = uniform(1), uniform(2), uniform(1)
    return torch.cat(
        [rng.between(degrees, -10, 10), (rng.between(shift, -0.1, 0.1) * side).round(), rng.between(scale, 0.9, 1.1)],
        dim=1,
    )


class _RandAugment(NamedTuple):
    ops: list[AugmentOp]
    num_layers: int


@cache
def _timm(options: ViewOptions) -> _RandAugment:
    """Returns the operations of the RandAugment string; raises ValueError for variants that are not sampled here."""
    parsed = rand_augment_transform(options.randaugment, {})
    unknown = sorted({op.name for op in parsed.ops} - _RAND_AUGMENT.keys())
    if unknown or parsed.choice_weights is not None or math.isinf(parsed.ops[0].magnitude_std):
        what = (
            f"operation {unknown[0]}"
            if unknown
            else "weighted choice"
            if parsed.choice_weights is not None
            else "uniform magnitude"
        )
        raise ValueError(f'--randaugment {options.randaugment}: its {what} needs "--loader torchvision"')
    return _RandAugment(parsed.ops, parsed.num_layers)


class _Argument(NamedTuple):
    """How timm turns the level, 0 to 10 (or more, with mmax), into an operation's magnitude."""

    name: str
    per_ten: float = 0.0
    start: float = 0.0
    signed: bool = False
    whole: bool = False
    at_most: float = math.inf


_RAND_AUGMENT = {
    "AutoContrast": _Argument("auto_contrast"),
    "Equalize": _Argument("equalize"),
    "Invert": _Argument("invert"),
    "Rotate": _Argument("rotate", 30.0, signed=True),
    "Posterize": _Argument("posterize", 4.0, whole=True),
    "Solarize": _Argument("solarize", 256.0, whole=True),
    "SolarizeAdd": _Argument("solarize_add", 110.0, whole=True, at_most=128.0),
    "Color": _Argument("saturation", 1.8, 0.1),
    "Contrast": _Argument("contrast", 1.8, 0.1),
    "Brightness": _Argument("brightness", 1.8, 0.1),
    "Sharpness": _Argument("sharpness", 1.8, 0.1),
    "ShearX": _Argument("shear_x", 0.3, signed=True),
    "ShearY": _Argument("shear_y", 0.3, signed=True),
    "TranslateXRel": _Argument("translate_x", 0.45, signed=True),  # as a share of the side
    "TranslateYRel": _Argument("translate_y", 0.45, signed=True),
}


def _name(operation: AugmentOp) -> str:
    return _RAND_AUGMENT[operation.name].name


def _rand_augment(options: ViewOptions, uniform: Uniform) -> tuple[Tensor, Tensor]:
    """Samples one layer of timm's RandAugment: any of its operations, with its probability and a normal magnitude."""
    chosen, applied, negative = uniform(1), uniform(1), uniform(1) < 0.5  # [B, 1]
    normal = (-2 * (1 - uniform(1)).log()).sqrt() * (2 * math.pi * uniform(1)).cos()
    arguments = _arguments(options, chosen.device)
    numbers, per_ten, start, signed, whole, at_most = arguments[(chosen * len(arguments)).long()].unbind(-1)
    any_op = _timm(options).ops[0]
    level = (any_op.magnitude + any_op.magnitude_std * normal).clamp(0, any_op.magnitude_max or 10)
    magnitude = level / 10 * per_ten + start
    magnitude = torch.where(whole > 0, magnitude.floor().minimum(at_most), magnitude)
    magnitude = torch.where(negative, magnitude * (1 - 2 * signed), magnitude)
    return torch.where(applied <= any_op.prob, numbers.long(), 0), magnitude


def _arguments(options: ViewOptions, device: torch.device) -> Tensor:
    """Returns float64 [operations, 6]: each one's number, and the numbers of its _Argument."""
    return _table(_argument_rows, options, device)


def _argument_rows(options: ViewOptions) -> NDArray[np.float64]:
    rows = []
    for operation in _timm(options).ops:
        argument = _RAND_AUGMENT[operation.name]
        scale = options.image_size if "Translate" in operation.name else 1
        rows.append((NUMBER[argument.name], argument.per_ten * scale, *argument[2:]))
    return np.array(rows, np.float64)
