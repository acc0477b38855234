"""`compiled_colours` as an operator of DALI's graphs."""

from __future__ import annotations

from functools import cache
from typing import Any

from nvidia.dali import fn, types

from rcl_fast.train.data.dali_operations import Colours


@cache  # Numba compiles it for seconds, once for all pipelines
def compiled_colours() -> Colours | None:
    """For graphs on the CPU; None where Numba is not installed, or not one that DALI can use."""
    try:
        from nvidia.dali.plugin.numba import NumbaFunction

        from rcl_fast.train.data.compiled_colours import change
    except ImportError:
        return None

    def run(out: Any, image: Any, numbers: Any, magnitudes: Any) -> None:  # DALI compiles a plain function itself
        change(out, image, numbers, magnitudes)

    operator = NumbaFunction(
        run_fn=run,
        setup_fn=_same_shape,
        out_types=[types.UINT8],
        in_types=[types.UINT8, types.INT32, types.FLOAT],
        outs_ndim=[3],
        ins_ndim=[3, 1, 1],
    )
    return lambda *inputs: fn.reinterpret(operator(*inputs), layout="HWC")


def _same_shape(outs: Any, ins: Any) -> None:
    for out, image in zip(outs[0], ins[0]):  # noqa: B905 - compiled, too
        for axis in range(3):
            out[axis] = image[axis]
