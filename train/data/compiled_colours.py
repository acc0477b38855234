"""Pillow's operations on the colours of one image, to the bit, compiled by Numba: for DALI's threads on a CPU.

Between operations an image lies in planes, uint8 [3, pixels], which a processor's vector instructions work on.
"""

import numpy as np
from numba import njit
from numpy import float32
from numpy.typing import NDArray

from rcl_fast.train.data.draws import NUMBER

Bytes = NDArray[np.uint8]

_compiled = njit(nogil=True, error_model="numpy")  # checks of divisors would keep vector instructions out
_BRIGHTNESS = NUMBER["brightness"]
_CONTRAST = NUMBER["contrast"]
_SATURATION = NUMBER["saturation"]
_HUE = NUMBER["hue"]
_GRAY = NUMBER["gray"]
_AUTO_CONTRAST = NUMBER["auto_contrast"]
_EQUALIZE = NUMBER["equalize"]
_INVERT = NUMBER["invert"]
_POSTERIZE = NUMBER["posterize"]
_SOLARIZE = NUMBER["solarize"]
_SOLARIZE_ADD = NUMBER["solarize_add"]
_SHARPNESS = NUMBER["sharpness"]


@_compiled
def change(out: Bytes, image: Bytes, numbers: NDArray[np.int32], magnitudes: NDArray[np.float32]) -> None:
    """`image` [H, W, 3] after the operations of these numbers, one by one; those of no or another kind do nothing."""
    planes = np.empty((3, image.shape[0] * image.shape[1]), np.uint8)
    _apart(image.reshape(-1, 3), planes)
    for slot in range(len(numbers)):
        _changed(planes, image.shape[1], numbers[slot], magnitudes[slot])
    _together(planes, out.reshape(-1, 3))


@_compiled
def _apart(pixels: Bytes, planes: Bytes) -> None:
    for i in range(len(pixels)):
        planes[0, i], planes[1, i], planes[2, i] = pixels[i, 0], pixels[i, 1], pixels[i, 2]


@_compiled
def _together(planes: Bytes, pixels: Bytes) -> None:
    for i in range(len(pixels)):
        pixels[i, 0], pixels[i, 1], pixels[i, 2] = planes[0, i], planes[1, i], planes[2, i]


@_compiled
def _changed(planes: Bytes, width: int, number: int, magnitude: float) -> None:
    if number == _BRIGHTNESS:
        _mix_all(planes, 0, magnitude)
    elif number == _CONTRAST:
        _mix_all(planes, _mean_gray(planes), magnitude)
    elif number == _SATURATION:
        _saturate(planes, magnitude)
    elif number == _HUE:
        _turn_hue(planes, int(np.float64(magnitude) * 255) & 255)
    elif number == _GRAY:
        _saturate(planes, float32(0))
    elif number == _SHARPNESS:
        _sharpen(planes, width, magnitude)
    elif _AUTO_CONTRAST <= number <= _SOLARIZE_ADD:
        _look_up(planes, number, magnitude)


@_compiled
def _mix(start: float, value: float, factor: float) -> np.uint8:
    """`start` at factor 0, `value` at 1, and beyond."""
    return np.uint8(min(max(start + factor * (value - start), float32(0)), float32(255)))


@_compiled
def _gray(red: int, green: int, blue: int) -> int:
    """As Pillow's mode L."""
    return (np.int32(19595) * red + np.int32(38470) * green + np.int32(7471) * blue + np.int32(2**15)) >> 16


@_compiled
def _mix_all(planes: Bytes, start: int, factor: float) -> None:
    values, start = planes.reshape(-1), float32(start)
    for i in range(len(values)):
        values[i] = _mix(start, float32(values[i]), factor)


@_compiled
def _mean_gray(planes: Bytes) -> int:
    total = 0
    for i in range(planes.shape[1]):
        total += _gray(planes[0, i], planes[1, i], planes[2, i])
    return int(total / planes.shape[1] + 0.5)


@_compiled
def _saturate(planes: Bytes, factor: float) -> None:
    for i in range(planes.shape[1]):
        gray = float32(_gray(planes[0, i], planes[1, i], planes[2, i]))
        red, green, blue = float32(planes[0, i]), float32(planes[1, i]), float32(planes[2, i])
        planes[0, i] = _mix(gray, red, factor)
        planes[1, i] = _mix(gray, green, factor)
        planes[2, i] = _mix(gray, blue, factor)


