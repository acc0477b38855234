"""What the documents name is there (files, links, modules, targets), and their tables are what the rows say."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for folder in ("", "docs", "bench", "kernels", "rcl_fast/backends") for path in (ROOT / folder).glob("*.md")
)
# What a command writes, or users have: in no checkout.
ELSEWHERE = ("bench/results/speed/tune.jsonl", "bench/results/speed/H100", "docs/figures", "train/CLASS")
RESULTS = ROOT / "bench" / "results"


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def prose_of(document: Path) -> str:
    """A document without its blocks and spans of code, and without the addresses of its links."""
    text = re.sub(r"^```.*?^```$|^    .*$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+", "", text)


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for to, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text_of(document)):
        if "://" in to:
            continue
        target = document.parent / to if to else document
        assert target.exists(), to
        assert not anchor or anchor in anchors(target), f"{to}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_are_of_files_that_are_there(document: Path) -> None:
    pattern = r"(?<![\w/.])((?:train|rcl_fast|kernels|bench|tests|docs)/[\w./*-]*\w)"
    named = {path for path in re.findall(pattern, text_of(document)) if not path.startswith(ELSEWHERE)}
    assert not [path for path in named if not list(ROOT.glob(path)) and not list(ROOT.glob(f"{path}.*"))]


def test_the_readmes_tree_is_of_folders_that_are_there() -> None:
    (tree,) = re.findall(r"^```\n(train/ .*?)^```$", text_of(ROOT / "README.md"), flags=re.MULTILINE | re.DOTALL)
    top = re.findall(r"^(\w+)/", tree, flags=re.MULTILINE)
    assert top == ["train", "rcl_fast", "kernels", "bench", "tests", "docs"]
    assert all((ROOT / name).is_dir() for name in top)
    below = "\n".join(line for line in tree.splitlines() if line.startswith("  "))
    rooms = {path.name for path in (ROOT / "train").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"(\w+)/ ", below)) == rooms


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_modules_that_are_run_are_there(document: Path) -> None:
    modules = re.findall(r"python -m (bench[.\w]*)", text_of(document))
    assert not [module for module in modules if not (ROOT / f"{module.replace('.', '/')}.py").is_file()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_targets_of_the_makefile_are_there(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z][\w-]*)", text_of(document), flags=re.MULTILINE)
    assert not [target for target in named if target not in targets]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_can_be_pasted(document: Path) -> None:
    """What is said of a command in its block stands behind a #."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```$", text_of(document), flags=re.MULTILINE | re.DOTALL))
    commands = re.findall(
        r"^(?:[A-Z0-9]+=\S+ )*(?:python|torchrun|bench/|make|bash|git) ?\S.*$", blocks, flags=re.MULTILINE
    )
    assert not [command for command in commands if re.search(r"\S {2,}[^#\s]", command.partition(" #")[0])]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_lines_of_prose_are_of_the_usual_length(document: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    assert not [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "    "))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_english_is_british(document: Path) -> None:
    american = r"\b\w*(?:colors?\b|iz(?:e[ds]?|ing|ation|er)\b|behavior|gray|centered|license\b)\w*"
    others = {"size", "sizes", "sized", "seize", "prize", "citizen"}
    assert not set(re.findall(american, prose_of(document).lower())) - others


def test_ruff_before_a_commit_is_the_locks() -> None:
    (locked,) = re.findall(r"^ruff==(\S+)$", text_of(ROOT / "requirements.lock"), flags=re.MULTILINE)
    assert f"rev: v{locked}\n" in text_of(ROOT / ".pre-commit-config.yaml")


# Figures and their rows.


@cache
def rows_of(file: str) -> list[dict]:
    return [json.loads(line) for line in text_of(RESULTS / file).splitlines()]


def tables(document: Path) -> Iterator[list[list[str]]]:
    """Each table of a document: rows of cells, the head first."""
    for block in re.findall(r"(?:^\|.*\n)+", text_of(document), flags=re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        yield [lines[0], *lines[2:]]


SPREAD = re.compile(r"([\d,.]+) \(([\d,.]+) to ([\d,.]+)\)")
# Documents whose tables have medians with their 20th and 80th percentile, and the rows that these are of.
MEASURED = {
    "docs/benchmarks.md": {
        "speed/loss_cpu.jsonl": ("milliseconds", "milliseconds_p20", "milliseconds_p80"),
        "speed/step_cpu.jsonl": ("images_per_second", "images_per_second_p20", "images_per_second_p80"),
        "speed/startup.jsonl": ("cpu_seconds", "cpu_seconds_p20", "cpu_seconds_p80"),
    },
    "docs/data.md": {"speed/data_cpu.jsonl": ("images_per_second", "images_per_second_p20", "images_per_second_p80")},
    "docs/distributed.md": {
        "speed/cpu_threads.jsonl": ("images_per_second", "images_per_second_p20", "images_per_second_p80")
    },
    "docs/scaling.md": {"speed/distributed_cpu.jsonl": ("ms", "ms_p20", "ms_p80")},
}


def as_written(value: float, like: str) -> str:
    return f"{value:,.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", MEASURED)
