"""Batches that the loss tests draw."""

from typing import Any

import torch

LEAVES = ("features", "prototypes", "keys")


class Case(dict):
    """Keyword arguments of contrastive_loss, and a copy of them in another dtype with fresh leaves."""

    def to(self, dtype: torch.dtype) -> "Case":
        copied = Case(self)
        for name in LEAVES:
            if self.get(name) is not None:
                copied[name] = self[name].detach().to(dtype).requires_grad_()
        return copied

    def gradients(self) -> list[torch.Tensor]:
        return [self[name].grad for name in LEAVES if self.get(name) is not None]


def representable(numbers: torch.Tensor, dtype: torch.dtype, margin: float = 1) -> torch.Tensor:
    """Where the dtype holds them with all of its bits, and has `margin` times more room: 0 and normal numbers."""
    limits = torch.finfo(dtype)
    is_normal = (numbers.abs() >= margin * limits.smallest_normal) & (numbers.abs() <= limits.max / margin)
    return (numbers == 0) | is_normal


def draw_case(
    n: int = 60,
    dimensions: int = 20,
    classes: int = 9,
    *,
    seed: int = 0,
    prototypes: bool = True,
    compression: bool = False,
    keys: int | None = None,
    **options: Any,
) -> Case:
    """A long-tailed batch in float64, with so many more keys; some classes may be empty, some singletons."""
    generator = torch.Generator().manual_seed(seed)
    shares = 1 / torch.arange(1, classes + 1, dtype=torch.float64)
    labels = torch.multinomial(shares, n, replacement=True, generator=generator) if n else torch.zeros(0).long()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    case = Case(
        features=normal(n, dimensions),
        labels=labels,
        prototypes=normal(classes, dimensions) if prototypes else None,
        class_counts=torch.arange(classes, 0, -1) ** 3 + 1,
        compression=torch.linspace(0.005, 1.5, classes, dtype=torch.float64) if compression else None,
        **options,
    )
    if keys is not None:
        case["keys"] = normal(keys, dimensions)
        case["key_labels"] = torch.randint(classes, (keys,), generator=generator)
    return case.to(torch.float64)
