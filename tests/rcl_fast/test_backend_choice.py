"""Which backend a name stands for."""

import subprocess
import sys

import pytest

from rcl_fast.functional import BACKENDS, resolve_backend


def test_auto_takes_no_kernel_that_has_not_run_on_a_gpu() -> None:
    assert resolve_backend("auto") == "tiled"
    assert [resolve_backend(name) for name in BACKENDS if name != "auto"] == ["triton", "tiled", "dense", "reference"]
    with pytest.raises(ValueError, match="'triton', 'tiled'"):
        resolve_backend("cuda")


def test_the_library_imports_without_triton() -> None:
    """Not every platform has it; only backend="triton" needs it."""
    code = "import sys; sys.modules['triton'] = None; import rcl_fast; print(rcl_fast.__version__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"0.1.0"
