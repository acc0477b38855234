"""What is written of a test set, on numbers small enough to work by hand."""

from pathlib import Path

import torch

from rcl_fast.train.report import results


def test_a_row_a_class(tmp_path: Path) -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    path = tmp_path / "per_class.csv"
    results.write_per_class(path, ["ant, red", "caf\udce9", "c"], torch.tensor([120, 30, 5]), confusion)
    assert path.read_text(encoding="utf-8").splitlines() == [
        "class,training_images,test_images,accuracy,precision",
        '"ant, red",120,4,0.75,1.0',
        r"caf\xe9,30,2,1.0,0.6666666666666666",
        "c,5,0,,",
    ]


def test_empty_bins_have_no_accuracy() -> None:
    found = results._reliability(torch.tensor([[0.0, 0.0, 0.0], [4.0, 3.0, 2.0]]))
    assert found == {"images": [0, 4], "confidence": [None, 0.75], "accuracy": [None, 0.5]}
