"""The paper's losses by name, without PyTorch: a command line reads them before it loads that."""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """A named loss of the paper: what it sets, and whether it takes prototypes."""

    class_average: bool
    rebalance: bool
    prototypes: bool


PRESETS = {
    "scl": Preset(class_average=False, rebalance=False, prototypes=False),
    "bcl": Preset(class_average=True, rebalance=False, prototypes=True),
    "scl_rcl": Preset(class_average=False, rebalance=True, prototypes=False),
    "bcl_rcl": Preset(class_average=True, rebalance=True, prototypes=True),
}
