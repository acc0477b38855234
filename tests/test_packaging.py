"""What `pip install .` puts where."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The wheel, built from a copy: setuptools writes into the folder that it builds."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in ("rcl_fast", "kernels", "train", "bench", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    (built,) = (folder / "dist").glob("*.whl")
    return zipfile.Path(built)


def test_only_rcl_fast_lands_in_site_packages(wheel: zipfile.Path) -> None:
    names = {path.name for path in wheel.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"rcl_fast"}


@pytest.mark.parametrize(
    "path",
    [
        "py.typed",
        "functional.py",
        "backends/tiled.py",
        "train/run.py",
        "train/views/transforms.py",
        "train/recipes/digits_lt.toml",
        "train/recipes/imagenet_lt.toml",
        "train/report/page.html.jinja",
        "train/experiments/tables.py",
    ],
)
def test_everything_that_is_needed_is_in_it(wheel: zipfile.Path, path: str) -> None:
    assert (wheel / "rcl_fast" / path).is_file()


def test_the_console_script(wheel: zipfile.Path) -> None:
    (metadata,) = (path for path in wheel.iterdir() if path.name.endswith(".dist-info"))
    scripts = (metadata / "entry_points.txt").read_text()
    assert "rcl-train = rcl_fast.train.run:main" in scripts
    assert "rcl-second-stage = rcl_fast.train.second_stage:main" in scripts
    assert "rcl-sweep = rcl_fast.train.sweep:main" in scripts
    assert "rcl-reproduce = rcl_fast.train.reproduce:main" in scripts
    assert "Provides-Extra: dali" in (metadata / "METADATA").read_text()