@_compiled
def _turn_hue(planes: Bytes, shift: int) -> None:
    """In Pillow's HSV, which is whole numbers from 0 to 255; `shift` too."""
    for i in range(planes.shape[1]):
        red, green, blue = float32(planes[0, i]), float32(planes[1, i]), float32(planes[2, i])
        value, least = max(max(red, green), blue), min(min(red, green), blue)
        saturation = float32(np.int32((value - least) / max(value, float32(1)) * float32(255)))
        hue = _hue(red, green, blue, value, max(value - least, float32(1))) + float32(shift)
        hue = hue - float32(256) if hue >= float32(256) else hue
        planes[0, i] = _of_hue(float32(255), hue, saturation, value)
        planes[1, i] = _of_hue(float32(425), hue, saturation, value)
        planes[2, i] = _of_hue(float32(595), hue, saturation, value)


@_compiled
def _hue(red: float, green: float, blue: float, value: float, spread: float) -> float:
    """Of a pixel whose largest channel is `value`, and `spread` larger than the least."""
    red_off, green_off, blue_off = (value - red) / spread, (value - green) / spread, (value - blue) / spread
    if red == value:
        sixths = blue_off - green_off
    elif green == value:
        sixths = float32(2.0 + np.float64(red_off) - np.float64(blue_off))  # Pillow rounds here and not before
    else:
        sixths = float32(4.0 + np.float64(green_off) - np.float64(red_off))
    turns = sixths / float32(6)
    return float32(np.int32((turns + float32(1) if turns < 0 else turns) * float32(255)))


@_compiled
def _of_hue(opposite: float, hue: float, saturation: float, value: float) -> np.uint8:
    """The channel whose complement has half the hue `opposite`."""
    share = abs(abs(hue + hue - opposite) - float32(255)) - float32(85)  # of the saturation, in 85ths
    share = min(max(share, float32(0)), float32(85))
    return np.uint8((float32(255 * 85) - share * saturation) * value / float32(255 * 85) + float32(0.5))


@_compiled
def _sharpen(planes: Bytes, width: int, factor: float) -> None:
    """Away from Pillow's SMOOTH filter, which weighs the middle by 5 of 13 and leaves the border alone."""
    for after in planes.reshape(3, -1, width):
        before = after.copy()
        for y in range(1, len(before) - 1):
            for x in range(1, width - 1):
                around = np.int32(4) * before[y, x]
                for row in (before[y - 1], before[y], before[y + 1]):
                    around += np.int32(row[x - 1]) + np.int32(row[x]) + np.int32(row[x + 1])
                smooth = float32(np.int32(float32(around) / float32(13) + float32(0.5)))
                after[y, x] = _mix(smooth, float32(before[y, x]), factor)


@_compiled
def _look_up(planes: Bytes, number: int, magnitude: float) -> None:
    """What maps each value of a channel to another one, wherever it is."""
    table = np.empty(256, np.uint8)
    for plane in planes:
        if number == _AUTO_CONTRAST:
            _stretch(table, plane)
        elif number == _EQUALIZE:
            _equalize(table, plane)
        else:
            _replace(table, number, magnitude)
        for i in range(len(plane)):
            plane[i] = table[plane[i]]


@_compiled
def _stretch(table: Bytes, plane: Bytes) -> None:
    """From the darkest value to 0 and the brightest to 255."""
    darkest, brightest = 255, 0
    for i in range(len(plane)):
        darkest, brightest = min(darkest, plane[i]), max(brightest, plane[i])
    scale = 255.0 / (brightest - darkest)
    for value in range(256):
        stretched = int(value * scale - darkest * scale) if brightest > darkest else value
        table[value] = min(max(stretched, 0), 255)


@_compiled
def _equalize(table: Bytes, plane: Bytes) -> None:
    """From each value to the share of pixels below it, as Pillow rounds it; where its step is 0, all stays."""
    counts, brightest = np.zeros(256, np.int64), 0
    for i in range(len(plane)):
        counts[plane[i]] += 1
        brightest = max(brightest, plane[i])
    step = (len(plane) - counts[brightest]) // 255
    below = step // 2
    for value in range(256):
        table[value] = min(below // step, 255) if step else value
        below += counts[value]


@_compiled
def _replace(table: Bytes, number: int, magnitude: float) -> None:
    lost = 1 << max(8 - int(magnitude), 0)  # values that posterize makes one
    for value in range(256):
        changed = value
        if number == _INVERT or (number == _SOLARIZE and value >= magnitude):
            changed = 255 - value
        elif number == _POSTERIZE:
            changed = value - value % lost
        elif number == _SOLARIZE_ADD and value < 128:
            changed = min(value + int(magnitude), 255)
        table[value] = changed
