"""Supervised contrastive losses for long-tailed classification (SCL, BCL, and either with RCL), fast and tested."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcl_fast import heads, metrics, weights
    from rcl_fast.backends.explain import explain_backend
    from rcl_fast.cross_entropy import LDAM, BalancedSoftmax, CBFocal, CrossEntropy, LogitAdjusted
    from rcl_fast.functional import contrastive_loss
    from rcl_fast.losses import ContrastiveLoss

    __version__: str

__all__ = [
    "LDAM",
    "BalancedSoftmax",
    "CBFocal",
    "ContrastiveLoss",
    "CrossEntropy",
    "LogitAdjusted",
    "contrastive_loss",
    "explain_backend",
    "heads",
    "metrics",
    "weights",
]
# Where a name is, if not in losses.py.
_HOMES = {"contrastive_loss": "functional", "explain_backend": "backends.explain"}
_SUBMODULES = (
    *("backends", "batch", "checks", "class_statistics", "cross_entropy", "distributed", "functional"),
    *("heads", "losses", "metrics", "presets", "provenance", "weights"),
)


def _found(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("rcl-fast")
        except metadata.PackageNotFoundError:  # a tree that nobody installed
            return "unknown"
    if name in _SUBMODULES:
        return import_module(f"rcl_fast.{name}")
    return getattr(import_module(f"rcl_fast.{_HOMES.get(name, 'losses')}"), name)


if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> object:
        """Loads a public name when it is first asked for: PyTorch, which all of them need, takes seconds."""
        if name not in (*__all__, *_SUBMODULES, "__version__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = _found(name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_SUBMODULES, "__version__"})
