"""Views as DALI graphs, on the CPU or a GPU: uint8 images [H, W, 3] in and out, between operations as with Pillow.

Nothing here is random: the parameters from `params.sample_params` come in with each image. The values are Pillow's to a
rounding. DALI's own operations differ from Pillow's: contrast is about 128, hue is in YIQ, equalize is OpenCV's, and
resized regions see beyond their border.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode
from torch import Tensor

from rcl_fast.train.options import ViewKind, ViewOptions
from rcl_fast.train.views.params import CROP_ATTEMPTS, NUMBER, OPERATIONS, Plan, ViewParams, plan_view

Node: TypeAlias = DataNode

GEOMETRY = OPERATIONS[NUMBER["shear_x"] :]  # their magnitudes come as matrices
WITHOUT_MAGNITUDE = {"gray", "auto_contrast", "equalize", "invert", *GEOMETRY}
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH
_ROUND = 1.5 * 2**52  # adding and subtracting it rounds a float64 to even, as Python and torch do


def check(kinds: Sequence[ViewKind], options: ViewOptions) -> None:
    """Raises ValueError for views that can't be made here."""
    names = {name for kind in kinds for slot in plan_view(kind, options).slots for name in slot}
    if "hue" in names and options.jitter[3] > 1 / 6:
        raise ValueError(f"--jitter: a hue of {options.jitter[3]} is above 1/6, which needs --loader torchvision")


