"""Multiplies the keys of `tiled`: in the dtype that is accumulated in, or in 16 bits on a GPU's tensor cores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rcl_fast.batch import ContrastiveBatch, powers_of_two, raw_rows

# Products of 16-bit matrices into float32: cuBLAS, from PyTorch 2.8 on.
_MIXED_PRODUCTS = torch.__version__ >= "2.8" and torch.version.cuda is not None


Parts = tuple[Tensor, Tensor, Tensor]  # of the keys: anchors ([0, D] where they are no keys), more keys, prototypes


def blocks(matrix: Tensor, parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """Returns each part of the keys with the columns of a matrix [rows, M] that belong to it, as (columns, part)."""
    anchors, keys, prototypes = parts
    K, Q = len(anchors), len(keys)
    return [(matrix[:, :K], anchors), (matrix[:, K : K + Q], keys), (matrix[:, K + Q :], prototypes)]


class AccumulatedKeys(NamedTuple):
    """h̃ of the anchors [N, D] and of all keys, float32 or float64."""

    anchors: Tensor
    parts: Parts
    temperature: float

    def logits(self, chunk: slice, log_weights: Tensor) -> Tensor:
        """Returns s_ik + log_weights [M] of a chunk's anchors with every key [rows, M]."""
        rows = self.anchors[chunk] / self.temperature
        logits = log_weights.repeat(len(rows), 1)
        for block, part in blocks(logits, self.parts):
            block.addmm_(rows, part.T)
        return logits

    def weighted(self, dlogits: Tensor) -> Tensor:
        """Returns Σ_k dlogits_ak h̃_k for dlogits [rows, M]: [rows, D]."""
        (first, anchors), *others = blocks(dlogits, self.parts)
        weighted = first @ anchors
        for block, part in others:
            weighted.addmm_(block, part)
        return weighted

    def weighted_chunk(self, chunk: slice, dlogits: Tensor) -> Tensor:
        """Returns Σ_i dlogits_ij h̃_i over a chunk's anchors, for dlogits [rows, R]: [R, D]."""
        return dlogits.T @ self.anchors[chunk]


class RawKeys(NamedTuple):
    """16-bit rows z over a power of two, and float32 scales with h̃ = scale · z, applied to float32 products.

    Nothing is rounded but dlogits, for the second product, as in the kernels (kernels/README.md).
    """

    anchors: Tensor
    parts: Parts
    anchor_scales: Tensor  # [N]
    scales: Tensor  # [M] of the keys
    temperature: float

    def logits(self, chunk: slice, log_weights: Tensor) -> Tensor:
        rows = self.anchors[chunk]
        products = torch.cat([_product(rows, part.T) for part in self.parts], dim=1)
        root = self.temperature**0.5  # on both sides, so that neither leaves the range
        return products.mul_(self.anchor_scales[chunk, None] / root).mul_(self.scales / root).add_(log_weights)

    def weighted(self, dlogits: Tensor) -> Tensor:
        scaled, grad_scale = self._rounded(dlogits * self.scales)
        anchors, keys, prototypes = (_product(block, part) for block, part in blocks(scaled, self.parts))
        return (anchors + keys + prototypes) / grad_scale

    def weighted_chunk(self, chunk: slice, dlogits: Tensor) -> Tensor:
        scaled, grad_scale = self._rounded(dlogits * self.anchor_scales[chunk, None])
        return _product(scaled.T, self.anchors[chunk]) / grad_scale

    def _rounded(self, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (dlogits · scale in 16 bits, scale): a large batch's mean stays above float16's least number."""
        if not dlogits.numel():
            return dlogits.to(self.anchors.dtype), dlogits.new_ones(())
        largest = dlogits.abs().amax()
        grad_scale = torch.where(largest > 0, 2.0**13 / largest, 1.0)
        return (dlogits * grad_scale).to(self.anchors.dtype), grad_scale


def keys_of(batch: ContrastiveBatch, anchors: Tensor, keys: Tensor, prototypes: Tensor) -> AccumulatedKeys | RawKeys:
    """Returns the keys of a batch whose h̃ are `anchors`, `keys` and `prototypes`."""
    those_that_are_keys = slice(None if batch.anchors_are_keys else 0)
    if not multiplies_16_bits(batch):
        anchors = anchors.detach()
        parts = (anchors[those_that_are_keys], keys.detach(), prototypes.detach())
        return AccumulatedKeys(anchors, parts, batch.temperature)
    raw, scales = _scaled(batch.features, batch.labels, batch)
    raw_keys, key_scales = _scaled(batch.keys, batch.key_labels, batch)
    raw_prototypes, prototype_scales = _scaled(batch.prototypes, slice(None), batch)
    return RawKeys(
        anchors=raw,
        parts=(raw[those_that_are_keys], raw_keys, raw_prototypes),
        anchor_scales=scales,
        scales=torch.cat([scales[those_that_are_keys], key_scales, prototype_scales]),
        temperature=batch.temperature,
    )


def multiplies_16_bits(batch: ContrastiveBatch) -> bool:
    """Returns whether a GPU's tensor cores multiply the batch in its dtype: float16, or bfloat16 from sm_80 on."""
    dtypes = {rows.dtype for rows in raw_rows(batch)}
    if not (batch.features.is_cuda and _MIXED_PRODUCTS):
        return False
    if dtypes == {torch.bfloat16}:
        return torch.cuda.get_device_capability(batch.features.device) >= (8, 0)
    return dtypes == {torch.float16}


def _scaled(raw: Tensor | None, classes: Tensor | slice | None, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """Returns rows [R, D] over a power of two each, in their dtype, and scales [R] float32 that make h̃ of them."""
    if raw is None:
        return batch.features.detach()[:0], batch.features.new_empty(0, dtype=torch.float32)
    raw = raw.detach()
    powers = _powers_of_two(raw, batch.normalize)
    rows = (raw.float() / powers).to(raw.dtype)
    if batch.normalize:
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        scales = 1 / norms.masked_fill(norms == 0, 1)
    else:
        scales = powers.squeeze(1)
    if batch.compression is not None:
        scales = scales * batch.compression.float()[classes]
    return rows, scales


def _powers_of_two(raw: Tensor, normalize: bool) -> Tensor:
    """Returns what `_scaled` divides each row by, float32 [R, 1]: no product of rows then leaves float32's range."""
    powers = powers_of_two(raw.abs().amax(dim=1, keepdim=True).float())
    if raw.dtype == torch.float16:
        # Up to 2^11, so that small numbers keep their bits; lengths that count stay as they are: their range is small.
        return powers / 2**10 if normalize else torch.ones_like(powers)
    return powers if normalize else powers.clamp(2**-60, 2**60)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right of 16-bit matrices in float32, and accumulates in it."""
    return torch.mm(left, right, out_dtype=torch.float32)
