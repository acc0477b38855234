"""Checks every input of the loss: errors say what was wrong, what was expected, and how to mend it.

Shapes, dtypes and devices are always checked. Values are checked where that costs no host-device synchronisation
(tensors on the CPU, outside torch.compile), and everywhere with `validate=True`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from rcl_fast.batch import Factors

REDUCTIONS = ("mean", "sum", "none")
TEMPERATURES = (1e-30, 1e30)


def check_features(features: Tensor) -> None:
    """Raises unless features are [N, D] or [B, V, D], floating point."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor, got {type(features).__name__}")
    check_floating("features", features, "the projection head's output")
    if features.ndim not in (2, 3) or features.shape[-1] == 0:
        raise ValueError(
            f"features must be [N, D], or [B, V, D] with V views a sample, with D >= 1; got {list(features.shape)}"
        )


def check_labels(labels: Tensor, features: Tensor) -> None:
    """Raises unless labels are integers, [N] for features [N, D] and [B] for [B, V, D], on the features' device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor of integers, got {type(labels).__name__}")
    check_integers(labels)
    _check_not_batched("labels", labels)
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
    check_device("labels", labels, features.device)


def check_label_values(labels: Tensor, num_classes: int, validate: bool = False, name: str = "labels") -> None:
    """Raises ValueError for a label outside [0, num_classes), where values can be read."""
    if not values_can_be_read(labels, validate) or not labels.numel():
        return
    labels = labels.long()  # unsigned integers have no minimum in PyTorch
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{name} must lie in [0, {num_classes}) as class_counts, prototypes or compression have {num_classes} "
            f"rows; got {wrong}"
        )


def check_prototypes(prototypes: Tensor, features: Tensor) -> None:
    """Raises unless prototypes are [C, D], floating point, with the features' D and device."""
    _check_rows("prototypes", "C", prototypes, features, "the head's output")


def check_keys(keys: Tensor | None, key_labels: Tensor | None, features: Tensor) -> None:
    """Raises unless keys are [Q, D], floating point, and key_labels integers [Q], with the features' D and device."""
    if keys is None:
        raise ValueError("key_labels need keys: [Q, D], the rows whose classes they are")
    _check_rows("keys", "Q", keys, features, "what the encoder made of them")
    if key_labels is None:
        raise ValueError(f"keys need key_labels: [{len(keys)}], the class of each of them")
    if not isinstance(key_labels, Tensor):
        raise TypeError(f"key_labels must be a torch.Tensor of integers, got {type(key_labels).__name__}")
    check_integers(key_labels, "key_labels")
    _check_not_batched("key_labels", key_labels)
    if list(key_labels.shape) != [len(keys)]:
        raise ValueError(
            f"key_labels must have shape {[len(keys)]} to match keys {list(keys.shape)}, got {list(key_labels.shape)}"
        )
    check_device("key_labels", key_labels, features.device)


def check_there_are_keys(anchors_are_keys: bool, keys: Tensor | None, prototypes: Tensor | None) -> None:
    """Raises ValueError where neither anchors nor keys nor prototypes are what anchors are compared with."""
    if not anchors_are_keys and keys is None and prototypes is None:
        raise ValueError(
            "anchors_are_keys=False leaves keys and prototypes to compare the anchors with, and neither is given; pass "
            "keys [Q, D] with key_labels [Q], where an empty queue has Q = 0, or prototypes [C, D]"
        )


def check_class_counts(class_counts: Tensor, rebalance: bool, validate: bool = False) -> None:
    """Raises unless class_counts are [C] numbers, all above 0 where `rebalance` takes their logarithm."""
    _check_class_vector("class_counts", class_counts)
    if not rebalance or not values_can_be_read(class_counts, validate):
        return
    counts = class_counts.double()  # unsigned integers can't be compared in PyTorch
    wrong = ~(counts > 0) | ~counts.isfinite()
    if wrong.any():
        raise ValueError(
            "class_counts must be finite and above 0, as the loss takes log(class_counts); "
            f"{_first_class(wrong, class_counts)}; leave out classes without training samples"
        )


