"""The one door to the loss: checks the input, and hands it to a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rcl_fast import checks
from rcl_fast.backends import select
from rcl_fast.batch import ContrastiveBatch, Factors, input_dtype, raw_rows, replaced, with_class_indices


def contrastive_loss(
    features: Tensor,
    labels: Tensor,
    *,
    class_counts: Tensor | Sequence[int] | None = None,
    prototypes: Tensor | None = None,
    temperature: float = 0.1,
    class_average: bool = False,
    rebalance: bool = False,
    compression: Tensor | Sequence[float] | Factors | None = None,
    normalize: bool = True,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    anchors_are_keys: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    group: ProcessGroup | None = None,
    validate: bool = False,
) -> Tensor:
    """Returns the supervised contrastive loss for long-tailed classes: SCL, BCL, and either with RCL.

    For anchor i with label y_i, over the keys k (all anchors but i, then `keys` and the prototypes)::

        ℓ_i = log Σ_k exp(s_ik + b_ik) − mean_{p ∈ P(i)} s_ip − log n[y_i]     (the last one with rebalance only)
        s_ik = h̃_i · h̃_k / temperature,  b_ik = log n[y_k] (rebalance) − log count_i[y_k] (class_average)

    Source: De Alvis et al., "Long-Tail Learning with Rebalanced Contrastive Loss", eq. 3-6 and section 3.3.2;
    Zhu et al., "Balanced Contrastive Learning" (CVPR 2022) for `class_average` and prototypes; He et al., "Momentum
    Contrast" (CVPR 2020) for keys of a queue, with `anchors_are_keys=False`.

    Args:
        features: [N, D], or [B, V, D] with V views a sample, which is the same as its reshape to [B·V, D] with each
            label repeated V times. float16, bfloat16, float32 or float64, not normalised. 16-bit inputs are
            accumulated in float32.
        labels: [N] or [B], any integer dtype. Values in [0, C), or any integers where none of class_counts,
            prototypes and compression says what C is; the same of key_labels.
        class_counts: [C] training images a class (n_j). Needed by `rebalance`.
        prototypes: [C, D] one more key per class, never an anchor; raw, like the features.
        temperature: T, from 1e-30 to 1e30.
        class_average: average the denominator over each class (eq. 3, 5).
        rebalance: weigh each key by its class's n_j (eq. 4-6).
        compression: [C] factor on the unit features, keys and prototypes of each class (section 3.3.2), finite in
            float32. The kernels are faster where none is known to be above 1: of a list, by `rcl_fast.batch.Factors`.
        normalize: divide features, keys and prototypes by their length; False where they already have unit length.
        keys: [Q, D] more keys, never anchors, such as a memory queue's (docs/keys.md); raw, like the features. Q may be
            0. A gradient goes into them if they require it.
        key_labels: [Q] the classes of `keys`, any integer dtype.
        anchors_are_keys: False compares the anchors with `keys` and prototypes alone, and counts those alone.
        reduction: "mean" over the anchors that have a positive, "sum", or "none": [N], 0 without a positive.
        backend: "triton" (GPU kernels), "tiled" (any device, no N×M memory), "dense" (plain PyTorch), "reference"
            (float64 oracle), or "auto": one of the first two, which `rcl_fast.explain_backend` tells.
        group: a torch.distributed process group: the loss is then of all its processes' anchors together, wherever
            they are, and every process must call it. Gradients are those that DistributedDataParallel's averaging
            makes one process's; see `rcl_fast.distributed`. `keys` are the same in every process. None: of this
            process alone.
        validate: check also the values of tensors on a GPU, which costs a synchronisation.

    Returns:
        A scalar, the same in every process of `group`, or [N] for "none", of this process's anchors: float64 for
        float64 inputs, float32 otherwise ("reference": always float64).

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: with `group`, where its processes do not agree on options, dtypes, widths or keys.
        ImportError: backend="triton" where Triton is not installed.

    >>> loss = contrastive_loss(features, labels, class_counts=counts, prototypes=prototypes,
    ...                         class_average=True, rebalance=True)                    # BCL+RCL
    """
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_choice("backend", backend, select.BACKENDS)
    checks.check_group(group)
    batch = _checked_batch(
        features,
        labels,
        class_counts=class_counts,
        prototypes=prototypes,
        temperature=temperature,
        class_average=class_average,
        rebalance=rebalance,
        compression=compression,
        normalize=normalize,
        validate=validate,
    )
    batch = _with_keys(batch, keys, key_labels, anchors_are_keys, validate)
    with torch.autocast(features.device.type, enabled=False):  # it would round the similarities to 16 bits
        return _loss(batch, reduction, backend, group)


def _loss(batch: ContrastiveBatch, reduction: str, backend: str, group: ProcessGroup | None) -> Tensor:
    if backend == "auto":
        backend = select.automatic(batch.features.device, input_dtype(batch))
    checks.check_transforms(raw_rows(batch), backend, group)
    if backend not in ("dense", "reference") or group is not None:
        checks.check_constant("class_counts", batch.class_counts)
        checks.check_constant("compression", batch.compression)
    if group is not None:
        from rcl_fast import distributed  # its decorator loads torch._dynamo, for seconds

        return distributed.contrastive_loss(batch, reduction, backend, group)
    batch, chosen = with_class_indices(batch), select.get(backend)
    return chosen.losses(batch) if reduction == "none" else chosen.total(batch, reduction)


def _checked_batch(
    features: Tensor,
    labels: Tensor,
    *,
    class_counts: Tensor | Sequence[int] | None,
    prototypes: Tensor | None,
    temperature: float,
    class_average: bool,
    rebalance: bool,
    compression: Tensor | Sequence[float] | Factors | None,
    normalize: bool,
    validate: bool,
) -> ContrastiveBatch:
    for name, flag in (("class_average", class_average), ("rebalance", rebalance), ("normalize", normalize)):
        checks.check_flag(name, flag)
    checks.check_features(features)
    checks.check_labels(labels, features)
    checks.check_temperature(temperature)
    factors: Factors | None = None
    rows = {}  # classes that each argument speaks of
    if class_counts is not None:
        class_counts = checks.as_class_vector("class_counts", class_counts, features.device)
        checks.check_class_counts(class_counts, rebalance, validate)
        rows["class_counts"] = len(class_counts)
    elif rebalance:
        raise ValueError("rebalance=True needs class_counts: [C], the training images of each class")
    if prototypes is not None:
        checks.check_prototypes(prototypes, features)
        rows["prototypes"] = len(prototypes)
    if compression is not None:
        factors = checks.as_factors(compression, features.device, validate)
        rows["compression"] = len(factors.values)
    checks.check_class_rows_agree(rows)

    if features.ndim == 3:
        labels = labels.repeat_interleave(features.shape[1])
        features = features.flatten(0, 1)
    num_classes = (*rows.values(), 0)[0]  # they agree; PyTorch 2.7 does not compile next() with a default
    if num_classes:
        checks.check_label_values(labels, num_classes, validate)
    return ContrastiveBatch(
        features=features,
        labels=labels.long(),
        prototypes=prototypes,
        class_counts=class_counts if rebalance else None,
        compression=None if factors is None else factors.values,
        num_classes=num_classes,
        temperature=float(temperature),
        class_average=bool(class_average),
        normalize=bool(normalize),
        factors_at_most_one=factors is not None and factors.at_most_one,
    )


def _with_keys(
    batch: ContrastiveBatch, keys: Tensor | None, key_labels: Tensor | None, anchors_are_keys: bool, validate: bool
) -> ContrastiveBatch:
    """Returns the batch with more keys, checked."""
    checks.check_flag("anchors_are_keys", anchors_are_keys)
    checks.check_there_are_keys(anchors_are_keys, keys, batch.prototypes)
    if keys is None and key_labels is None:
        return batch if anchors_are_keys else replaced(batch, anchors_are_keys=False)
    checks.check_keys(keys, key_labels, batch.features)
    assert key_labels is not None
    if batch.num_classes:
        checks.check_label_values(key_labels, batch.num_classes, validate, "key_labels")
    return replaced(batch, keys=keys, key_labels=key_labels.long(), anchors_are_keys=bool(anchors_are_keys))
