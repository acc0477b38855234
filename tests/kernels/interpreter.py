"""Five repairs of Triton's interpreter, so that it computes what a GPU does (Triton 3.3 and 3.6, NumPy 1.26 to 2.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Call once, before the first kernel runs."""
    _loop_bounds_are_arrays()
    _products_depend_on_their_place()
    _bfloat16_products_are_of_bit_patterns()
    _bfloat16_is_truncated()
    _booleans_have_no_complement()


def _loop_bounds_are_arrays() -> None:
    """NumPy 2.4 makes no integer of an array of one element, which every loop bound is."""
    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, *scope: Any) -> None:  # Triton 3.3 and 3.4 have no scope, and set what they patch
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_repair


def _products_depend_on_their_place() -> None:
    """NumPy sums z_i·z_k in an order that depends on where in a tile it stands; a GPU in one order of features."""

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right, total = (handle.data.astype(np.float32) for handle in (a, b, d))
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[k]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _bfloat16_products_are_of_bit_patterns() -> None:
    """The interpreter keeps bfloat16 as uint16, and tl.dot multiplies those integers."""
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _bfloat16_is_truncated() -> None:
    """float32 → bfloat16 rounds to the nearest, ties to even, on every GPU; the interpreter drops the low bits.

    The way back is a shift; the interpreter makes other numbers of subnormal ones.
    """
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return _widened(src)
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


def _booleans_have_no_complement() -> None:
    """Triton 3.3 has neither the type nor the value that ~mask asks for."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "get_int1_ty"):
        return
    all_ones = builder.get_all_ones_value

    def get_all_ones_value(self: Any, of_type: Any) -> Any:
        if of_type.scalar != tl.int1:
            return all_ones(self, of_type)
        return interpreter.TensorHandle(np.ones(1, dtype=np.bool_), tl.int1)

    builder.get_int1_ty = lambda self: tl.int1
    builder.get_all_ones_value = get_all_ones_value