def check_compression(compression: Tensor, validate: bool = False) -> None:
    """Raises unless compression is [C] factors that float32 holds, none below 0."""
    _check_class_vector("compression", compression)
    if not values_can_be_read(compression, validate):
        return
    wrong = ~(compression.double() >= 0) | ~compression.float().isfinite()  # unsigned integers have no >= in PyTorch
    if wrong.any():
        raise ValueError(
            f"compression must hold a factor >= 0 that is finite in float32 for each class; "
            f"{_first_class(wrong, compression)}"
        )


def as_factors(compression: Tensor | Sequence[float] | Factors, device: torch.device, validate: bool) -> Factors:
    """Returns checked compression factors on `device`, and what is known of them where values can be read for free."""
    given, known = compression if isinstance(compression, Factors) else (compression, False)
    values = as_class_vector("compression", given, device if isinstance(given, Tensor) else None)
    check_compression(values, validate)
    if values_can_be_read(values, validate):
        known = are_at_most_one(values)
    return Factors(values.to(device), known)


def are_at_most_one(compression: Tensor) -> bool:
    """Returns whether no factor is above 1; waits for the device."""
    return bool((compression.double() <= 1).all())  # unsigned integers can't be compared in PyTorch


def check_sample_counts(class_counts: Tensor) -> None:
    """Raises unless class_counts are [C] finite numbers, 1 or more: what has an effective number of samples."""
    check_class_counts(class_counts, rebalance=True)
    if not values_can_be_read(class_counts, validate=False):
        return
    wrong = class_counts.double() < 1
    if wrong.any():
        raise ValueError(
            "class_counts must be numbers of images, 1 or more, to have an effective number; "
            f"{_first_class(wrong, class_counts)}; shares of a data set have none"
        )


def check_class_weights(class_weights: Tensor) -> None:
    """Raises unless class_weights are [C] finite weights above 0."""
    _check_class_vector("class_weights", class_weights)
    if not values_can_be_read(class_weights, validate=True):
        return
    wrong = ~(class_weights > 0) | ~class_weights.isfinite()
    if wrong.any():
        raise ValueError(f"class_weights must be finite and above 0; {_first_class(wrong, class_weights)}")


def check_class_accuracy(class_accuracy: Tensor) -> None:
    """Raises unless class_accuracy is [C] fractions in [0, 1]; NaN is one that is not known."""
    _check_class_vector("class_accuracy", class_accuracy)
    if not values_can_be_read(class_accuracy, validate=True):
        return
    wrong = (class_accuracy < 0) | (class_accuracy > 1)
    if wrong.any():
        raise ValueError(
            "class_accuracy must be fractions in [0, 1], or NaN for a class without images; "
            f"{_first_class(wrong, class_accuracy)}; divide percentages by 100"
        )


def check_class_rows_agree(rows: dict[str, int]) -> None:
    """Raises ValueError where class_counts, prototypes and compression have different numbers of classes."""
    if len(set(rows.values())) > 1:
        found = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise ValueError(f"class_counts, prototypes and compression must have one row per class alike; {found}")


def check_temperature(temperature: float) -> None:
    """Raises unless temperature is a number in [1e-30, 1e30]: float32 then holds 1/T, and sums of many such logits."""
    _check_real("temperature", temperature)
    least, largest = TEMPERATURES
    if not least <= temperature <= largest:  # NaN neither
        raise ValueError(
            f"temperature must be above 0, from {least:g} to {largest:g}, got {temperature} (the paper uses 0.1)"
        )


