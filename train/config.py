"""A run's configuration: the recipe of a data set, the command line that changes it, what config.json keeps of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
from rcl_fast.train.options import Config, Dataset, Loss


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The configuration of a command line: the recipe of --dataset (or the run of --resume), then what it overrides."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=get_args(Dataset), default="digits_lt")
    first.add_argument("--loss", choices=get_args(Loss), default="bcl_rcl")
    first.add_argument("--resume", type=Path)
    chosen, _ = first.parse_known_args(arguments)
    defaults = saved_config(chosen.resume) if chosen.resume else recipe(chosen.dataset, chosen.loss)
    config = tyro.cli(
        Config,
        args=arguments,
        default=defaults,
        prog="train/run.py",
        description=_DESCRIPTION,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    check(config)
    if chosen.resume:
        check_resumable(defaults, config)
    return config


_DESCRIPTION = """Train a long-tailed classifier with supervised contrastive losses.

Examples:
  train/run.py                                                      handwritten digits, a minute on a laptop
  train/run.py --dataset imagenet_lt --arch resnext50 --data DIR    the paper's main job
  train/run.py --dataset folder --data DIR --loss bcl_rcl           your own images
  train/run.py --resume runs/RUN                                    go on after an interruption
  torchrun --nproc-per-node 8 train/run.py ...                      the same on 8 GPUs: batch and rate stay global

The defaults shown are those of the recipe of --dataset and --loss: try --dataset cifar100_lt --help."""


_SHARED_RECIPES = {"cifar10_lt": "cifar_lt", "cifar100_lt": "cifar_lt"}


def recipe(dataset: str, loss: str) -> Config:
    """The defaults of a data set and a loss, from its file in recipes/: [SECTION], then [when.LOSS.SECTION]."""
    path = resources.files("rcl_fast.train") / "recipes" / f"{_SHARED_RECIPES.get(dataset, dataset)}.toml"
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    overrides = values.pop("when", {}).get(loss, {})
    for section, options in overrides.items():
        values.setdefault(section, {}).update(options)
    values.setdefault("data", {})["dataset"] = dataset
    values.setdefault("loss", {})["loss"] = loss
    return from_dict(values)


def saved_config(run: Path) -> Config:
    """The configuration of an earlier run, with `resume` set to it and its folder as output."""
    path = run / "config.json"
    if not path.is_file():
        raise SystemExit(f"--resume {run}: no config.json there; give the folder of an earlier run, like runs/NAME")
    config = from_dict(json.loads(path.read_text(encoding="utf-8")))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, resume=run, output=run))


# What a resumed run may change: where things are and how they are computed, not what is computed.
RESUMABLE = {
    "data": {"data", "workers", "manifest"},
    "run": {"device", "precision", "channels_last", "compile", "cuda_graph", "checkpoint_minutes", "timeout_minutes"},
}


def check_resumable(saved: Config, config: Config) -> None:
    """Raises SystemExit where a resumed run would no longer be the run that it goes on with."""
    before, after = saved.to_dict(), config.to_dict()
    changed = [
        f"--{name.replace('_', '-')} (was {before[section][name]}, now {value})"
        for section, options in after.items()
        for name, value in options.items()
        if value != before[section][name] and name not in RESUMABLE.get(section, set())
    ]
    if changed:
        raise SystemExit(f"--resume goes on with the run as it was; start a new run to change {', '.join(changed)}")


def from_dict(values: dict[str, dict[str, Any]]) -> Config:
    """A configuration from plain values by section; an unknown name is an error."""
    sections = get_type_hints(Config)
    unknown = values.keys() - sections.keys()
    if unknown:
        raise ValueError(f"unknown section {sorted(unknown)[0]!r}; the sections are {', '.join(sections)}")
    return Config(**{name: _section(kind, values.get(name, {})) for name, kind in sections.items()})


Section = TypeVar("Section")


def _section(kind: type[Section], values: dict[str, Any]) -> Section:
    hints = get_type_hints(kind)
    unknown = values.keys() - hints.keys()
    if unknown:
        raise ValueError(f"{kind.__name__} has no option {sorted(unknown)[0]!r}; it has {', '.join(hints)}")
    return kind(**{name: _plain(hints[name], value) for name, value in values.items()})


def _plain(hint: Any, value: Any) -> Any:
    """JSON and TOML know neither tuples nor paths."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in (hint, *get_args(hint)):
        return Path(value)
    return value


def check_shared(config: Config, processes: int) -> None:
    """Whether so many processes can share the batch; raises SystemExit with what to change."""
    batch, parts = config.optimization.batch_size, config.optimization.accumulate
    if batch % processes:
        below = batch // processes * processes
        near = f"{below} or {below + processes}" if below else f"{processes} or more"
        raise SystemExit(
            f"--batch-size {batch} is of all processes together and must be a multiple of their number, {processes}: "
            f"take {near}"
        )
    if batch // processes < 2 * parts:
        raise SystemExit(
            f"--batch-size {batch} leaves each part less than 2 images, with {processes} processes and --accumulate "
            f"{parts}: take at least {2 * parts * processes}, or fewer of these"
        )


def check(config: Config) -> None:
    """Values that no type can rule out; raises SystemExit with what to change."""
    optimization, loss, data = config.optimization, config.loss, config.data
    problems = [
        message
        for wrong, message in [
            (optimization.epochs < 1, f"--epochs must be at least 1, got {optimization.epochs}"),
            (optimization.batch_size < 2, f"--batch-size must be at least 2, got {optimization.batch_size}"),
            (
                not 1 <= optimization.accumulate <= optimization.batch_size // 2,
                f"--accumulate must lie between 1 and half the batch size, got {optimization.accumulate}",
            ),
            (
                config.run.checkpoint_minutes < 0,
                f"--checkpoint-minutes must be 0 or more, got {config.run.checkpoint_minutes}",
            ),
            (
                config.run.timeout_minutes <= 0,
                f"--timeout-minutes must be above 0, got {config.run.timeout_minutes}",
            ),
            (optimization.lr <= 0, f"--lr must be above 0, got {optimization.lr}"),
            (loss.temperature <= 0, f"--temperature must be above 0, got {loss.temperature}"),
            (data.imbalance < 1, f"--imbalance must be at least 1, got {data.imbalance}"),
            (
                not 0 < data.validation_fraction < 1,
                f"--validation-fraction must lie between 0 and 1, got {data.validation_fraction}",
            ),
            (data.workers < 0, f"--workers must be 0 or more, got {data.workers}"),
            (
                loss.loss == "ldam_drw" and config.model.classifier != "cosine",
                "--loss ldam_drw sets margins between angles: add --classifier cosine",
            ),
        ]
        if wrong
    ]
    if problems:
        raise SystemExit("\n".join(problems))
