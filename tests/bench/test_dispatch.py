"""The ways to the kernels are timed without a GPU, and nothing else with them."""

from pathlib import Path

import torch

from bench import rows
from bench.loss import dispatch
from rcl_fast.kernels import passes


def test_rows_of_both_ways(tmp_path: Path) -> None:
    threads, forward = torch.get_num_threads(), passes.forward
    dispatch.main(dispatch.Options(dry_run=True, output=tmp_path / "rows.jsonl"))
    torch.set_num_threads(threads)
    assert passes.forward is forward
    assert not list(rows.problems(tmp_path / "rows.jsonl"))
    assert [row["way"] for row in rows.read(tmp_path / "rows.jsonl")] == ["function", "operator"]
