"""A run's configuration: from the recipe of a data set, the command line, and an earlier run's config.json."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
from rcl_fast.train.errors import NotFound, UserError, refuse
from rcl_fast.train.options import Config, Dataset, Loss


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns a command line's configuration: the recipe of --dataset (or the run of --resume), with its overrides.

    Raises:
        UserError: values that are not allowed.
        SystemExit: --help was asked for, or an option is not known; tyro has printed the text.
    """
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


def config_of(arguments: Sequence[str]) -> Config:
    """Returns the configuration of train/run.py's arguments, for code that must not exit. Raises UserError."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return parse(arguments)
    except SystemExit as error:
        raise UserError(said.getvalue().strip()) from error


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
    """Returns the defaults of a data set and a loss, from its file in recipes/: [SECTION], then [when.LOSS.SECTION]."""
    path = resources.files("rcl_fast.train") / "recipes" / f"{_SHARED_RECIPES.get(dataset, dataset)}.toml"
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    overrides = values.pop("when", {}).get(loss, {})
    for section, options in overrides.items():
        values.setdefault(section, {}).update(options)
    values.setdefault("data", {})["dataset"] = dataset
    values.setdefault("loss", {})["loss"] = loss
    return from_dict(values)


def saved_config(run: Path) -> Config:
    """Returns an earlier run's configuration, with `resume` and `output` set to its folder. Raises NotFound."""
    path = run / "config.json"
    if not path.is_file():
        raise NotFound(f"{run}: no config.json there; give the folder of an earlier run, like runs/NAME")
    try:
        config = from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} can't be read as a run's configuration ({error}): it is damaged, or of another version"
        ) from error
    return dataclasses.replace(config, run=dataclasses.replace(config.run, resume=run, output=run))


# The options that a resumed run may change: where things are and how they are computed, not what is computed.
RESUMABLE = {
    "data": {"data", "workers", "manifest"},
    "run": {"device", "precision", "channels_last", "compile", "cuda_graph", "checkpoint_minutes", "timeout_minutes"},
}


def check_resumable(saved: Config, config: Config) -> None:
    """Raises UserError where the options of a resumed run would make it another run."""
    before, after = saved.to_dict(), config.to_dict()
    changed = [
        f"--{name.replace('_', '-')} (was {before[section][name]}, now {value})"
        for section, options in after.items()
        for name, value in options.items()
        if value != before[section][name] and name not in RESUMABLE.get(section, set())
    ]
    if changed:
        raise UserError(f"--resume goes on with the run as it was; start a new run to change {', '.join(changed)}")


def from_dict(values: dict[str, dict[str, Any]]) -> Config:
    """Returns the configuration from plain values by section. Raises ValueError for an unknown name."""
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
    """Returns a value from JSON or TOML, as a tuple or a path where the type is one."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in (hint, *get_args(hint)):
        return Path(value)
    return value


def check_shared(config: Config, processes: int) -> None:
    """Raises UserError, with what to change, where so many processes can't share the batch."""
    batch, parts = config.optimization.batch_size, config.optimization.accumulate
    if batch % processes:
        below = batch // processes * processes
        near = f"{below} or {below + processes}" if below else f"{processes} or more"
        raise UserError(
            f"--batch-size {batch} is of all processes together and must be a multiple of their number, {processes}: "
            f"take {near}"
        )
    if batch // processes < 2 * parts:
        raise UserError(
            f"--batch-size {batch} leaves each part less than 2 images, with {processes} processes and --accumulate "
            f"{parts}: take at least {2 * parts * processes}, or fewer of these"
        )


def check(config: Config) -> None:
    """Raises UserError, with what to change, for values that no type can rule out."""
    optimization, loss, data, run = config.optimization, config.loss, config.data, config.run
    half = optimization.batch_size // 2
    refuse(
        {
            f"--epochs must be at least 1, got {optimization.epochs}": optimization.epochs < 1,
            f"--batch-size must be at least 2, got {optimization.batch_size}": optimization.batch_size < 2,
            f"--accumulate must lie between 1 and half the batch size, got {optimization.accumulate}": (
                not 1 <= optimization.accumulate <= half
            ),
            f"--checkpoint-minutes must be 0 or more, got {run.checkpoint_minutes}": run.checkpoint_minutes < 0,
            f"--timeout-minutes must be above 0, got {run.timeout_minutes}": run.timeout_minutes <= 0,
            f"--lr must be above 0, got {optimization.lr}": optimization.lr <= 0,
            f"--temperature must be above 0, got {loss.temperature}": loss.temperature <= 0,
            f"--imbalance must be at least 1, got {data.imbalance}": data.imbalance < 1,
            f"--validation-fraction must lie between 0 and 1, got {data.validation_fraction}": (
                not 0 < data.validation_fraction < 1
            ),
            f"--workers must be 0 or more, got {data.workers}": data.workers < 0,
            "--loss ldam_drw sets margins between angles: add --classifier cosine": (
                loss.loss == "ldam_drw" and config.model.classifier != "cosine"
            ),
        }
    )
