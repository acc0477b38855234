"""What `pip install .` puts where, and what a package index shows."""

import re
import runpy
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


@pytest.mark.parametrize("folder", ["rcl_fast", "kernels", "train"])
def test_every_module_is_in_it(wheel: zipfile.Path, folder: str) -> None:
    package = wheel / "rcl_fast" if folder == "rcl_fast" else wheel / "rcl_fast" / folder
    modules = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
    assert modules
    assert not [str(module) for module in modules if not package.joinpath(*module.parts).is_file()]


def metadata_of(wheel: zipfile.Path) -> tuple[str, str]:
    """The fields, and the description below them."""
    (folder,) = (path for path in wheel.iterdir() if path.name.endswith(".dist-info"))
    fields, _, description = (folder / "METADATA").read_text(encoding="utf-8").partition("\n\n")
    return fields, description


def test_the_metadata(wheel: zipfile.Path) -> None:
    fields, _ = metadata_of(wheel)
    for line in ("License-Expression: MIT", "License-File: LICENSE", "Description-Content-Type: text/markdown"):
        assert f"\n{line}\n" in fields
    for name in ("Summary", "Author", "Keywords", "Classifier", "Requires-Python", "Project-URL"):
        assert f"\n{name}: " in fields
    assert "filelock" not in fields
    assert "numba" not in fields


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_an_index_shows_the_readme_without_dead_links(wheel: zipfile.Path) -> None:
    _, description = metadata_of(wheel)
    assert all(link.startswith("https://") for link in links(description))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    assert all(block in description for block in blocks)


def test_the_readmes_address_makes_links_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    given = re.sub(r"git clone \S+", "git clone https://example.org/them/rcl_fast.git", readme)
    (tmp_path / "README.md").write_text(given, encoding="utf-8")
    found: dict = {}
    monkeypatch.setattr("setuptools.setup", found.update)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "setup.py"))
    relative = [link for link in links(readme) if "://" not in link]
    assert len(relative) > 10
    for link in relative:
        assert f"(https://example.org/them/rcl_fast/blob/main/{link})" in found["long_description"]
    assert found["project_urls"]["Source"] == "https://example.org/them/rcl_fast"


def test_the_version_stands_in_one_place() -> None:
    (version,) = re.findall(r'version="([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_citation_is_of_the_paper_that_the_readme_names() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    preferred = citation.split("preferred-citation:")[1]
    assert re.findall(r"family-names: (.*)", preferred) == ["De Alvis", "Denipitiyage", "Seneviratne"]
    (address,) = re.findall(r'url: "(.*)"', preferred)
    assert address in readme
    assert f"title: {'Long-Tail Learning with Rebalanced Contrastive Loss'}\n" in preferred
