"""The contrastive loss as a module, with its four presets; the losses of logits go by this name too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rcl_fast import checks
from rcl_fast.backends import select
from rcl_fast.batch import Factors
from rcl_fast.cross_entropy import LDAM, BalancedSoftmax, CBFocal, CrossEntropy, LogitAdjusted
from rcl_fast.exact_buffers import ExactBuffers
from rcl_fast.functional import contrastive_loss
from rcl_fast.presets import PRESETS, Preset

__all__ = [
    "LDAM",
    "PRESETS",
    "BalancedSoftmax",
    "CBFocal",
    "ContrastiveLoss",
    "CrossEntropy",
    "LogitAdjusted",
    "Preset",
]


class ContrastiveLoss(ExactBuffers):
    """`contrastive_loss` with its options fixed; the options' values are checked once, here.

    A state dict holds the compression, and a state dict without it, as earlier versions wrote, loads as none. Class
    counts are not in it: they belong to the data. `copy.deepcopy` shares the group; a process group can't be pickled.

    Args:
        class_counts: [C] training images a class; needed by `rebalance`. A buffer: moves with the module.
        compression: [C] factors, or None for 1 everywhere; `set_compression` changes them during training.
        others: as in `contrastive_loss`.

    Raises:
        TypeError, ValueError: as `contrastive_loss` does.
    """

    class_counts: Tensor | None
    compression: Tensor | None
    _small: tuple[Tensor, int] | None = None  # factors that are known to be at most 1, and their version

    def __init__(
        self,
        class_counts: Tensor | Sequence[int] | None = None,
        *,
        temperature: float = 0.1,
        class_average: bool = False,
        rebalance: bool = False,
        compression: Tensor | Sequence[float] | None = None,
        normalize: bool = True,
        anchors_are_keys: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        group: ProcessGroup | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__()
        checks.check_temperature(temperature)
        checks.check_flag("anchors_are_keys", anchors_are_keys)
        checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        checks.check_choice("backend", backend, select.BACKENDS)
        checks.check_group(group)
        if class_counts is not None:
            class_counts = checks.as_class_vector("class_counts", class_counts).clone()
            checks.check_class_counts(class_counts, rebalance, validate=True)
        elif rebalance:
            raise ValueError("rebalance=True needs class_counts: [C], the training images of each class")
        self.register_buffer("class_counts", class_counts, persistent=False)
        self.register_buffer("compression", None)
        self.set_compression(compression)
        self.temperature = temperature
        self.class_average = class_average
        self.rebalance = rebalance
        self.normalize = normalize
        self.anchors_are_keys = anchors_are_keys
        self.reduction = reduction
        self.backend = backend
        self.group = group
        self.validate = validate
        self.needs_prototypes: bool | None = None  # None: with or without

    @classmethod
    def preset(cls, name: str, class_counts: Tensor | Sequence[int], **options: Any) -> ContrastiveLoss:
        """Returns one of the paper's losses: "scl", "bcl", "scl_rcl" (its "RCL") or "bcl_rcl" (its "BCL+RCL").

        >>> criterion = ContrastiveLoss.preset("bcl_rcl", class_counts)
        >>> loss = criterion(features, labels, prototypes)
        """
        checks.check_choice("preset", name, tuple(PRESETS))
        preset = PRESETS[name]
        fixed: dict[str, Any] = {"class_average": preset.class_average, "rebalance": preset.rebalance}
        for option in fixed.keys() & options.keys():
            raise TypeError(f"the preset {name!r} sets {option}; use ContrastiveLoss({option}=...) for another mix")
        loss = cls(class_counts, **fixed, **options)
        loss.needs_prototypes = preset.prototypes
        return loss

    def set_compression(self, compression: Tensor | Sequence[float] | None) -> None:
        """Sets the factors [C] on the unit features of each class (section 3.3.2); None: 1 everywhere.

        They go to the device of class_counts, or of the factors before.

        Raises:
            TypeError, ValueError: they are not one finite factor, 0 or above, for each class.
        """
        if compression is not None:
            compression = checks.as_class_vector("compression", compression).clone()
            checks.check_compression(compression, validate=True)
            if self.class_counts is not None:
                rows = {"class_counts": len(self.class_counts), "compression": len(compression)}
                checks.check_class_rows_agree(rows)
            held = self.compression if self.class_counts is None else self.class_counts
            if held is not None:
                compression = compression.to(held.device)
        self.compression = compression
        self._look_at_compression()

    def _look_at_compression(self) -> None:
        """Notes factors that are all at most 1, with their version: a later change in place is then seen."""
        held, self._small = self.compression, None
        if held is None or held.is_inference() or not checks.values_can_be_read(held, validate=True):
            return
        if checks.are_at_most_one(held):
            self._small = held, held._version

    def _are_small(self) -> bool:
        """Returns whether no factor is above 1, as far as is known. Compiled code can't ask for a version."""
        if self._small is None or torch.compiler.is_compiling():
            return False
        noted, version = self._small
        return self.compression is noted and noted._version == version

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._look_at_compression()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Sets the compression, or none, before PyTorch loads; what is wrong with it goes to the errors."""
        key = f"{prefix}compression"
        *_, errors = arguments
        try:
            self.set_compression(state_dict.get(key))
        except (TypeError, ValueError) as error:
            errors.append(f"{key}: {error}")
        else:
            super()._load_from_state_dict(state_dict, prefix, *arguments)
            self._look_at_compression()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._look_at_compression()

    def __deepcopy__(self, memo: dict[int, Any]) -> ContrastiveLoss:
        memo[id(self.group)] = self.group  # a copy computes with the same processes
        copied = memo[id(self)] = self.__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        prototypes: Tensor | None = None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
    ) -> Tensor:
        """Returns a scalar, or [N] for "none"; features [N, D] or [B, V, D], labels [N] or [B], prototypes [C, D].

        keys [Q, D] with key_labels [Q] are more keys.
        """
        if self.needs_prototypes is not None and self.needs_prototypes != (prototypes is not None):
            wants = "needs prototypes [C, D]" if self.needs_prototypes else "is defined without prototypes"
            raise ValueError(f"this preset {wants}; ContrastiveLoss(...) without a preset takes either")
        return contrastive_loss(
            features,
            labels,
            class_counts=self.class_counts,
            prototypes=prototypes,
            temperature=self.temperature,
            class_average=self.class_average,
            rebalance=self.rebalance,
            compression=None if self.compression is None else Factors(self.compression, self._are_small()),
            normalize=self.normalize,
            keys=keys,
            key_labels=key_labels,
            anchors_are_keys=self.anchors_are_keys,
            reduction=self.reduction,
            backend=self.backend,
            group=self.group,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        shown = ("temperature", "class_average", "rebalance", "normalize", "anchors_are_keys", "reduction", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
