"""What benchmarks need to run, and that they time what they say."""

import subprocess
import sys
from pathlib import Path

from bench.images.loaders import an_epoch
from rcl_fast.train.config import parse
from rcl_fast.train.loaders import build
from rcl_fast.train.loop.training import start_training
from rcl_fast.train.runtime.hardware import choose_runtime

ROOT = Path(__file__).parents[2]

WITHOUT_THE_TRAINER = """
import sys
for name in ("tyro", "rich", "tensorboard", "plotly", "jinja2", "timm", "sklearn", "torchvision"):
    sys.modules[name] = None  # importing it raises ImportError
sys.path.append(sys.argv[1])
from bench import rows
from bench.loss import gpu
assert rows.describe()["torch"]
"""


def test_the_loss_is_measured_without_the_trainers_packages() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_THE_TRAINER, str(ROOT)], check=True, timeout=1200)


def test_each_timed_epoch_is_a_whole_one() -> None:
    """An epoch under way goes on where it was: what is timed must not be the rest of the one before."""
    config = parse(["--loss", "ce", "--device", "cpu", "--loader", "device"])
    runtime = choose_runtime(config.run)
    splits = build.load(config)
    training = start_training(config, splits, runtime)
    loader = build.training_loader(config, splits, runtime)
    for _ in range(2):
        weight = training.model.classifier.weight.clone()
        an_epoch(training, loader)
        assert training.progress is not None
        assert training.progress.steps == loader.steps_per_epoch
        assert not weight.equal(training.model.classifier.weight)
