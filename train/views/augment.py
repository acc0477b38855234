"""Whole batches of views in PyTorch, as Pillow makes them one by one: the same bits, where its arithmetic allows it.

Between operations, pixels are whole numbers held as float32: processors are faster with these than with bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from rcl_fast.train.views.params import NUMBER, Plan, ViewParams, resized_boxes

RGB = tuple[int, int, int]
BLACK: RGB = (0, 0, 0)


def augment(images: Tensor, plan: Plan, params: ViewParams, side: int) -> Tensor:
    """Returns the views with these random parameters: uint8 [B, 3, H, W] -> uint8 [B, 3, side, side], on that device.

    On a GPU the host waits for nothing, and no shape depends on the parameters. Without a crop, H and W must be `side`.
    """
    views = _cropped(images, plan, params, side)
    for slot, names in enumerate(plan.slots):
        views = _operated(views, names, params.operations[:, slot], params.magnitudes[:, slot], plan)
    if plan.affine:
        degrees, right, down, scale = params.affine.double().unbind(1)
        views = _bytes(_bilinear(views.float(), _about_centre(side, side, degrees, right, down, scale), BLACK))
    return views * _outside_square(params.cutout, plan.cutout, side) if plan.cutout else views


def resize_center_crop(images: Tensor, resize: int, side: int) -> Tensor:
    """Resizes the shorter side to `resize` and cuts out the middle: uint8 [B, 3, H, W] -> uint8 [B, 3, side, side]."""
    shorter = min(images.shape[2:])
    rows, columns = (
        _middle(length, int(resize * length / shorter), side, images.device).expand(len(images), -1, -1)
        for length in images.shape[2:]
    )
    return _resampled(images, rows, columns)


def normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalises uint8 [B, 3, H, W] to float32, channels last in memory; `mean` and `std` [3] are in 0 to 1."""
    values = images.float().div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])
    return values.contiguous(memory_format=torch.channels_last)


def _cropped(images: Tensor, plan: Plan, params: ViewParams, side: int) -> Tensor:
    if plan.crop == "none":
        return images.clone()
    height, width = images.shape[2:]
    row = torch.arange(side, device=images.device).expand(len(images), -1)
    column = torch.where(params.flip[:, None], side - 1 - row, row)
    if plan.crop == "padded":
        top, left = (
            (params.place[:, axis, None] * (length + 2 * plan.padding - side + 1)).long() - plan.padding
            for axis, length in enumerate((height, width))
        )
        return _picked(images, (top + row)[:, :, None], (left + column)[:, None, :], BLACK)
    full = torch.ones_like(params.place[:, 0])
    top, left, rows, columns = resized_boxes(params, plan.ratio, height * full, width * full).float().unbind(1)
    return _resampled(images, _triangles(row, top, rows, side, height), _triangles(column, left, columns, side, width))


