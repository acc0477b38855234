"""CIFAR's three views by kornia, a library of augmentations on batches: a peer of the device loader.

Its pixels are not the recipe's: Cutout is an erased square of the same area that never leaves the image, and float
images are never rounded to 256 values.
"""

from __future__ import annotations

import torch
from kornia import augmentation as K
from kornia.augmentation.auto import AutoAugment
from torch import Tensor

from rcl_fast.train.loaders.base import LoaderSpec
from rcl_fast.train.options import ViewOptions


def epoch(spec: LoaderSpec, device: torch.device, number: int) -> int:
    """Makes the views of every image of an epoch; returns how many images there were."""
    classifier, contrastive = views(spec.options)
    images = torch.from_numpy(spec.samples.images).to(device).permute(0, 3, 1, 2)
    made = 0
    for batch in spec.batches(number):
        pixels = images[torch.from_numpy(batch).to(device)].float() / 255
        classifier(pixels), contrastive(pixels), contrastive(pixels)
        made += len(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return made


def views(options: ViewOptions) -> tuple[K.AugmentationSequential, K.AugmentationSequential]:
    """Returns the augmentations of x1, and of x2 or x3.

    Each maps float [B, 3, 32, 32] in 0 to 1 to the same shape, augmented and normalised.
    """
    side = (options.image_size, options.image_size)
    normalize = K.Normalize(Tensor(options.mean), Tensor(options.std))
    area = (options.cutout / options.image_size) ** 2
    classifier = K.AugmentationSequential(
        K.RandomCrop(side, padding=options.crop_padding),
        K.RandomHorizontalFlip(),
        AutoAugment("cifar10"),
        K.RandomErasing(scale=(area, area), ratio=(1.0, 1.0), p=1.0),
        normalize,
    )
    contrastive = K.AugmentationSequential(
        K.RandomResizedCrop(side, scale=options.crop_scale),
        K.RandomHorizontalFlip(),
        K.ColorJitter(*options.jitter, p=options.jitter_probability),
        K.RandomGrayscale(p=options.gray_probability),
        normalize,
    )
    return classifier, contrastive
