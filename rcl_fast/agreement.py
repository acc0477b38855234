"""Makes sure that the processes of a group call the loss alike, by one gather of a few numbers from each.

Options are compared by a hash, class counts and compression by a digest of their bits. Prototypes are computed in
each process, and may differ by rounding: they are compared by a weighted sum.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakIdKeyDictionary

from rcl_fast.batch import ContrastiveBatch, powers_of_two

CHECKSUMS = 4  # of the prototypes: where one happens to be close, another is not
HEADER_BYTES = 8 * (5 + CHECKSUMS)


class _Header(NamedTuple):
    """What one process says of its call."""

    anchors: int
    options: int
    class_counts: int
    compression: int
    checksums: tuple[float, ...]  # of the prototypes


def agreed_sizes(batch: ContrastiveBatch, reduction: str, backend: str, group: ProcessGroup) -> list[int]:
    """Returns the anchors of each process, in one collective that the host waits for.

    Raises RuntimeError in every process, with what differs, where the calls differ in anything else.
    """
    options = _options(batch, reduction, backend)
    headers = _all_gather_headers(batch, options, group)
    if len({header.options for header in headers}) > 1:
        raise RuntimeError(_difference_of_options(options, group))
    for name, values in (("class_counts", batch.class_counts), ("compression", batch.compression)):
        if values is not None and len({getattr(header, name) for header in headers}) > 1:
            _check_values_agree(name, values, group)
    if batch.prototypes is not None:
        _check_prototypes_agree(headers, batch.prototypes)
    return [header.anchors for header in headers]


def _options(batch: ContrastiveBatch, reduction: str, backend: str) -> dict[str, str]:
    """Returns what must be the same in every process, by the name that a person knows it by."""
    options = {
        "the width of the features": batch.features.shape[1],
        "the dtype of the features": batch.features.dtype,
        "prototypes": None if batch.prototypes is None else (*batch.prototypes.shape, batch.prototypes.dtype),
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
    digests = [_digest(values, device) for values in (batch.class_counts, batch.compression)]
    header = torch.cat([counted, *digests, _checksums(batch.prototypes, device).view(torch.int64)])
    headers = header.new_empty(distributed.get_world_size(group), len(header))
    distributed.all_gather_into_tensor(headers.view(-1), header, group=group)
    headers = headers.cpu()  # one wait for the device
    integers, floats = headers[:, :4].tolist(), headers.view(torch.float64)[:, 4:].tolist()
    return [
        _Header(anchors, hashed, counts, compression, tuple(checksums))
        for (anchors, hashed, counts, compression), checksums in zip(integers, floats, strict=True)
    ]


def _hash(options: dict[str, str]) -> int:
    """Returns a number that tells options apart, the same in every process, which Python's hash is not."""
    return int.from_bytes(hashlib.sha256(repr(options).encode()).digest()[:7], "little")


_DIGESTS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _digest(values: Tensor | None, device: torch.device) -> Tensor:
    """Returns a digest int64 [1] of the numbers [C], on their device; made once per tensor and version."""
    if values is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    if values.is_inference():  # has no version
        return _digest_of_bits(values)
    version, digest = _DIGESTS.get(values, (None, None))
    if version != values._version:
        digest = _digest_of_bits(values)
        _DIGESTS[values] = values._version, digest
    return digest


def _digest_of_bits(values: Tensor) -> Tensor:
    """Returns the sum, modulo 2^64, of float64's bits, each number's mixed with its place: int64 [1].

    Equal numbers of different dtypes have one digest; any single change changes it. The mixing is splitmix64's (Steele,
    Lea, Flood, OOPSLA 2014): a product alone would lose numbers like 0 and 2, whose bits are nearly all 0.
    """
    bits = (values.double() + 0.0).view(torch.int64)  # −0 becomes 0
    mixed = bits + torch.arange(1, len(bits) + 1, device=bits.device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return mixed.sum(dim=0, keepdim=True)


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


def _check_values_agree(name: str, values: Tensor, group: ProcessGroup) -> None:
    """Raises RuntimeError with the first class whose number differs between the processes.

    There is none where a digest is of an earlier value: numbers may change behind a tensor's version.
    """
    gathered = _all_gather_objects(values.tolist(), group)
    for process, others in enumerate(gathered):
        for j, (one, other) in enumerate(zip(gathered[0], others, strict=True)):
            if one != other:
                raise RuntimeError(_sentence(name, f"{one} for class {j}", process, f"{other} for it"))


def _all_gather_objects(of_this_process: Any, group: ProcessGroup) -> list[Any]:
    gathered: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(gathered, of_this_process, group=group)
    return gathered


def _sentence(name: str, of_first: str, process: int, value: str) -> str:
    return (
        f"the processes of group must call the loss alike, and they differ in {name}: process 0 has {of_first}, "
        f"process {process} has {value}"
    )
