"""What the documents name is there: files, links, modules, targets of the Makefile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for folder in ("", "docs", "bench", "kernels", "rcl_fast/backends") for path in (ROOT / folder).glob("*.md")
)
# What a command writes, or users have: in no checkout.
ELSEWHERE = ("bench/results/speed/tune.jsonl", "bench/results/speed/H100", "docs/figures", "train/CLASS")


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(document))
    missing = [to for to in targets if "://" not in to and not (document.parent / to).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_are_of_files_that_are_there(document: Path) -> None:
    pattern = r"(?<![\w/.])((?:train|rcl_fast|kernels|bench|tests|docs)/[\w./*-]*\w)"
    named = {path for path in re.findall(pattern, text_of(document)) if not path.startswith(ELSEWHERE)}
    assert not [path for path in named if not list(ROOT.glob(path)) and not list(ROOT.glob(f"{path}.*"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_modules_that_are_run_are_there(document: Path) -> None:
    modules = re.findall(r"python -m (bench[.\w]*)", text_of(document))
    assert not [module for module in modules if not (ROOT / f"{module.replace('.', '/')}.py").is_file()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_targets_of_the_makefile_are_there(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z][\w-]*)", text_of(document), flags=re.MULTILINE)
    assert not [target for target in named if target not in targets]
