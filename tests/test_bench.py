"""The kernels' benchmarks run where only PyTorch and Triton are installed."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"

WITHOUT_THE_TRAINER = """
import sys
for name in ("tyro", "rich", "tensorboard", "plotly", "jinja2", "timm", "sklearn", "torchvision"):
    sys.modules[name] = None  # importing it raises ImportError
sys.path.insert(0, sys.argv[1])
import gpu_loss, machine
assert machine.describe()["torch"]
"""


def test_the_loss_is_measured_without_the_trainers_packages() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_THE_TRAINER, str(BENCH)], check=True, timeout=300)
