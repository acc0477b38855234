"""Train and evaluate on 1, 2 and 3 processes, and write what came out, for test_together.py: together.py FOLDER.

The processes are forked from this one, which has imported everything and run nothing yet.
"""

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcl_fast import LDAM
from rcl_fast.train.config import parse
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Batch, evaluation_reading, training_reading
from rcl_fast.train.loaders.torchvision import TorchvisionLoader
from rcl_fast.train.loop.evaluation import evaluate, some_of
from rcl_fast.train.loop.step import train_step
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.options import Config, training_kinds
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.machine import choose_machine

WORLDS = (1, 2, 3)
LOSSES = ("ce", "cb_focal", "ldam_drw", "scl", "bcl_rcl")
SIZES = (24, 23, 10)  # of the batches of three steps, not all of them multiples of the number of processes


def settings(*arguments: str) -> Config:
    return parse(["--device", "cpu", "--loader", "device", "--batch-size", "24", "--lr", "0.005", *arguments])


def started(config: Config) -> tuple[Training, Splits]:
    machine = choose_machine(config.run)
    splits = build.load(config, print)
    return start_training(config, splits, machine), splits


def batches(config: Config, splits: Splits) -> list[Batch]:
    """This process's slices of the same three batches, in the default dtype."""
    kinds = training_kinds(config.views, config.contrastive)
    reading = training_reading(splits.train, kinds, config.views, seed=0, batch_size=24)
    found = []
    for size, batch in zip(SIZES, TorchvisionLoader(reading, workers=0).epoch(0), strict=False):
        mine = np.array_split(np.arange(size), distributed.world())[distributed.rank()]
        cut = {name: value[torch.from_numpy(mine)] for name, value in batch.items()}
        found.append({name: x.to(torch.get_default_dtype()) if x.is_floating_point() else x for name, x in cut.items()})
    return found


def trained(*arguments: str) -> dict[str, Any]:
    """Three steps of SGD in float64, with BatchNorm as in evaluation: what depends on the loss alone."""
    torch.set_default_dtype(torch.float64)
    config = settings(*arguments)
    training, splits = started(config)
    training.objective.float()  # the cross-entropy side computes in float32, whatever it is given
    if isinstance(training.objective.cross_entropy, LDAM):
        training.objective.cross_entropy.reweight()
    training.model.eval()
    start = training.model.classifier.weight.detach().clone()
    losses = [train_step(training, batch) for batch in batches(config, splits)]
    torch.set_default_dtype(torch.float32)
    return {
        "start": start,
        "weights": training.model.state_dict(),
        "losses": losses,
        "keys": list(training.model.state_dict()),
    }


def evaluated() -> dict[str, Any]:
    """The test set, and a set of two images, which leaves one of three processes without."""
    training, splits = started(settings("--loss", "ce"))
    few = dataclasses.replace(splits.test, images=splits.test.images[:2], labels=splits.test.labels[:2])
    found = {}
    for name, samples in (("test set", splits.test), ("two images", few)):
        place = {"rank": distributed.rank(), "world": distributed.world()}
        reading = evaluation_reading(samples, training.config.views, batch_size=48, **place)
        loader = TorchvisionLoader(reading, workers=0)
        picture = some_of(len(samples), most=100)
        found[name] = evaluate(training.model, loader, splits.num_classes, training.machine, picture)._asdict()
    return found


def resumed() -> dict[str, Any]:
    """Four steps with BatchNorm in training, in one go and with a new start after two."""
    config = settings("--loss", "bcl_rcl")
    whole, splits = started(config)
    loader = build.training_loader(config, splits, whole.machine, print)
    steps = list(loader.epoch(0))[:4]
    for batch in steps:
        train_step(whole, batch)
    first, _ = started(config)
    for batch in steps[:2]:
        train_step(first, batch)
    state = first.state_dict()
    second, _ = started(config)
    second.load_state_dict(state)
    for batch in steps[2:]:
        train_step(second, batch)
    one, other = dict(whole.model.named_parameters()), dict(second.model.named_parameters())
    return {"same": all(torch.equal(one[name], other[name]) for name in one)}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    **{loss: lambda loss=loss: trained("--loss", loss) for loss in LOSSES},  # type: ignore[misc]
    "ce in parts": lambda: trained("--loss", "ce", "--accumulate", "3"),
    "bcl_rcl in parts": lambda: trained("--loss", "bcl_rcl", "--accumulate", "3"),
    "ce in fp16": lambda: trained("--loss", "ce", "--gradient-compression", "fp16"),
    "ce in bf16": lambda: trained("--loss", "ce", "--gradient-compression", "bf16"),
    "evaluated": evaluated,
    "resumed": resumed,
}


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    return sum(abs(status) for world in WORLDS for status in run(folder, world))


def run(folder: Path, world: int) -> list[int]:
    """All checks on so many processes; their exit statuses."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that is free
    forks = [
        multiprocessing.get_context("fork").Process(target=process, args=(folder, world, rank, store.port))
        for rank in range(world)
    ]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join()
    return [fork.exitcode or 0 for fork in forks]


def process(folder: Path, world: int, rank: int, port: int) -> None:
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    # As under torchrun, whose agent keeps the store.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with distributed.joined(torch.device("cpu"), timeout_minutes=30):
        found = {name: check() for name, check in CHECKS.items()}
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
