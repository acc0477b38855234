"""Makes sure that the processes of a group call the loss alike, by one gather of a few numbers from each.

Options are compared by a hash; class counts, compression, keys and their labels by a digest of their bits. Prototypes
are computed in each process, and may differ by rounding: they are compared by a weighted sum.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakIdKeyDictionary

from rcl_fast.batch import ContrastiveBatch, powers_of_two

GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over it, as PyTorch's integers have it
CHECKSUMS = 4  # of the prototypes: where one happens to be close, another is not


def _float64_bits(values: Tensor) -> Tensor:
    """Returns the bits of float64's numbers, int64 [R]: equal numbers of different dtypes have the same."""
    return (values.double() + 0.0).view(torch.int64)  # −0 becomes 0


def _row_bits(rows: Tensor) -> Tensor:
    """Returns a number int64 [R] of each row [R, D] that any single change of the row changes.

    It is the sum of the row's bits, as integers of 16 or 32 bits, times odd numbers of 64 bits. Of float64's bits,
    which may end in many zeros, such a product would lose most.
    """
    integers = rows.contiguous().view(torch.int16 if rows.element_size() == 2 else torch.int32)
    odd = _mixed(torch.arange(1, integers.shape[1] + 1, device=rows.device) * GOLDEN_RATIO) | 1
    return (integers * odd).sum(dim=1)


class _Exact(NamedTuple):
    """What must be the same to the bit in every process."""

    name: str  # in `ContrastiveBatch`
    row: str  # what a person calls a row of it
    bits: Callable[[Tensor], Tensor]  # of each row, int64 [R]


EXACT = (
    _Exact("class_counts", "class", _float64_bits),
    _Exact("compression", "class", _float64_bits),
    _Exact("key_labels", "row", Tensor.long),  # any integers: more than float64 tells apart
    _Exact("keys", "row", _row_bits),
)
HEADER_BYTES = 8 * (3 + len(EXACT) + CHECKSUMS)


class _Header(NamedTuple):
    """What one process says of its call."""

    anchors: int
    options: int
    digests: tuple[int, ...]  # of what is EXACT
    checksums: tuple[float, ...]  # of the prototypes


def agreed_sizes(batch: ContrastiveBatch, reduction: str, backend: str, group: ProcessGroup) -> list[int]:
    """Returns the anchors of each process, in one collective that the host waits for.

    Raises RuntimeError in every process, with what differs, where the calls differ in anything else.
    """
    options = _options(batch, reduction, backend)
    headers = _all_gather_headers(batch, options, group)
    if len({header.options for header in headers}) > 1:
        raise RuntimeError(_difference_of_options(options, group))
    for place, exact in enumerate(EXACT):
        if len({header.digests[place] for header in headers}) > 1:
            _check_rows_agree(exact, getattr(batch, exact.name), group)
    if batch.prototypes is not None:
        _check_prototypes_agree(headers, batch.prototypes)
    return [header.anchors for header in headers]


def _options(batch: ContrastiveBatch, reduction: str, backend: str) -> dict[str, str]:
    """Returns what must be the same in every process, by the name that a person knows it by."""
    options = {
        "the width of the features": batch.features.shape[1],
        "the dtype of the features": batch.features.dtype,
        "prototypes": None if batch.prototypes is None else (*batch.prototypes.shape, batch.prototypes.dtype),
        "keys": None if batch.keys is None else (*batch.keys.shape, batch.keys.dtype),
        "anchors_are_keys": batch.anchors_are_keys,
        "the number of classes": batch.num_classes or "unknown",
        "rebalance": batch.class_counts is not None,
        "compression": "none" if batch.compression is None else "given",
        "temperature": batch.temperature,
        "class_average": batch.class_average,
        "normalize": batch.normalize,
        "reduction": reduction,
        "the backend (auto: by device and dtype)": backend,
    }
    return {name: str(value) for name, value in options.items()}


def _all_gather_headers(batch: ContrastiveBatch, options: dict[str, str], group: ProcessGroup) -> list[_Header]:
    device = batch.features.device
    counted = torch.tensor([len(batch.features), _hash(options)], device=device)
    digests = [_digest(getattr(batch, exact.name), device, exact.bits) for exact in EXACT]
    header = torch.cat([counted, *digests, _checksums(batch.prototypes, device).view(torch.int64)])
    headers = header.new_empty(distributed.get_world_size(group), len(header))
    distributed.all_gather_into_tensor(headers.view(-1), header, group=group)
    headers = headers.cpu()  # one wait for the device
    count = 2 + len(EXACT)  # of integers
    integers, floats = headers[:, :count].tolist(), headers.view(torch.float64)[:, count:].tolist()
    return [
        _Header(anchors, hashed, tuple(digests), tuple(checksums))
        for (anchors, hashed, *digests), checksums in zip(integers, floats, strict=True)
    ]


def _hash(options: dict[str, str]) -> int:
    """Returns a number that tells options apart, the same in every process, which Python's hash is not."""
    return int.from_bytes(hashlib.sha256(repr(options).encode()).digest()[:7], "little")


_DIGESTS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _digest(values: Tensor | None, device: torch.device, bits: Callable[[Tensor], Tensor] = _float64_bits) -> Tensor:
    """Returns a digest int64 [1] of the numbers [R, ...], on their device; made once per tensor and version."""
    if values is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    if values.is_inference():  # has no version
        return _digest_of_bits(bits(values))
    version, digest = _DIGESTS.get(values, (None, None))
    if version != values._version:
        digest = _digest_of_bits(bits(values.detach()))
        _DIGESTS[values] = values._version, digest
    return digest