def _middle(length: int, resized: int, side: int, device: torch.device) -> Tensor:
    """Returns weights [1, side, length] of the middle `side` of `resized` pixels; black beyond, as in CenterCrop."""
    start = round((resized - side) / 2) if resized >= side else -((side - resized) // 2)
    at = torch.arange(start, start + side, device=device)[None]
    first, whole = torch.zeros(1, device=device), torch.full((1,), float(length), device=device)
    inside = (at >= 0) & (at < resized)
    return _triangles(at.clamp(0, resized - 1), first, whole, resized, length) * inside[:, :, None]


def _triangles(at: Tensor, start: Tensor, length: Tensor, resized: int, inputs: int) -> Tensor:
    """Returns the weights [B, S, inputs] of Pillow's bilinear resizing, which averages where it shrinks.

    It resizes the `length` [B] pixels from `start` [B] on to `resized`; the weights are of its pixels `at` [B, S].
    """
    scale = (length / resized)[:, None]
    pixel = torch.arange(inputs, device=at.device)
    centre = start[:, None] + (at + 0.5) * scale - 0.5
    distance = (pixel - centre[:, :, None]).abs_() / scale.clamp(min=1)[:, :, None]
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weights = (1 - distance).clamp_(min=0).mul_(inside[:, None])
    return weights.div_(weights.sum(2, keepdim=True))


def _resampled(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Applies weights `rows` [B, S, H] and `columns` [B, S, W] to uint8 [B, 3, H, W]; returns uint8 [B, 3, S, S]."""
    at_once = 64 if images.device.type == "cpu" else len(images)  # what a core's cache holds
    parts = zip(images.split(at_once), rows.split(at_once), columns.split(at_once), strict=True)
    return torch.cat([_both_ways(*part) for part in parts])


def _both_ways(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    lines = images.transpose(1, 2)  # with the colours between rows and columns, one product serves all three
    wide = (lines.flatten(1, 2).float() @ columns.mT).add_(0.5).floor_()  # Pillow rounds here too
    made = _bytes((rows @ wide.unflatten(1, lines.shape[1:3]).flatten(2)).add_(0.5))
    return made.unflatten(2, (images.shape[1], -1)).transpose(1, 2).contiguous()


def _bytes(pixels: Tensor) -> Tensor:
    """Returns uint8, without the fraction; a cast straight to uint8 takes a CPU four times as long."""
    return pixels.to(torch.int16).to(torch.uint8)


Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(float32 pixels [b, 3, H, W], operations and magnitudes [b, 1, 1, 1]) -> pixels, whose fraction is cut off after. It
may overwrite its input."""


def _operated(views: Tensor, names: tuple[str, ...], operations: Tensor, magnitudes: Tensor, plan: Plan) -> Tensor:
    """Applies one operation to each view: `operations` int64 [B] are among `names`, or the identity."""
    changes: list[tuple[frozenset[str], Change]] = [
        (family, partial(change, plan)) for family, change in _FAMILIES if not family.isdisjoint(names)
    ]
    if views.device.type == "cpu" and not torch.compiler.is_compiling():
        return _family_by_family(views, changes, operations, magnitudes)
    return _every_family(views, changes, operations, magnitudes)


def _family_by_family(
    views: Tensor, changes: list[tuple[frozenset[str], Change]], operations: Tensor, magnitudes: Tensor
) -> Tensor:
    """Applies each family of operations to its own views only. On a GPU, counting these would make the host wait."""
    number = torch.zeros_like(operations)
    for k, (family, _) in enumerate(changes, start=1):
        number += k * _among(family, operations)
    order = number.argsort()
    sizes = number.bincount(minlength=len(changes) + 1).tolist()
    by_family = [each.index_select(0, order).split(sizes) for each in (views, operations, magnitudes)]
    untouched, *parts = zip(*by_family, strict=True)
    made = [
        _changed(change, *part) if len(part[0]) else part[0] for (_, change), part in zip(changes, parts, strict=True)
    ]
    return torch.cat([untouched[0], *made]).index_select(0, order.argsort())


def _every_family(
    views: Tensor, changes: list[tuple[frozenset[str], Change]], operations: Tensor, magnitudes: Tensor
) -> Tensor:
    """Applies each family of operations to all views and keeps the result for its own, so that all shapes are fixed."""
    for family, change in changes:
        chosen = _among(family, operations)[:, None, None, None]
        views = torch.where(chosen, _changed(change, views, operations, magnitudes), views)
    return views


def _changed(change: Change, views: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    return _bytes(change(views.float(), operations[:, None, None, None], magnitudes[:, None, None, None]))


def _among(family: frozenset[str], operations: Tensor) -> Tensor:
    return (sum(1 << NUMBER[name] for name in family) >> operations) & 1 == 1


def _is(name: str, operations: Tensor) -> Tensor:
    return operations == NUMBER[name]


def _gray(pixels: Tensor) -> Tensor:
    """Returns [B, 1, H, W], as Pillow's mode L. The sums stay below 2^24, where float32 holds every whole number."""
    red, green, blue = pixels.split(1, 1)
    weighted = (19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471)
    return weighted.add_(2**15).mul_(2**-16).floor_()


def _mixed(start: Tensor, pixels: Tensor, factors: Tensor) -> Tensor:
    """Returns `start` for factor 0, `pixels` for 1, and extrapolates beyond, all clamped. Overwrites `pixels`."""
    return pixels.sub_(start).mul_(factors).add_(start).clamp_(0, 255)


def _blended(plan: Plan, pixels: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Changes brightness, contrast or saturation, or turns gray, which is saturation with factor 0."""
    gray = _gray(pixels)
    mean = (gray.mean((1, 2, 3), dtype=torch.float64, keepdim=True) + 0.5).floor().float()
    of_brightness, of_contrast = (_is(name, operations).float() for name in ("brightness", "contrast"))
    start = gray.mul_(1 - of_brightness - of_contrast).add_(mean * of_contrast)
    return _mixed(start, pixels, magnitudes)


def _sharpened(plan: Plan, pixels: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Changes sharpness relative to Pillow's SMOOTH filter, which weighs the middle by 5/13 and leaves the border."""
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    middle = pixels[:, :, 1:-1, 1:-1]
    smooth = ((around + 4 * middle) / 13 + 0.5).floor_()
    _mixed(smooth, middle, magnitudes)
    return pixels


def _shifted_hue(plan: Plan, pixels: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Shifts the hue in Pillow's HSV, which has whole numbers from 0 to 255."""
    value, least = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    spread = value - least
    saturation = (spread / value.clamp(min=1)).mul_(255).floor_()
    shift = (magnitudes.double() * 255).trunc().float()
    hue = _without_whole((_hue(pixels, value, spread) + shift).div_(256))
    centre = 255 + 170 * torch.arange(3, device=pixels.device)[:, None, None]
    share = (512 * hue - centre).abs_().sub_(255).abs_().sub_(85).clamp_(0, 85)  # of the saturation, in 85ths
    return (255 * 85 - share.mul_(saturation)).mul_(value).div_(255 * 85).add_(0.5)


def _hue(pixels: Tensor, value: Tensor, spread: Tensor) -> Tensor:
    """Returns the hue [B, 1, H, W], from 0 to 255; `value` is the largest channel, `spread` that less the least one."""
    red, green, blue = ((value - pixels) / spread.clamp(min=1)).split(1, 1)
    # 1 for the largest channel (of equal ones the first), else 0; comparisons would be slower.
    is_red, is_green, _ = (pixels - value).add_(1).clamp_(min=0).split(1, 1)
    is_green = is_green * (1 - is_red)
    is_blue = 1 - is_red - is_green
    more = is_red * blue + is_green * red + is_blue * green
    less = is_red * green + is_green * blue + is_blue * red
    sixths = ((2 * is_green + 4 * is_blue).double() + more - less).float()  # Pillow rounds here and not before
    return _without_whole(sixths / 6).mul_(255).floor_()


def _without_whole(turns: Tensor) -> Tensor:
    return turns.sub_(turns.floor())


def _looked_up(plan: Plan, pixels: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Applies an operation that maps each value of a channel to another: by a table [B, 3, 256] and one look-up."""
    index = pixels.flatten(2).long()
    operations, magnitudes = operations[..., 0], magnitudes[..., 0]
    values = torch.arange(256, dtype=torch.float32, device=pixels.device)
    lost = (1 << (8 - magnitudes.long().clamp(0, 8))).float()  # how many values posterize maps to one
    darkest, brightest = pixels.flatten(2).amin(2, keepdim=True), pixels.flatten(2).amax(2, keepdim=True)
    table = values
    for name, changed in (
        ("invert", 255 - values),
        ("posterize", values - values.remainder(lost)),
        ("solarize", torch.where(values < magnitudes, values, 255 - values)),
        ("solarize_add", torch.where(values < 128, (values + magnitudes).clamp_(max=255), values)),
        ("auto_contrast", _stretched(values, darkest, brightest)),
        ("equalize", _equalized(values, index)),
    ):
        table = torch.where(_is(name, operations), changed, table)
    return table.gather(2, index).view_as(pixels)


def _stretched(values: Tensor, darkest: Tensor, brightest: Tensor) -> Tensor:
    """Returns the table [B, 3, 256] that maps `darkest` to 0 and `brightest` to 255."""
    spread = (brightest - darkest).clamp(min=1).double()
    scale = torch.full_like(spread, 255) / spread  # not 255 / spread, which torch rounds twice
    stretched = (values * scale - darkest * scale).clamp_(0, 255).floor_().float()
    return torch.where(brightest > darkest, stretched, values)


def _equalized(values: Tensor, index: Tensor) -> Tensor:
    """Returns the table [B, 3, 256] that maps a value to the share of `index` [B, 3, pixels] below it, as in Pillow."""
    pixels = index.shape[2]
    counts = torch.zeros(*index.shape[:2], 256, device=index.device)
    counts.scatter_add_(2, index, torch.ones((), device=index.device).expand_as(index))
    until = counts.cumsum(2)
    below_brightest = torch.where(until < pixels, until, 0).amax(2, keepdim=True)
    step = (below_brightest / 255).floor()
    equalized = ((step / 2).floor() + until - counts).div_(step.clamp(min=1)).floor_().clamp_(max=255)
    return torch.where(step > 0, equalized, values)


Matrix = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""(a, b, c, d, e, f) float64 [B]: the pixel at (x, y) is taken from (a·x + b·y + c, d·x + e·y + f)."""


def _moved(plan: Plan, pixels: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    operations, magnitudes = operations.flatten(), magnitudes.double().flatten()
    shear_x, shear_y, right, down, degrees = (
        torch.where(_is(name, operations), magnitudes, 0)
        for name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
    )
    height, width = pixels.shape[2:]
    a, b, c, d, e, f = _about_centre(height, width, -degrees, right * 0, down * 0, torch.ones_like(right))
    matrix = a, b + shear_x, c + right, d + shear_y, e, f + down
    return (_nearest if plan.nearest else _bilinear)(pixels, matrix, plan.fill)


def _about_centre(height: int, width: int, degrees: Tensor, right: Tensor, down: Tensor, scale: Tensor) -> Matrix:
    """Returns the matrix that turns clockwise and scales about the centre, then shifts."""
    radians = degrees.deg2rad()
    cos, sin = radians.cos() / scale, radians.sin() / scale
    x, y = width / 2, height / 2
    return cos, sin, x - cos * (x + right) - sin * (y + down), -sin, cos, y + sin * (x + right) - cos * (y + down)


def _nearest(pixels: Tensor, matrix: Matrix, fill: RGB) -> Tensor:
    """Reads the nearest pixel; positions are in 65,536ths of a pixel, as in Pillow."""
    row, column = _grid(pixels)
    a, b, c, d, e, f = ((65536 * part + 0.5).floor().long()[:, None, None] for part in _from_middles(matrix))
    return _picked(pixels, (d * column + e * row + f) >> 16, (a * column + b * row + c) >> 16, fill)


def _bilinear(pixels: Tensor, matrix: Matrix, fill: RGB) -> Tensor:
    """Reads by bilinear interpolation.

    The positions and sums are float64: Pillow cuts the fraction off, so the least error below a whole number shows.
    """
    row, column = (step + 0.5 for step in _grid(pixels))
    a, b, c, d, e, f = (part[:, None, None] for part in matrix)
    x, y = a * column + b * row + c, d * column + e * row + f
    height, width = pixels.shape[2:]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    from_left, from_top = (x - 0.5 - left)[:, None], (y - 0.5 - top)[:, None]
    left, top = left.long(), top.long()
    upper, lower = (_between(_at(pixels, row, left), _at(pixels, row, left + 1), from_left) for row in (top, top + 1))
    return torch.where(inside[:, None], _between(upper, lower, from_top).floor().float(), _colour(pixels, fill))


def _grid(pixels: Tensor) -> tuple[Tensor, Tensor]:
    height, width = pixels.shape[2:]
    return torch.arange(height, device=pixels.device)[:, None], torch.arange(width, device=pixels.device)


def _from_middles(matrix: Matrix) -> Matrix:
    """Returns the matrix for whole x and y, which stand for the middles of the pixels."""
    a, b, c, d, e, f = matrix
    return a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2


def _between(start: Tensor, end: Tensor, part: Tensor) -> Tensor:
    return start + (end - start) * part


def _picked(pixels: Tensor, row: Tensor, column: Tensor, fill: RGB) -> Tensor:
    """Returns the pixels [B, 3, S, S] at `row` and `column`, broadcast to [B, S, S]; `fill` outside of the image."""
    colour = _colour(pixels, fill)
    framed = functional.pad(pixels - colour, (1, 1, 1, 1))
    return _at(framed, row + 1, column + 1).add_(colour)


def _at(pixels: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Returns the pixels [B, 3, S, S] at `row` and `column`, broadcast to [B, S, S]; outside, those of the border."""
    height, width = pixels.shape[2:]
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    picked = pixels.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, 3, -1))
    return picked.unflatten(2, index.shape[1:])


def _colour(pixels: Tensor, colour: RGB) -> Tensor:
    """Returns the colour as [3, 1, 1]; making a tensor of a list would wait for the GPU."""
    return torch.cat([pixels.new_full((1, 1, 1), value) for value in colour])


def _outside_square(centre: Tensor, width: int, side: int) -> Tensor:
    """Returns uint8 [B, 1, side, side]: 0 in the square of `width` about the pixel of `centre` [B, 2], else 1."""
    start = (centre * side).floor()[:, :, None] - width // 2
    step = torch.arange(side, device=centre.device)
    rows, columns = ((step >= start) & (step < start + width)).to(torch.uint8).unbind(1)
    return (1 - rows[:, :, None] * columns[:, None, :])[:, None]


_FAMILIES: tuple[tuple[frozenset[str], Callable[..., Tensor]], ...] = (
    (frozenset({"brightness", "contrast", "saturation", "gray"}), _blended),
    (frozenset({"sharpness"}), _sharpened),
    (frozenset({"hue"}), _shifted_hue),
    (frozenset({"invert", "posterize", "solarize", "solarize_add", "auto_contrast", "equalize"}), _looked_up),
    (frozenset({"shear_x", "shear_y", "translate_x", "translate_y", "rotate"}), _moved),
)
