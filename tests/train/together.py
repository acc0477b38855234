"""Train and evaluate on 1, 2 and 3 processes, and write what came out, for test_together.py: together.py FOLDER.

The processes are forked from this one, which has imported everything and run nothing yet.
"""

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rcl_fast import LDAM
from rcl_fast.train.config import parse
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Batch, evaluation_spec, training_spec
from rcl_fast.train.loaders.torchvision import TorchvisionLoader
from rcl_fast.train.loop import engine
from rcl_fast.train.loop.evaluation import evaluate, random_mask
from rcl_fast.train.loop.step import train_step
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.options import Config, training_kinds
from rcl_fast.train.rundir.logs import SilentLog
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.hardware import choose_runtime

WORLDS = (1, 2, 3)
LOSSES = ("ce", "cb_focal", "ldam_drw", "scl", "bcl_rcl")
SIZES = (24, 23, 10)  # of the batches of three steps, not all of them multiples of the number of processes


def configure(*arguments: str) -> Config:
    return parse(["--device", "cpu", "--loader", "device", "--batch-size", "24", "--lr", "0.005", *arguments])


def started(config: Config) -> tuple[Training, Splits]:
    runtime = choose_runtime(config.run)
    splits = build.load(config)
    return start_training(config, splits, runtime), splits


def batches(config: Config, splits: Splits) -> list[Batch]:
    """This process's slices of the same three batches, in the default dtype."""
    kinds = training_kinds(config.views, config.contrastive)
    spec = training_spec(splits.train, kinds, config.views, seed=0, batch_size=24)
    found = []
    for size, batch in zip(SIZES, TorchvisionLoader(spec, workers=0).epoch(0), strict=False):
        mine = torch.from_numpy(np.array_split(np.arange(size), distributed.world_size())[distributed.rank()])
        views = tuple(view[mine].to(torch.get_default_dtype()) for view in batch.views)
        found.append(Batch(views, batch.labels[mine], batch.indices[mine]))
    return found


def trained(*arguments: str) -> dict[str, Any]:
    """Three steps of SGD in float64, with BatchNorm as in evaluation: what depends on the loss alone."""
    torch.set_default_dtype(torch.float64)
    config = configure(*arguments)
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
    training, splits = started(configure("--loss", "ce"))
    few = dataclasses.replace(splits.test, images=splits.test.images[:2], labels=splits.test.labels[:2])
    found = {}
    for name, samples in (("test set", splits.test), ("two images", few)):
        place = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        spec = evaluation_spec(samples, training.config.views, batch_size=48, **place)
        loader = TorchvisionLoader(spec, workers=0)
        picture = random_mask(len(samples), most=100)
        found[name] = evaluate(training.model, loader, splits.num_classes, training.runtime, picture)._asdict()
    return found


def resumed() -> dict[str, Any]:
    """Four steps with BatchNorm in training, in one go and with a new start after two."""
    config = configure("--loss", "bcl_rcl")
    whole, splits = started(config)
    loader = build.training_loader(config, splits, whole.runtime)
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


class Given(NamedTuple):
    """A loader of one epoch."""

    batches: list[Batch]
    steps_per_epoch: int
    fingerprint: dict[str, str]

    def epoch(self, _: int, start: int = 0) -> Iterator[Batch]:
        return iter(self.batches[start:])


def left_out() -> dict[str, Any]:
    """An epoch of three steps, in the second of which all images of the last process are bad."""
    config = configure("--loss", "ce")
    training, splits = started(config)
    steps = batches(config, splits)
    if distributed.rank() == distributed.world_size() - 1:
        steps[1] = Batch((steps[1].views[0][:0],), steps[1].labels[:0], steps[1].indices[:0])
    engine.train_epoch(training, Given(steps, len(steps), {}), SilentLog())
    assert training.progress is not None
    weights = training.model.classifier.weight.detach().clone()
    return {"steps": training.progress.steps, "skipped": training.progress.skipped, "weights": weights}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    **{loss: lambda loss=loss: trained("--loss", loss) for loss in LOSSES},  # type: ignore[misc]
    "ce in parts": lambda: trained("--loss", "ce", "--accumulate", "3"),
    "bcl_rcl in parts": lambda: trained("--loss", "bcl_rcl", "--accumulate", "3"),
    "ce in fp16": lambda: trained("--loss", "ce", "--gradient-compression", "fp16"),
    "ce in bf16": lambda: trained("--loss", "ce", "--gradient-compression", "bf16"),
    "evaluated": evaluated,
    "resumed": resumed,
    "left out": left_out,
}


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    return sum(abs(status) for world_size in WORLDS for status in run(folder, world_size))


def run(folder: Path, world_size: int) -> list[int]:
    """All checks on so many processes; their exit statuses."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that is free
    forks = [
        multiprocessing.get_context("fork").Process(target=process, args=(folder, world_size, rank, store.port))
        for rank in range(world_size)
    ]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join()
    return [fork.exitcode or 0 for fork in forks]


def process(folder: Path, world_size: int, rank: int, port: int) -> None:
    os.environ |= {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    # As under torchrun, whose agent keeps the store.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with distributed.init_process_group(torch.device("cpu"), timeout_minutes=30):
        found = {name: check() for name, check in CHECKS.items()}
    torch.save(found, folder / f"{world_size}-{rank}.pt")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