def _digest_of_bits(bits: Tensor) -> Tensor:
    """Returns the sum, modulo 2^64, of the bits int64 [R], each number's mixed with its place: int64 [1].

    Any single change changes it.
    """
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return _mixed(bits + places * GOLDEN_RATIO).sum(dim=0, keepdim=True)


def _mixed(bits: Tensor) -> Tensor:
    """Returns the numbers int64 with their bits mixed, different ones for different ones.

    The mixing is splitmix64's (Steele, Lea, Flood, OOPSLA 2014): a product alone would lose numbers like 0 and 2, whose
    bits are nearly all 0.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return bits


def _signed(number: int) -> int:
    """Returns a number of 64 bits as PyTorch's integers have it."""
    return number - 2**64 if number >= 2**63 else number


def _checksums(prototypes: Tensor | None, device: torch.device) -> Tensor:
    """Returns sums, float64 [CHECKSUMS + 1], with weights in [−1, 1]: of the unit rows' numbers, and of log ‖c_j‖.

    Of unit rows, as the loss has them: a long row must not hide another.
    """
    if prototypes is None:
        return torch.zeros(CHECKSUMS + 1, dtype=torch.float64, device=device)
    rows = prototypes.detach().to(torch.promote_types(prototypes.dtype, torch.float32))
    powers = powers_of_two(rows)
    scaled = rows / powers
    lengths = torch.linalg.vector_norm(scaled, dim=1, dtype=torch.float64)
    lengths = torch.where(lengths == 0, 1.0, lengths)
    of_classes, of_features = _weights(*rows.shape, rows.dtype, device)
    sums = (scaled * of_features).sum(dim=1, dtype=torch.float64) / lengths
    logarithms = lengths.log() + powers[:, 0].double().log()
    return torch.cat([sums @ of_classes, (logarithms * of_classes[:, 0]).sum(dim=0, keepdim=True)])


@functools.cache
def _weights(C: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns weights of the classes, float64 [C, CHECKSUMS], and of the features [D], in the dtype."""
    classes, features, frequencies = (
        torch.arange(size, dtype=torch.float64, device=device) for size in (C, D, CHECKSUMS)
    )
    return ((classes[:, None] + 0.5) * (frequencies + 1)).cos(), features.cos().to(dtype)


def _check_prototypes_agree(headers: list[_Header], prototypes: Tensor) -> None:
    """Raises RuntimeError where checksums differ by more than rounding.

    Numbers of C unit rows that are each off by a share u of themselves, either way, move a sum with weights below 1 by
    about u·√C. u is four roundings of the dtype, for a few layers, and no less than 16 of the dtype of sums.
    """
    accumulated = torch.promote_types(prototypes.dtype, torch.float32)
    share = max(4 * torch.finfo(prototypes.dtype).eps, 16 * torch.finfo(accumulated).eps)
    allowed = share * len(prototypes) ** 0.5
    for process, header in enumerate(headers):
        for first, other in zip(headers[0].checksums, header.checksums, strict=True):
            # A diverged run has no numbers in any process: the loss says so.
            if not (abs(other - first) <= allowed or str(other) == str(first)):
                raise RuntimeError(
                    "the processes of group must call the loss alike, and they differ in prototypes, beyond rounding: "
                    f"process 0 has a checksum of {first:.9g}, process {process} of {other:.9g}, and {allowed:.2g} "
                    "apart is allowed; make them of the same weights in every process (under "
                    "DistributedDataParallel, within the module's forward)"
                )


def _difference_of_options(options: dict[str, str], group: ProcessGroup) -> str:
    """Returns what differs first between the processes, as a sentence."""
    gathered = _all_gather_objects(options, group)
    for process, others in enumerate(gathered):
        for name, value in others.items():
            if value != gathered[0][name]:
                return _sentence(name, gathered[0][name], process, value)
    raise AssertionError("unreachable: their hashes differ")


def _check_rows_agree(exact: _Exact, values: Tensor, group: ProcessGroup) -> None:
    """Raises RuntimeError with the first row [R, ...] that differs between the processes.

    There is none where a digest is of an earlier value: numbers may change behind a tensor's version.
    """
    values = values.detach()
    gathered = _all_gather_objects(exact.bits(values).cpu(), group)
    for process, bits in enumerate(gathered):
        differing = (bits != gathered[0]).nonzero()
        if len(differing):
            row = int(differing[0])
            numbers = _all_gather_objects(values[row].reshape(-1).tolist(), group)
            pairs = zip(numbers[0], numbers[process], strict=True)
            column = next((j for j, (one, other) in enumerate(pairs) if repr(one) != repr(other)), 0)
            where = f"{exact.row} {row}" + (f", column {column}" if values.ndim > 1 else "")
            one, other = numbers[0][column], numbers[process][column]
            raise RuntimeError(_sentence(exact.name, f"{one} for {where}", process, f"{other} for it"))


def _all_gather_objects(of_this_process: Any, group: ProcessGroup) -> list[Any]:
    gathered: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(gathered, of_this_process, group=group)
    return gathered


def _sentence(name: str, of_first: str, process: int, value: str) -> str:
    return (
        f"the processes of group must call the loss alike, and they differ in {name}: process 0 has {of_first}, "
        f"process {process} has {value}"
    )
