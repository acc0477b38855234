"""Batches for the kernels' tests, and the judgement of a result against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rcl_fast.backends import reference
from rcl_fast.backends import triton as backend
from rcl_fast.batch import ContrastiveBatch, raw_rows
from rcl_fast.class_statistics import class_statistics

PRESETS = {
    "scl": {"class_average": False, "rebalance": False, "with_prototypes": False},
    "bcl": {"class_average": True, "rebalance": False, "with_prototypes": True},
    "scl_rcl": {"class_average": False, "rebalance": True, "with_prototypes": False},
    "bcl_rcl": {"class_average": True, "rebalance": True, "with_prototypes": True},
}


def random_batch(
    device: torch.device,
    N: int = 50,
    C: int = 37,
    D: int = 40,
    *,
    dtype: torch.dtype = torch.float32,
    class_average: bool = True,
    rebalance: bool = True,
    with_prototypes: bool = True,
    compressed: bool = False,
    normalize: bool = True,
    temperature: float = 0.1,
    labels: Tensor | None = None,
    extra_keys: int | None = None,
    anchors_are_keys: bool = True,
    seed: int = 0,
) -> ContrastiveBatch:
    """A batch of raw features of unequal lengths, with labels of unequal frequency."""
    make = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Tensor:
        lengths = 0.3 + 3 * torch.rand(count, 1, generator=make)
        if not normalize:
            lengths = lengths / D**0.5
        return (torch.randn(count, D, generator=make) * lengths).to(device, dtype).requires_grad_()

    if labels is None:
        labels = (C * torch.rand(N, generator=make) ** 3).long().clamp(max=C - 1)
    return ContrastiveBatch(
        features=rows(N),
        labels=labels.to(device),
        prototypes=rows(C) if with_prototypes else None,
        class_counts=torch.randint(1, 500, (C,), generator=make).to(device) if rebalance else None,
        compression=(0.2 + torch.rand(C, generator=make)).to(device) if compressed else None,
        num_classes=C,
        temperature=temperature,
        class_average=class_average,
        normalize=normalize,
        keys=None if extra_keys is None else rows(extra_keys),
        key_labels=None if extra_keys is None else torch.randint(C, (extra_keys,), generator=make).to(device),
        anchors_are_keys=anchors_are_keys,
    )


def leaves(batch: ContrastiveBatch) -> list[Tensor]:
    """The tensors whose gradient is wanted: of features, extra keys and prototypes."""
    return [rows for rows in raw_rows(batch) if rows.requires_grad]


def grad_output_of(batch: ContrastiveBatch) -> Tensor:
    """Weights of the anchors, none of them 1, some negative and one 0."""
    return torch.linspace(-0.6, 1.7, len(batch.labels), device=batch.labels.device).index_fill(
        0, torch.zeros(1, dtype=torch.int64, device=batch.labels.device), 0.0
    )


def loss_and_gradients(loss: Any, batch: ContrastiveBatch, grad_output: Tensor | None = None) -> list[Tensor]:
    """[ℓ, and the gradient of each leaf], as `loss` computes them."""
    losses = loss(batch)
    grad_output = grad_output_of(batch) if grad_output is None else grad_output
    wanted = leaves(batch)
    if not wanted:
        return [losses]
    return [losses.detach(), *torch.autograd.grad(losses, wanted, grad_output.to(losses.dtype))]


def plain(batch: ContrastiveBatch) -> Tensor:
    """The loss as plain PyTorch computes it with every product in the inputs' own dtype."""
    dtype = batch.features.dtype
    keys, labels = _keys(batch)
    if batch.normalize:
        keys = torch.nn.functional.normalize(keys, dim=1)
    if batch.compression is not None:
        keys = keys * batch.compression.to(dtype)[labels, None]
    products = keys[: len(batch.features)] @ keys.T
    return _losses(batch, products.float() / batch.temperature, labels)


