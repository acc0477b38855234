"""A few of the kills of kill.py; bench/results/faults/kill.jsonl has the rows of many."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_killed_runs_end_as_the_uninterrupted_one(tmp_path: Path) -> None:
    rows = tmp_path / "faults.jsonl"
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill.py")), "--kills", "4", "--losses", "ce", "--output", rows],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=2400,
    )
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(found) == 4
    assert all(row["same"] for row in found)
    assert len({row["sha256"] for row in found}) <= 2  # one for each loader
