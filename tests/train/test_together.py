"""Several processes train and evaluate exactly as one does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

Found = dict[tuple[int, int], dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By (number of processes, rank): what together.py wrote."""
    folder = tmp_path_factory.mktemp("together")
    script = Path(__file__).with_name("together.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(folder)], env=environment, check=True, timeout=2400)
    places = [(world_size, rank) for world_size in (1, 2, 3) for rank in range(world_size)]
    return {(w, r): torch.load(folder / f"{w}-{r}.pt", weights_only=True) for w, r in places}


@pytest.mark.parametrize("case", ["ce", "cb_focal", "ldam_drw", "scl", "bcl_rcl", "ce in parts", "bcl_rcl in parts"])
def test_weights_and_losses_are_those_of_one_process(found: Found, case: str) -> None:
    """With shares of the batch that differ in size, and classes that weigh differently."""
    one = found[1, 0][case]
    for place in found.keys() - {(1, 0)}:
        torch.testing.assert_close(found[place][case]["losses"], one["losses"], rtol=1e-5, atol=1e-6)
        for name, weight in one["weights"].items():
            torch.testing.assert_close(found[place][case]["weights"][name], weight, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", ["ce", "bcl_rcl"])
def test_parts_change_nothing(found: Found, loss: str) -> None:
    whole, parts = (found[1, 0][case]["weights"] for case in (loss, f"{loss} in parts"))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(("case", "dtype"), [("ce in fp16", torch.float16), ("ce in bf16", torch.bfloat16)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_compressed_gradients_are_near(found: Found, case: str, dtype: torch.dtype, world_size: int) -> None:
    """A gradient is rounded where it is sent and where it is summed, by half a unit in its last place each."""
    exact, rounded = (found[world_size, 0][name]["weights"]["classifier.weight"] for name in ("ce", case))
    assert not torch.equal(exact, rounded)
    moved = (exact - found[world_size, 0]["ce"]["start"]).norm()
    assert (rounded - exact).norm() <= torch.finfo(dtype).eps * moved


def test_names_of_weights_have_no_prefix(found: Found) -> None:
    assert found[3, 0]["ce"]["keys"] == found[1, 0]["ce"]["keys"]


@pytest.mark.parametrize("samples", ["test set", "two images"])
def test_every_image_is_evaluated_once(found: Found, samples: str) -> None:
    """Neither 400 nor 2 images are shared equally by 3 processes."""
    one = found[1, 0]["evaluated"][samples]
    assert one["confusion"].sum() == (400 if samples == "test set" else 2)
    for world_size, rank in found:
        mine = found[world_size, rank]["evaluated"][samples]
        assert torch.equal(mine["confusion"], one["confusion"])
        assert torch.equal(mine["reliability"][:, [0, 2]], one["reliability"][:, [0, 2]])
        torch.testing.assert_close(mine["reliability"][:, 1], one["reliability"][:, 1], rtol=1e-6, atol=1e-6)
        if rank == 0:
            assert torch.equal(mine["labels"], one["labels"])
            torch.testing.assert_close(mine["features"], one["features"], rtol=1e-4, atol=1e-5)


def test_a_new_start_changes_no_bit(found: Found) -> None:
    """Of three processes, too, where the order of a sum matters."""
    assert all(place["resumed"]["same"] for place in found.values())


def test_a_step_that_one_process_can_not_make_is_made_by_none(found: Found) -> None:
    for (world_size, _), place in found.items():
        assert (place["left out"]["steps"], place["left out"]["skipped"]) == (3, 1)
        assert torch.equal(place["left out"]["weights"], found[world_size, 0]["left out"]["weights"])