def given(planned: Plan, params: ViewParams, size: int) -> dict[str, Tensor]:
    """Returns what the graph of a view needs for each of B images, by name: a pure function of the random parameters.

    The names depend on the plan alone. `size`: side of the view, in pixels.
    """
    flip = params.flip.float()
    inputs = {}
    if planned.crop != "none":
        inputs["place"] = params.place
    if planned.crop == "resized":
        inputs |= {
            "areas": params.areas,
            "ratios": params.ratios,
            "left": torch.stack([torch.zeros_like(flip), flip], dim=1),
            "right": torch.stack([torch.ones_like(flip), 1 - flip], dim=1),
        }
    elif planned.flips:
        inputs["flip"] = params.flip.int()
    numbers, magnitudes = with_hue_gathered(planned, params.operations, params.magnitudes)
    matrices = operation_matrices(numbers, magnitudes, size)
    for slot, names in enumerate(slots(planned)):
        inputs[f"number {slot}"] = numbers[:, slot].int()
        if set(names) - WITHOUT_MAGNITUDE:  # DALI warns of inputs that are not read
            inputs[f"magnitude {slot}"] = magnitudes[:, slot]
        if set(names) & set(GEOMETRY):
            inputs[f"matrix {slot}"] = matrices[:, slot]
    if planned.affine:
        inputs["affine"] = affine_matrices(params.affine, size)
    if planned.cutout:
        inputs["cutout"] = ((params.cutout * size).floor() - planned.cutout // 2).float()
    return {name: tensor.contiguous() for name, tensor in inputs.items()}


def random_view(images: Node, planned: Plan, options: ViewOptions, inputs: dict[str, Node]) -> Node:
    """Makes a view [S, S, 3] of images of any size; `inputs` are what `given` returns."""
    size = options.image_size
    if planned.crop == "resized":
        images = resized_crop(images, planned, size, inputs)
    if planned.crop == "padded":
        images = padded_crop(images, planned.padding, size, inputs["place"])
        if planned.flips:
            images = fn.flip(images, horizontal=inputs["flip"])
    images = _one_by_one(images, planned, inputs)
    if planned.affine:
        images = warp(images, inputs["affine"], False, planned.fill)
    if planned.cutout:
        images = fn.erase(
            images, anchor=inputs["cutout"], shape=(planned.cutout, planned.cutout), axes=(0, 1), fill_value=0
        )
    return images


def evaluation_view(images: Node, options: ViewOptions) -> Node:
    """Makes the view for evaluation: the middle [S, S, 3], after resizing where the options say so; black beyond."""
    size = options.image_size
    if options.evaluation == "resize_center_crop":
        sides = images.shape()[:2]
        shorter = fn.reductions.min(sides)
        resized = fn.cast(sides * options.resize // shorter, dtype=types.FLOAT)
        images = fn.resize(images, size=resized, antialias=True, subpixel_scale=False)
    start = _rounded((images.shape()[:2] - size) / _double(2))
    start = fn.cast(start, dtype=types.INT32)
    return fn.slice(images, start=start, shape=(size, size), axes=(0, 1), out_of_bounds_policy="pad")


def normalized(images: Node, options: ViewOptions) -> Node:
    """Normalises to float32 [S, S, 3], which is then permuted into channels_last.

    A view that doesn't crop has another size where its image has: it is cut or padded here, and left out afterwards.
    """
    mean, std = [255 * value for value in options.mean], [255 * value for value in options.std]
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="HWC",
        crop=(options.image_size, options.image_size),
        out_of_bounds_policy="pad",
        mean=mean,
        std=std,
    )


def resized_crop(images: Node, planned: Plan, size: int, inputs: dict[str, Node]) -> Node:
    """Cuts out the sampled box, resizes and flips it. A region of interest would see beyond the box's border."""
    start, extent = resized_box(images.shape(), planned.ratio, inputs["areas"], inputs["ratios"], inputs["place"])
    box = fn.slice(images, start=start, shape=extent, axes=(0, 1))
    return fn.resize(
        box, size=(size, size), antialias=True, roi_start=inputs["left"], roi_end=inputs["right"], roi_relative=True
    )


def resized_box(shape: Node, ratio: tuple[float, float], areas: Node, ratios: Node, place: Node) -> tuple[Node, Node]:
    """Returns (top, left) and (height, width), int32, as `params.resized_boxes` does; the size is known only here."""
    rows, columns = fn.cast(shape[0], dtype=types.FLOAT64), fn.cast(shape[1], dtype=types.FLOAT64)
    area = rows * columns * areas
    w, h = _rounded(dali_math.sqrt(area * ratios)), _rounded(dali_math.sqrt(area / ratios))
    fits = (w > 0) & (w <= columns) & (h > 0) & (h <= rows)
    urgency = fits * types.Constant(np.arange(CROP_ATTEMPTS, 0, -1, dtype=np.int32), device="cpu")
    highest = fn.reductions.max(urgency)
    if highest > 0:
        first = urgency == highest
        height, width = _only(h, first), _only(w, first)
        top = dali_math.floor(place[0] * (rows - height + 1))
        left = dali_math.floor(place[1] * (columns - width + 1))
    else:
        height = dali_math.min(rows, _rounded(columns / _double(ratio[0])))
        width = dali_math.min(columns, _rounded(rows * _double(ratio[1])))
        top = dali_math.floor((rows - height) / 2)
        left = dali_math.floor((columns - width) / 2)
    start = fn.cast(fn.stack(top, left), dtype=types.INT32)
    return start, fn.cast(fn.stack(height, width), dtype=types.INT32)


def padded_crop(images: Node, padding: int, size: int, place: Node) -> Node:
    """Cuts S x S pixels out of the image within its black border."""
    places = images.shape()[:2] + (2 * padding - size + 1)
    start = fn.cast(dali_math.floor(place * places), dtype=types.INT32) - padding
    return fn.slice(images, start=start, shape=(size, size), axes=(0, 1), out_of_bounds_policy="pad")


def slots(planned: Plan) -> tuple[tuple[str, ...], ...]:
    """Returns the plan's slots, with hue in a slot of its own, between colour jitter's operations before and after it.

    Hue is as much work as all the others together, and all images at once share it out better.
    """
    jitter = [slot for slot in planned.slots if "hue" in slot]
    if len(jitter) < 2:
        return planned.slots
    others = (tuple(name for name in jitter[0] if name != "hue"),) * (len(jitter) - 1)
    return (*others, ("hue",), *others, *planned.slots[len(jitter) :])


def with_hue_gathered(planned: Plan, numbers: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns numbers and magnitudes [B, slots] laid out for `slots`: the same operations in the same order."""
    count = sum("hue" in slot for slot in planned.slots)
    if count < 2:
        return numbers, magnitudes
    place = torch.arange(count)
    hue = (numbers[:, :count] == NUMBER["hue"]).int().argmax(1, keepdim=True)  # jitter is all or nothing
    before = torch.where(place < hue, numbers[:, :count], 0)[:, :-1]
    after = torch.where(place > hue, numbers[:, :count], 0)[:, 1:]
    rest = numbers[:, count:], magnitudes[:, count:]
    jitter = magnitudes[:, :count]
    return (
        torch.cat([before, numbers.gather(1, hue), after, rest[0]], dim=1),
        torch.cat([jitter[:, :-1], magnitudes.gather(1, hue), jitter[:, 1:], rest[1]], dim=1),
    )


def _one_by_one(images: Node, planned: Plan, inputs: dict[str, Node]) -> Node:
    """Applies, slot by slot, the operation that was sampled for each image, if any."""
    for slot, names in enumerate(slots(planned)):
        number = inputs[f"number {slot}"]
        magnitude = inputs.get(f"magnitude {slot}", number)
        for name in [name for name in names if name in COLOURS]:
            if number == NUMBER[name]:
                images = COLOURS[name](images, magnitude)
        images = _moved(images, planned, slot, inputs)
    return images


def _moved(images: Node, planned: Plan, slot: int, inputs: dict[str, Node]) -> Node:
    for matrix in [inputs[name] for name in inputs if name == f"matrix {slot}"]:
        if inputs[f"number {slot}"] >= NUMBER[GEOMETRY[0]]:
            images = warp(images, matrix, planned.nearest, planned.fill)
    return images


def brightness(images: Node, factor: Node) -> Node:
    return fn.brightness(images, brightness=factor)


def contrast(images: Node, factor: Node) -> Node:
    """Changes contrast about the mean gray. DALI's own takes the mean from the CPU, and a GPU would have to wait."""
    mean = dali_math.floor(fn.reductions.mean(_gray(images)) + 0.5)
    factor = _beside(images, factor)
    return fn.cast(images * factor + (mean - mean * factor), dtype=types.UINT8)


def saturation(images: Node, factor: Node) -> Node:
    return _blend(gray(images, factor), images, factor)


def hue(images: Node, turns: Node) -> Node:
    """Turns the hue by at most 1/6, in HSV: the largest and the smallest value of a pixel stay what they are.

    Turned forward, red becomes `largest - step` where green is at least blue, else `smallest + step`, to which it adds
    red - green, within those two values; green and blue do the same in turn. Turning backward is the same with red and
    blue exchanged.
    """
    backward = turns < 0
    if backward:
        images = _exchange_red_and_blue(images)
    red, green, blue = (fn.slice(images, start=[channel], shape=[1], axes=[2]) for channel in range(3))
    smallest = dali_math.min(dali_math.min(red, green), blue)
    largest = dali_math.max(dali_math.max(red, green), blue)
    step = fn.brightness(largest - smallest, brightness=6 * dali_math.abs(turns), dtype=types.INT16)
    rising, falling = smallest + step, largest - step

    def turned(value: Node, following: Node, last: Node) -> Node:
        start = rising + (following >= last) * (falling - rising)
        value = dali_math.max(dali_math.min(start + value - following, largest), smallest)
        return fn.cast(value, dtype=types.UINT8)

    images = fn.cat(turned(red, green, blue), turned(green, blue, red), turned(blue, red, green), axis=2)
    if backward:
        images = _exchange_red_and_blue(images)
    return images


def gray(images: Node, _: Node) -> Node:
    return fn.color_space_conversion(_gray(images), image_type=types.GRAY, output_type=types.RGB)


def auto_contrast(images: Node, _: Node) -> Node:
    """Stretches each channel to 0 to 255; a channel of a single value stays as it is."""
    low = fn.reductions.min(images, axes=(0, 1), keep_dims=True)
    spread = fn.reductions.max(images, axes=(0, 1), keep_dims=True) - low
    flat = spread == 0
    scale = (255 - 254 * flat) / fn.cast(spread + flat, dtype=types.FLOAT)
    return fn.cast((images - low * (spread > 0)) * scale, dtype=types.UINT8)


def equalize(images: Node, _: Node) -> Node:
    """Equalises each channel. Pillow counts the pixels below a value, DALI those up to it: the same on the negative.

    Pillow's step is a whole number of pixels, which stretches small images further; where it is 0, the channel stays.
    """
    even = invert(fn.equalize(invert(images, _)), _)
    largest = fn.reductions.max(images, axes=(0, 1), keep_dims=True)
    below = fn.reductions.sum(fn.cast(images < largest, dtype=types.UINT8), axes=(0, 1), keep_dims=True)
    below = fn.cast(below, dtype=types.FLOAT)
    step = dali_math.floor(below / 255)
    stays = step == 0
    scale = (step > 0) * below / (255 * (step + stays))
    return fn.cast(even * scale + images * stays, dtype=types.UINT8)


def invert(images: Node, _: Node) -> Node:
    return images ^ _byte(255)


def posterize(images: Node, bits: Node) -> Node:
    return images & _beside(images, fn.cast(256 - dali_math.pow(2.0, 8 - bits), dtype=types.UINT8))


def solarize(images: Node, threshold: Node) -> Node:
    return images ^ ((images >= _beside(images, threshold)) * _byte(255))


def solarize_add(images: Node, added: Node) -> Node:
    """Adds `added`, at most 128, to the values below 128."""
    return images + (images < 128) * _beside(images, fn.cast(added, dtype=types.UINT8))


def sharpness(images: Node, factor: Node) -> Node:
    """Changes sharpness relative to Pillow's SMOOTH filter, which leaves the border as it is."""
    sides = images.shape(dtype=types.INT32)[:2]
    inside = fn.filter(images, types.Constant(_SMOOTH, device=images.device), mode="valid")
    inside = fn.slice(inside, start=(-1, -1), shape=sides, axes=(0, 1), out_of_bounds_policy="pad")
    border = fn.erase(images, anchor=(1.0, 1.0), shape=fn.cast(sides - 2, dtype=types.FLOAT), axes=(0, 1))
    return _blend(inside | border, images, factor)


COLOURS: dict[str, Callable[[Node, Node], Node]] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
    "gray": gray,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "invert": invert,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "sharpness": sharpness,
}


def warp(images: Node, matrix: Node, nearest: bool, fill: tuple[int, int, int]) -> Node:
    """Reads (x, y) from where `matrix` [2, 3] says; `fill` where that is outside, without a seam, as in Pillow."""
    if nearest and not any(fill):
        return fn.warp_affine(images, matrix=matrix, interp_type=types.INTERP_NN, fill_value=0)
    inside = fn.warp_affine(fn.ones_like(images), matrix=matrix, interp_type=types.INTERP_NN, fill_value=0)
    images = fn.warp_affine(images, matrix=matrix, interp_type=types.INTERP_NN if nearest else types.INTERP_LINEAR)
    colour = types.Constant(np.array([[fill]], np.uint8), device=images.device)
    return images * inside + colour * (inside ^ _byte(1))


def operation_matrices(numbers: Tensor, magnitudes: Tensor, size: int) -> Tensor:
    """Returns the matrices for `warp`, float32 [..., 2, 3], of images of side `size`; the identity without geometry."""

    def only(name: str) -> Tensor:
        return torch.where(numbers == NUMBER[name], magnitudes.double(), 0)

    turned = _about_the_middle(torch.deg2rad(only("rotate")), torch.ones_like(magnitudes), size)
    zero = torch.zeros_like(magnitudes)
    added = [zero, only("shear_x"), only("translate_x"), only("shear_y"), zero, only("translate_y")]
    return (turned + torch.stack(added, dim=-1).unflatten(-1, (2, 3))).float()


def affine_matrices(affine: Tensor, size: int) -> Tensor:
    """Returns the matrices for `warp`, float32 [B, 2, 3], of images of side `size`, from `ViewParams.affine`."""
    degrees, columns, rows, scale = affine.double().unbind(1)
    matrices = _about_the_middle(-torch.deg2rad(degrees), scale, size)
    shift = matrices[:, :, :2] @ torch.stack([columns, rows], dim=1)[:, :, None]
    return torch.cat([matrices[:, :, :2], matrices[:, :, 2:] - shift], dim=2).float()


def _about_the_middle(radians: Tensor, scale: Tensor, size: int) -> Tensor:
    """Returns the matrices, float64 [..., 2, 3], of a counter-clockwise turn and an enlargement about the middle."""
    cos, sin = radians.cos() / scale, radians.sin() / scale
    middle = size / 2
    x = [cos, -sin, middle * (1 - cos + sin)]
    y = [sin, cos, middle * (1 - cos - sin)]
    return torch.stack([torch.stack(x, dim=-1), torch.stack(y, dim=-1)], dim=-2)


def _gray(images: Node) -> Node:
    """Returns the image in gray, [H, W, 1]."""
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _exchange_red_and_blue(images: Node) -> Node:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.BGR)


