"""The augmented views of an image, and the view for evaluation: torchvision transforms from PIL to tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor, nn
from torchvision.transforms import v2

from rcl_fast.train.options import ViewKind, ViewOptions

View = Callable[[Image.Image], Tensor]


class Cutout(nn.Module):
    """A black square centred anywhere in the image, clipped at its border (DeVries & Taylor, 2017)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Tensor) -> Tensor:
        """Returns a copy of `image` [..., H, W], which is not yet normalised, with the square in it."""
        rows, columns = (self._interval(length) for length in image.shape[-2:])
        image = image.clone()
        image[..., rows, columns] = 0
        return image

    def _interval(self, length: int) -> slice:
        start = int(torch.randint(length, ())) - self.side // 2
        return slice(max(start, 0), min(start + self.side, length))


class RequireSize(nn.Module):
    """A check that passes an image of the given side through, and raises ValueError for any other.

    Args:
        what: what can't do with another size.
        instead: what can.
    """

    def __init__(self, side: int, what: str, instead: str) -> None:
        super().__init__()
        self.side = side
        self.what = what
        self.instead = instead

    def forward(self, image: Image.Image) -> Image.Image:
        if image.size != (self.side, self.side):
            width, height = image.size
            raise ValueError(
                f"it has {width}x{height} pixels, and {self.what} expects {self.side}x{self.side}: "
                f"set --image-size to that, or take {self.instead}"
            )
        return image


class RequireCrop(nn.Module):
    """A check that passes an image through whose border leaves room for the crop, and raises ValueError for others."""

    def __init__(self, side: int, padding: int) -> None:
        super().__init__()
        self.side = side
        self.padding = padding

    def forward(self, image: Image.Image) -> Image.Image:
        if min(image.size) + 2 * self.padding < self.side:
            width, height = image.size
            raise ValueError(
                f"it has {width}x{height} pixels, too few to crop {self.side}x{self.side} with a border of "
                f"{self.padding}: set a smaller --image-size, or a larger --crop-padding"
            )
        return image


def size_as_is(options: ViewOptions) -> RequireSize:
    """Returns the check of images for `--evaluation as_is`."""
    return RequireSize(options.image_size, "--evaluation as_is", "--evaluation resize_center_crop")


def size_of_digits(options: ViewOptions) -> RequireSize:
    """Returns the check of images for the view `digits`, which doesn't crop."""
    return RequireSize(options.image_size, "the view digits", "the view digits_sim")


def view(kind: ViewKind, options: ViewOptions) -> View:
    """Returns the random view of that kind: RGB image -> float32 [3, S, S], S = options.image_size, normalised.

    The view samples from torch's global generator, and for the RandAugment kinds from those of random and numpy too.
    """
    if kind == "crop_flip":
        return _to_tensor(_padded_crop_flip(options), options)
    if kind == "autoaugment":
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        cutout = [Cutout(options.cutout)] if options.cutout else []
        return _to_tensor([*_padded_crop_flip(options), policy], options, cutout)
    if kind == "randaugment":
        jitter = v2.ColorJitter(*options.jitter[:3], hue=0)
        return _to_tensor([*_resized_crop_flip(options), jitter, _rand_augment(options)], options)
    if kind == "sim":
        return _to_tensor(_sim(options), options)
    if kind == "sim_randaugment":
        return _to_tensor([*_sim(options), _rand_augment(options)], options)
    if kind == "digits":
        return _to_tensor([size_of_digits(options), _small_affine()], options)
    if kind == "digits_sim":
        crop = v2.RandomResizedCrop(options.image_size, scale=(0.5, 1.0), ratio=(0.9, 1.1), antialias=True)
        return _to_tensor([crop, _small_affine()], options)
    raise ValueError(f"unknown kind of view {kind!r}: expected one of {', '.join(ViewKind.__args__)}")


def evaluation_view(options: ViewOptions) -> View:
    """Returns the view for evaluation, which has nothing random: RGB image -> float32 [3, S, S], normalised."""
    size = options.image_size
    if options.evaluation == "as_is":
        return _to_tensor([size_as_is(options)], options)
    return _to_tensor([v2.Resize(options.resize, antialias=True), v2.CenterCrop(size)], options)


def _to_tensor(on_image: list, options: ViewOptions, on_pixels: list | None = None) -> View:
    """Returns `on_image` on the PIL image, then `on_pixels` on the uint8 tensor, then normalisation."""
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(options.mean, options.std)]
    return v2.Compose([*on_image, v2.PILToTensor(), *(on_pixels or []), *normalise])


def _padded_crop_flip(options: ViewOptions) -> list:
    size, padding = options.image_size, options.crop_padding
    return [RequireCrop(size, padding), v2.RandomCrop(size, padding=padding), v2.RandomHorizontalFlip()]


def _resized_crop_flip(options: ViewOptions) -> list:
    crop = v2.RandomResizedCrop(options.image_size, scale=options.crop_scale, antialias=True)
    return [crop, v2.RandomHorizontalFlip()]


def _sim(options: ViewOptions) -> list:
    jitter = v2.RandomApply([v2.ColorJitter(*options.jitter)], options.jitter_probability)
    return [*_resized_crop_flip(options), jitter, v2.RandomGrayscale(options.gray_probability)]


def _rand_augment(options: ViewOptions) -> Callable[[Image.Image], Image.Image]:
    fill = tuple(round(255 * mean) for mean in options.mean)
    return rand_augment_transform(
        options.randaugment, {"translate_const": int(options.image_size * 0.45), "img_mean": fill}
    )


def _small_affine() -> v2.RandomAffine:
    """Returns a small shift, turn and scaling, after which a digit is still the same; after a flip it would not be."""
    return v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