def check_number(name: str, value: float, holds: Callable[[float], bool], expected: str) -> None:
    """Raises unless value is a Python number that `holds`; `expected` says the same in words."""
    _check_real(name, value)
    if not holds(float(value)):
        raise ValueError(f"{name} must {expected}, got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Raises unless value is a finite Python number, 0 or above."""
    check_number(name, value, lambda number: 0 <= number < math.inf, "be finite and not below 0")


def check_beta(beta: float) -> None:
    """Raises unless beta, of the effective number of samples, is a Python number in [0, 1)."""
    check_number("beta", beta, lambda number: 0 <= number < 1, "lie in [0, 1)")


def check_transforms(rows: Sequence[Tensor], backend: str, group: Any) -> None:
    """Raises RuntimeError where torch.func transforms the rows of a loss that does not run under it."""
    if torch.compiler.is_compiling() or not any(map(torch._C._functorch.is_functorch_wrapped_tensor, rows)):
        return
    who = f"backend={backend!r}" if group is None else "the loss with group="
    if group is not None or backend == "tiled":
        raise RuntimeError(f"{who} does not run under torch.func; use backend='dense' there, in one process")
    if backend != "dense" and any(map(_is_batched, rows)):
        raise RuntimeError(f"{who} does not run under torch.func.vmap; use backend='dense' there")


def check_constant(name: str, values: Tensor | None) -> None:
    """Raises ValueError for values of the classes that autograd follows: only plain PyTorch has a gradient by them."""
    if values is not None and values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require grad, as this backend has no gradient by it; pass {name}.detach(), or use "
            "backend='dense' in one process"
        )


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless value is True or False; a word like "no" would count as True."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")


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
            check_device(name, values, device)
        return values
    try:
        return torch.as_tensor(np.asarray(values), device=device)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a tensor, array or list of one number per class: {error}") from None


def check_floating(name: str, tensor: Tensor, source: str) -> None:
    """Raises TypeError unless the tensor has one of the four dtypes that the losses take."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}; pass {source} as it is"
        )


def _check_rows(name: str, count: str, rows: Tensor, features: Tensor, source: str) -> None:
    """Raises unless rows are [count, D], floating point, with the features' D and device."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [{count}, D], got {type(rows).__name__}")
    check_floating(name, rows, source)
    dimensions = features.shape[-1]
    if rows.ndim != 2 or rows.shape[1] != dimensions:
        raise ValueError(
            f"{name} must be [{count}, {dimensions}] to match features {list(features.shape)}, got {list(rows.shape)}"
        )
    check_device(name, rows, features.device)


def _check_not_batched(name: str, labels: Tensor) -> None:
    if _is_batched(labels):
        raise ValueError(
            f"{name} must be the same for all that torch.func.vmap runs over, and it runs over them too; call the loss "
            "once for each set of labels"
        )


def _check_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")


def _check_class_vector(name: str, values: Tensor) -> None:
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must be [C], one number per class; got shape {list(values.shape)}")
    if values.dtype == torch.bool or values.dtype.is_complex:
        raise TypeError(f"{name} must hold numbers, got {values.dtype}")


def _first_class(wrong: Tensor, values: Tensor) -> str:
    """Returns the first wrong class of [C] with its value, and how many are wrong, as words."""
    first = int(wrong.nonzero()[0])
    return f"class {first} has {values[first].item()} ({int(wrong.sum())} such of {len(values)})"


def check_integers(labels: Tensor, name: str = "labels") -> None:
    """Raises TypeError unless labels have an integer dtype."""
    if not (labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool):
        return
    if labels.ndim > 1 and labels.shape[-1] > 1:
        raise TypeError(
            f"{name} must be integers, one class a sample, got {labels.dtype} {list(labels.shape)}; soft and multi-hot "
            "labels have no meaning here: for two mixed labels a and b (mixup) mix two losses, lam * loss(..., a) + "
            "(1 - lam) * loss(..., b); where each row has a single 1, take labels.argmax(dim=1)"
        )
    raise TypeError(
        f"{name} must have an integer dtype, got {labels.dtype}; where they are whole numbers use {name}.long()"
    )


def check_device(name: str, tensor: Tensor, device: torch.device, reference: str = "features") -> None:
    """Raises ValueError for a tensor on another device."""
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}, {reference} on {device}; move it, or its module, by .to({str(device)!r})"
        )


def values_can_be_read(tensor: Tensor, validate: bool) -> bool:
    """Returns whether a check may look at values: on the CPU, or where `validate` allows to wait for the device."""
    if torch.compiler.is_compiling() or tensor.is_meta or _is_batched(tensor):
        return False
    return validate or tensor.device.type == "cpu"


def _is_batched(tensor: Tensor) -> bool:
    """Returns whether vmap runs over the tensor, within torch.func.grad or not: its values then decide no branch."""
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