def truncated(batch: ContrastiveBatch) -> Tensor:
    """The loss in float64, but for the operands of its products, of which TF32 drops the low bits: what that costs.

    TF32 has 10 bits behind the point. An operand that is truncated is off by less than 2^-10 of itself and always
    towards zero, one that is rounded to nearest by 2^-11 at most and either way. Over a sum the errors of rounding
    average out; those of truncation add up, to about 2^-10.5 of it for the two operands together. Triton's products
    truncate and cuBLAS's may round, so that plain PyTorch's error is no measure for TF32; this one is.

    It is close to the kernels, as the operands are theirs: raw rows, scaled only after the product, and dlogits
    that are scaled before they are cut. The kernels add float32's rounding, most of all in their sums, which
    tensor cores chop: once in eight terms, by up to 2^-23 of the sum, hence less than 2^-14 of it for 2,817 terms.
    """
    exact = batch._replace(
        features=batch.features.double(),
        keys=None if batch.keys is None else batch.keys.double(),
        prototypes=None if batch.prototypes is None else batch.prototypes.double(),
    )
    keys, labels = _keys(exact)
    scales = torch.full_like(keys[:, 0], 1 / math.sqrt(batch.temperature))
    if batch.normalize:
        norms = torch.linalg.vector_norm(keys.detach(), dim=1)
        scales = scales / norms.masked_fill(norms == 0, 1)
    if batch.compression is not None:
        scales = scales * batch.compression.double()[labels]
    s = _TruncatedSimilarities.apply(keys, scales, len(batch.features), batch.normalize)
    return _losses(exact, s, labels)