def _beside(images: Node, values: Node) -> Node:
    """Returns values from the CPU on the images' device; an operator given both would copy them without being asked."""
    return values.gpu() if images.device == "gpu" else values


def _blend(base: Node, images: Node, factor: Node) -> Node:
    """Returns base + factor · (images − base), rounded once: by a filter of two rows, OpenCV's fastest way on a CPU."""
    weights = fn.reshape(fn.stack(factor, 1 - factor), shape=[2, 1])
    rows = fn.reshape(fn.cat(images, base, axis=0), shape=[2, -1, 3], layout="HWC")
    blended = fn.filter(rows, _beside(images, weights), mode="valid")
    return fn.reshape(blended, images.shape(dtype=types.INT32), layout="HWC")


def _rounded(values: Node) -> Node:
    """Rounds float64 values, halves to even."""
    return (values + _double(_ROUND)) - _double(_ROUND)


def _only(values: Node, chosen: Node) -> Node:
    """Returns the one of the float64 values, which are whole numbers, that is chosen."""
    value = fn.reductions.sum(fn.cast(values * chosen, dtype=types.FLOAT))  # `sum` takes no float64
    return fn.cast(value, dtype=types.FLOAT64)


def _byte(value: int) -> types.ScalarConstant:
    return types.Constant(np.uint8(value))


def _double(value: float) -> types.ScalarConstant:
    return types.Constant(np.float64(value))
