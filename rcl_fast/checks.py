"""Checks every input of the loss: errors say what was wrong, what was expected, and how to mend it.

Shapes, dtypes and devices are always checked. Values are checked where that costs no host-device synchronisation
(tensors on the CPU, outside torch.compile), and everywhere with `validate=True`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

REDUCTIONS = ("mean", "sum", "none")


def check_features(features: Tensor) -> None:
    """Raises unless features are [N, D] or [B, V, D], floating point."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor, got {type(features).__name__}")
    if features.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"features must be float16, bfloat16, float32 or float64, got {features.dtype}; "
            "pass the projection head's output as it is"
        )
    if features.ndim not in (2, 3) or features.shape[-1] == 0:
        raise ValueError(
            f"features must be [N, D], or [B, V, D] with V views a sample, with D >= 1; got {list(features.shape)}"
        )


def check_labels(labels: Tensor, features: Tensor) -> None:
    """Raises unless labels are integers, [N] for features [N, D] and [B] for [B, V, D], on the features' device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor of integers, got {type(labels).__name__}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must have an integer dtype, got {labels.dtype}; use labels.long()")
    expected = [features.shape[0]]
    if list(labels.shape) != expected:
        hint = ""
        if features.ndim == 2 and labels.ndim == 1 and len(labels) and features.shape[0] % len(labels) == 0:
            views = features.shape[0] // len(labels)
            hint = f"; for {views} views a sample pass features as [{len(labels)}, {views}, {features.shape[1]}]"
        raise ValueError(
            f"labels must have shape {expected} to match features {list(features.shape)}, "
            f"got {list(labels.shape)}{hint}"
        )
    _check_device("labels", labels, features.device)


def check_label_values(labels: Tensor, num_classes: int, validate: bool = False) -> None:
    """Raises ValueError for a label outside [0, num_classes), where values can be read."""
    if not _values_can_be_read(labels, validate) or not labels.numel():
        return
    labels = labels.long()  # unsigned integers have no minimum in PyTorch
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"labels must lie in [0, {num_classes}) as class_counts, prototypes or compression have {num_classes} "
            f"rows; got {wrong}"
        )


def check_prototypes(prototypes: Tensor, features: Tensor) -> None:
    """Raises unless prototypes are [C, D], floating point, with the features' D and device."""
    if not isinstance(prototypes, Tensor):
        raise TypeError(f"prototypes must be a torch.Tensor [C, D], got {type(prototypes).__name__}")
    if not prototypes.dtype.is_floating_point:
        raise TypeError(f"prototypes must have a floating dtype, got {prototypes.dtype}")
    dimensions = features.shape[-1]
    if prototypes.ndim != 2 or prototypes.shape[1] != dimensions:
        raise ValueError(
            f"prototypes must be [C, {dimensions}] to match features {list(features.shape)}, "
            f"got {list(prototypes.shape)}"
        )
    _check_device("prototypes", prototypes, features.device)


def check_class_counts(class_counts: Tensor, rebalance: bool, validate: bool = False) -> None:
    """Raises unless class_counts are [C] numbers, all above 0 where `rebalance` takes their logarithm."""
    _check_class_vector("class_counts", class_counts)
    if not rebalance or not _values_can_be_read(class_counts, validate):
        return
    wrong = ~(class_counts > 0) | ~class_counts.isfinite()
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"class_counts must be finite and above 0, as rebalance=True takes log(class_counts); class {first} has "
            f"{class_counts[first].item()} ({int(wrong.sum())} such of {len(class_counts)}); leave out classes "
            "without training samples"
        )


def check_compression(compression: Tensor, validate: bool = False) -> None:
    """Raises unless compression is [C] finite factors, none below 0."""
    _check_class_vector("compression", compression)
    if not _values_can_be_read(compression, validate):
        return
    wrong = ~(compression >= 0) | ~compression.isfinite()
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"compression must hold a finite factor >= 0 for each class; class {first} has {compression[first].item()}"
        )


def check_class_rows_agree(rows: dict[str, int]) -> None:
    """Raises ValueError where class_counts, prototypes and compression have different numbers of classes."""
    if len(set(rows.values())) > 1:
        found = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise ValueError(f"class_counts, prototypes and compression must have one row per class alike; {found}")


def check_temperature(temperature: float) -> None:
    """Raises unless temperature is a finite number above 0."""
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a Python number, got {type(temperature).__name__}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, got {temperature} (the paper uses 0.1)")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_group(group: Any) -> None:
    """Raises unless group is None, or a process group that this process is a member of."""
    if group is None:
        return
    if group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of group; only the members of a group may call the loss with it")
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed process group or None, got {type(group).__name__}; after "
            "init_process_group() the group of all processes is torch.distributed.group.WORLD"
        )


def as_class_vector(name: str, values: Any, device: torch.device | None = None) -> Tensor:
    """Returns a list, array or tensor of one number per class as a tensor on `device`, where a tensor must be."""
    if isinstance(values, Tensor):
        if device is not None:
            _check_device(name, values, device)
        return values
    try:
        return torch.as_tensor(np.asarray(values), device=device)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a tensor, array or list of one number per class: {error}") from None


def _check_class_vector(name: str, values: Tensor) -> None:
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must be [C], one number per class; got shape {list(values.shape)}")
    if values.dtype == torch.bool or values.dtype.is_complex:
        raise TypeError(f"{name} must hold numbers, got {values.dtype}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}, features on {device}; move it, or its module, by .to({str(device)!r})"
        )


def _values_can_be_read(tensor: Tensor, validate: bool) -> bool:
    return not torch.compiler.is_compiling() and (validate or tensor.device.type == "cpu")