class _TruncatedSimilarities(torch.autograd.Function):
    """s [N, M] between the first N of the raw rows [M, D] and all of them, given the rows' scales [M]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scales: Tensor, N: int, normalize: bool) -> Tensor:
        ctx.save_for_backward(rows, scales)
        ctx.normalize = normalize
        return (truncate(rows[:N]) @ truncate(rows).T) * (scales[:N, None] * scales)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, scales = ctx.saved_tensors
        N, M = grad_output.shape
        dlogits = grad_output.new_zeros(M, M)  # a row is met as an anchor and as a key
        dlogits[:N] = grad_output
        dlogits[:, :N] += grad_output.T
        # The kernels' scales hold this too, as they compute in base 2: it moves the bits that are cut.
        base_2 = math.sqrt(math.log2(math.e))
        gradient = truncate(dlogits * scales * base_2) @ truncate(rows) * (scales[:, None] / base_2)
        if ctx.normalize:  # the part along the row goes, as length does not count; a zero row keeps all
            squares = (rows * rows).sum(dim=1, keepdim=True)
            along = (rows * gradient).sum(dim=1, keepdim=True) / squares.masked_fill(squares == 0, 1)
            gradient = gradient - rows * along
        return gradient, None, None, None


def truncate(numbers: Tensor) -> Tensor:
    """What TF32 products read of numbers that are stored as float32: not their low 13 bits. float64 out."""
    return (numbers.float().view(torch.int32) & ~0x1FFF).view(torch.float32).double()


def _keys(batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """Raw rows of anchors, extra keys and prototypes [N + Q + C, D], and their labels."""
    classes = torch.arange(0 if batch.prototypes is None else len(batch.prototypes), device=batch.labels.device)
    extra = classes[:0] if batch.key_labels is None else batch.key_labels
    return torch.cat(raw_rows(batch)), torch.cat([batch.labels, extra, classes])


def _losses(batch: ContrastiveBatch, s: Tensor, labels: Tensor) -> Tensor:
    """ℓ_i of similarities s [N, N + Q + C] with all rows, of these labels, in the dtype of s."""
    if not batch.anchors_are_keys:
        s, labels = s[:, len(s) :], labels[len(s) :]
    same = batch.labels[:, None] == labels
    itself = torch.eye(*s.shape, dtype=torch.bool, device=s.device) & batch.anchors_are_keys
    statistics = class_statistics(batch)
    b = statistics.log_weights[labels].expand_as(s)
    if statistics.same_class_terms is not None:
        b = b + same * statistics.same_class_terms[:, None]
    positives = statistics.positives
    lse = torch.logsumexp((s + b).masked_fill(itself & (positives > 0)[:, None], -torch.inf), dim=1)
    mean = (s * (same & ~itself)).sum(dim=1) / positives.clamp(min=1)
    log_n = 0.0 if batch.class_counts is None else batch.class_counts.to(s.dtype).log()[batch.labels]
    return torch.where(positives > 0, lse - mean - log_n, 0.0)


def _largest_term(batch: ContrastiveBatch) -> float:
    """Returns what no term of a gradient exceeds: max|g| / (T · min‖z‖), for grad_output as `grad_output_of` has it."""
    lengths = torch.cat([rows.detach().double().norm(dim=1) for rows in raw_rows(batch)])
    lengths = lengths[lengths > 0] if batch.normalize else torch.ones_like(lengths)
    return 2 / (batch.temperature * float(lengths.min())) if len(lengths) else 0.0


def assert_as_exact_as_plain(
    batch: ContrastiveBatch,
    grad_output: Tensor | None = None,
    factor: float = 2.0,
    truth: Callable[[ContrastiveBatch], Tensor] = reference.losses,
    loss: Callable[[ContrastiveBatch], Tensor] = backend.losses,
    yardsticks: Sequence[Callable[[ContrastiveBatch], Tensor]] = (plain,),
) -> None:
    """Our error against float64 is at most `factor` of plain PyTorch's in the same dtype, and rounding.

    yardsticks: losses whose largest error stands for plain PyTorch's; TF32 products take `truncated` too.

    Rounding: a result is a sum of some magnitude, kept in float32 and stored in its dtype; one unit in the last place
    of that magnitude for storing it, and sixteen in float32, for what happens to be exact in plain PyTorch.

    A kernel sums terms one after the other, cuBLAS in blocks. Each addition is off by at most u = 2^-24 of the partial
    sum p_j that it makes, up or down; all of them together by more than λ·u·√Σp_j² with a probability of at most
    2·exp(−λ²/2) (Azuma's inequality; Higham and Mary 2019, Connolly, Higham and Mary 2021): 3e-14 at λ = 8.
    The M terms of a gradient's number have partial sums of about the magnitude at most: 8·√M·u of it, or 4·√M units.
    Where an anchor has one key, p is 1 but for rounding, and plain PyTorch's is 1; where D = 1, a gradient is along its
    row and goes. Where both hold, the rounding of rounding is left, in units of a gradient's terms, g/(T·‖z‖).
    The D terms of z_i·z_k, of random signs, have √Σp_j² near ‖z_i‖‖z_k‖/√2 at any D: three units of 1/T, which the
    sixteen hold.
    """
    exactly = loss_and_gradients(truth, batch, grad_output)
    ours = loss_and_gradients(loss, batch, grad_output)
    theirs = zip(*(loss_and_gradients(yardstick, batch, grad_output) for yardstick in yardsticks), strict=True)
    log_n = 0.0 if batch.class_counts is None else float(batch.class_counts.double().log().max())
    M = len(_keys(batch)[1])
    names = ["loss", *(f"gradient {number}" for number in range(len(exactly) - 1))]
    for name, exact, our, their in zip(names, exactly, ours, theirs, strict=True):
        assert our.shape == exact.shape, name
        if exact.numel() == 0:
            continue
        assert our.isfinite().all(), f"{name}: not finite"
        # The terms of the loss cancel: its own magnitude is no measure of them.
        magnitude = float(exact.abs().max()) + (1 / batch.temperature + log_n if name == "loss" else 0.0)
        units = 16 + (0 if name == "loss" else 4 * math.sqrt(M))
        rounding = (torch.finfo(our.dtype).eps + units * torch.finfo(torch.float32).eps) * magnitude
        if name != "loss":
            rounding += (units * torch.finfo(torch.float32).eps) ** 2 * _largest_term(batch)
        our_error = float((our.double() - exact).abs().max())
        their_error = max(float((one.double() - exact).abs().max()) for one in their)
        assert our_error <= factor * their_error + rounding, f"{name}: {our_error:.2e}, yardstick {their_error:.2e}"