def test_medians_and_their_spreads_are_those_of_the_rows(name: str) -> None:
    text = text_of(ROOT / name)
    written = [match for table in tables(ROOT / name) for row in table for match in SPREAD.findall("|".join(row))]
    assert len(written) >= 10
    measured = [tuple(row.get(key) for key in keys) for file, keys in MEASURED[name].items() for row in rows_of(file)]
    measured = [of for of in measured if None not in of]
    for given in written:
        assert any(
            tuple(as_written(value, like) for value, like in zip(of, given, strict=True)) == given for of in measured
        ), given
    assert all(f"bench/results/{file}" in text for file in MEASURED[name])


def test_the_table_of_the_loss_is_that_of_the_rows() -> None:
    (table,) = (table for table in tables(ROOT / "docs/benchmarks.md") if "peak memory" in table[0])
    rows = rows_of("speed/loss_cpu.jsonl")
    assert len(table) - 1 == len(rows)
    for cells, row in zip(table[1:], rows, strict=True):
        published, limit = (
            next(of["milliseconds"] for of in rows if (of["case"], of["variant"]) == (row["case"], variant))
            for variant in ("published", "three products")
        )
        assert cells[0] in ("", row["case"])
        assert cells[2].startswith(f"{row['milliseconds']:,.0f} (")
        assert cells[3:] == [
            f"{published / row['milliseconds']:.2f}×",
            f"{limit / row['milliseconds']:.0%}",
            f"{row['peak_increase_mb']:,.0f} MB",
        ]


def test_the_readmes_speeds_are_those_of_the_table() -> None:
    (table,) = (table for table in tables(ROOT / "docs/benchmarks.md") if "peak memory" in table[0])
    ours = [row for row in table if row[1] == "`tiled`"]
    times = [float(row[3].strip("×")) for row in ours]
    shares = [int(row[4].strip("%")) for row in ours]
    text = " ".join(text_of(ROOT / "README.md").split())
    assert f"{min(times) + 1e-9:.1f} to {max(times) + 1e-9:.1f} times as fast as BCL's published code" in text
    assert f"reaches {min(shares)} to {max(shares)} % of the speed limit" in text
    assert f"take {ours[-1][5]}; the published code takes 2.4 GB" in text


def test_the_ratios_of_starting_are_those_of_the_rows_and_within_what_is_aimed_at() -> None:
    """At most 1.15 times `import torch` for the library, 1.25 times for help and a typo; measured, not timed here."""
    (table,) = (table for table in tables(ROOT / "docs/benchmarks.md") if table[0][0] == "what is started")
    rows = {f"{row['cpu_seconds']:.2f}": row for row in rows_of("speed/startup.jsonl")}
    for cells in table[1:]:
        assert cells[2] == f"{rows[cells[1].split()[0]]['of_import_torch']:.2f}×"
    ratios = {row["case"]: row["of_import_torch"] for row in rows_of("speed/startup.jsonl")}
    assert max(ratio for case, ratio in ratios.items() if "rcl_fast" in case) <= 1.15
    assert max(ratio for case, ratio in ratios.items() if case.startswith("train/")) <= 1.25


def test_the_table_of_digits_is_that_of_the_rows() -> None:
    (table,) = (table for table in tables(ROOT / "docs/benchmarks.md") if table[0][0] == "loss")
    keys = ("balanced_accuracy", "last_epoch_balanced_accuracy", "harmonic_mean", "many", "medium", "few")
    for loss, *cells in table[1:]:
        rows = [row for row in rows_of("accuracy/digits_lt.jsonl") if f"`{row['loss']}`" == loss]
        assert len(rows) == 3
        for key, cell in zip(keys, cells, strict=True):
            values = [100 * row[key] for row in rows]
            assert cell == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def test_the_kills_are_those_of_the_rows() -> None:
    rows = rows_of("faults/kill.jsonl")
    killed = [row for row in rows if row["came_to_it"]]
    early = [row for row in killed if row["went_on_from"] is None]
    assert all(row["same"] for row in rows)
    text = " ".join(text_of(ROOT / "docs/distributed.md").split())
    assert f"Of {len(rows)} runs, one finished before it was killed" in text
    assert f"The other {len(killed)}, {len(early)} of them killed before their first checkpoint" in text
    assert f"({len(killed)} kills of two-process runs" in " ".join(text_of(ROOT / "README.md").split())
