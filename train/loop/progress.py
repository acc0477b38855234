"""How far an epoch has come: its steps, and the mean of each loss part over the images so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """An epoch's progress, which a checkpoint within it holds. All but `seconds` and `waiting` is of all processes."""

    steps: int = 0
    skipped: int = 0  # of these steps; an earlier checkpoint lacks it, and its trainer did not count them as steps
    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0  # how many of these seconds were spent in the loader
    totals: dict[str, float] = field(default_factory=dict)  # of each loss part, summed over images
    counted: int = 0  # images in the totals, which lag some steps behind

    def count(self, losses: dict[str, float], images: int) -> None:
        """Adds one step's losses, which are means over `images`."""
        self.counted += images
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0.0) + value * images

    def means(self) -> dict[str, float]:
        return {name: total / self.counted for name, total in self.totals.items()}

    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
