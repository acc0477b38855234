"""What a call of the loss launches, in order: told by the launching code itself, on tensors that have no memory.

No GPU is needed, and nothing is computed: tensors are PyTorch's meta tensors, and a kernel that is launched is noted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from bench.loss.cases import Case, Inputs, ours
from rcl_fast.backends import triton as backend
from rcl_fast.kernels import backward_wide, block_sizes

SUFFIX = "_kernel"  # of a kernel's function


class Launch(NamedTuple):
    """One launch: a kernel of ours, or an operation of PyTorch's."""

    name: str  # "forward", or "aten.sum"
    in_backward: bool
    grid: tuple[int, ...]  # empty for PyTorch's
    arguments: Mapping[str, Any]  # by name; of PyTorch's a product's shape alone

    @property
    def is_ours(self) -> bool:
        return bool(self.grid)

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def tiles_a_program(self) -> int:
        """Of the program that has most; a kernel without a loop over tiles makes one."""
        return self.arguments.get("tiles_per_split", 1)

    @property
    def tiles(self) -> int:
        """Of all programs: row blocks times tiles of keys."""
        return self.grid[0] * self.arguments["tiles"] if "tiles" in self.arguments else self.programs


def launches_of(case: Case, arch: int = 90, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Returns the launches of the mean loss and of its gradients by features and prototypes."""
    found: list[Launch] = []
    passed = [False]  # whether the forward pass is over

    def note(name: str, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        found.append(Launch(name, passed[0], grid, arguments))

    def rows(count: int) -> Tensor:
        return torch.empty(count, case.dimensions, dtype=dtype, device="meta", requires_grad=True)

    labels = torch.empty(case.anchors, dtype=torch.int64, device="meta")
    inputs = Inputs(rows(case.anchors), labels, rows(case.classes))
    with _noted(note, arch):
        loss = ours("triton")(inputs)
        passed[0] = True
        torch.autograd.grad(loss, (inputs.features, inputs.prototypes))
    return found


def device_of(arch: int) -> block_sizes.Processor:
    """Returns the largest chip of an architecture."""
    return block_sizes.Processor(arch, block_sizes.MULTIPROCESSORS[arch])


Note = Callable[[str, tuple[int, ...], Mapping[str, Any]], None]


@contextmanager
def _noted(note: Note, arch: int) -> Iterator[None]:
    """Notes what is launched within a `with` block, where tensors seem to be on a GPU of this architecture."""

    def getitem(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            name = kernel.fn.__name__.removesuffix(SUFFIX)
            note(name, tuple(grid), {**dict(zip(kernel.arg_names, arguments, strict=False)), **named})

        return launch

    def product(left: Tensor, right: Tensor) -> Tensor:
        """Stands for the 16-bit product into float32, which meta tensors do not have: one launch of cuBLAS."""
        note("aten.mm", (), {"shape": (*left.shape, right.shape[1])})
        return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)

    patches: tuple[tuple[Any, str, Any], ...] = (
        (KernelInterface, "__getitem__", getitem),
        (block_sizes, "processor", lambda device: device_of(arch)),
        (backend, "_is_traced", lambda: False),  # an operator's launches are hidden in it
        (backward_wide, "_float32_product", product),
        (torch, "autocast", lambda *_, **__: nullcontext()),  # which knows no meta tensors
    )
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_Operations(note))
        yield


class _Operations(TorchDispatchMode):
    """Notes PyTorch's operations that compute: no views, and none that only take memory."""

    def __init__(self, note: Note) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*arguments, **(named or {}))
        name = str(operation).rsplit(".", 1)[0]
        if isinstance(result, Tensor) and not operation.is_view and "empty" not in name:
            self.note(name, (), {})
        return result
