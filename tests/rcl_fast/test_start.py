"""What an import loads: PyTorch takes seconds, and its compiler some more."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

import rcl_fast

LOADED = """
import sys
import rcl_fast, rcl_fast.presets
assert "torch" not in sys.modules
assert rcl_fast.presets.PRESETS["scl"].prototypes is False
assert "contrastive_loss" in dir(rcl_fast)
assert "torch" not in sys.modules
rcl_fast.contrastive_loss
assert rcl_fast.losses.PRESETS is rcl_fast.presets.PRESETS  # modules that an import once loaded are there as before
assert rcl_fast.backends.reference.losses and rcl_fast.batch and rcl_fast.checks and rcl_fast.cross_entropy
assert "torch" in sys.modules
assert "torch._dynamo" not in sys.modules
"""

COMPILED = """
import sys
import torch
import rcl_fast

def loss_of(features, labels):
    return rcl_fast.contrastive_loss(features, labels, prototypes=torch.ones(2, 6))

compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
features, labels = torch.eye(6, requires_grad=True), torch.arange(6) % 2
loss = compiled(features, labels)
loss.backward()
again = torch.eye(6, requires_grad=True)
expected = loss_of(again, labels)
expected.backward()
assert loss == expected
assert torch.equal(features.grad, again.grad)
"""


@pytest.mark.parametrize("code", [LOADED, COMPILED], ids=["what is loaded", "the first call is compiled"])
def test_in_a_fresh_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in rcl_fast.__all__:
        assert getattr(rcl_fast, name) is vars(rcl_fast)[name]
    with pytest.raises(AttributeError, match="module 'rcl_fast' has no attribute 'contrastive'"):
        rcl_fast.contrastive  # noqa: B018


def test_the_version_is_that_of_setup_py() -> None:
    try:
        installed = version("rcl-fast")
    except PackageNotFoundError:
        installed = "unknown"
    assert rcl_fast.__version__ == installed
