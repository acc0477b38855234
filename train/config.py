"""A run's configuration: from the recipe of a data set, the command line, and an earlier run's config.json."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Collection, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
from rcl_fast.train.arguments import parsing, ranges
from rcl_fast.train.checks import arch_mistakes, check, without_effect
from rcl_fast.train.errors import NotFound, UserError, refuse_each
from rcl_fast.train.options import Config, Dataset

_logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns a command line's configuration: the recipe of --dataset (or the run of --resume), with its overrides.

    --data without --dataset is of the data set "folder". Given options without effect are named in the log.

    Raises:
        UserError: a line for each mistake.
        SystemExit: --help was asked for, and is printed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if parsing.asks_for_help(arguments):
        defaults = _saved(arguments) or _recipe_of(arguments)
        parsing.show_help(Config, prog=_PROG, description=_DESCRIPTION, default=defaults)
    config = config_of(arguments)
    if config.run.resume is None and os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one says it
        _log_notes(config, set(parsing.names(Config, arguments)))
    return config


def _log_notes(config: Config, given: set[str]) -> None:
    if "dataset" not in given and config.data.dataset == "folder":
        _logger.info(f"--data without --dataset: {config.data.data} is read as --dataset folder, your own images")
    for sentence in without_effect(config, given):
        _logger.warning(f"note: {sentence}")


def config_of(arguments: Sequence[str]) -> Config:
    """Returns the configuration of train/run.py's arguments. Raises UserError with a line for each mistake."""
    values, wrong = parsing.read(Config, arguments, _PROG)
    wrong += arch_mistakes(values.get("arch"))
    refuse_each(wrong)
    saved = _saved(arguments)
    config = parsing.made(Config, values, saved or _recipe_of(arguments))
    if saved is not None:
        check_resumable(saved, config)  # what goes together was checked when it began
    else:
        check(config, values)
    return config


def _saved(arguments: Sequence[str]) -> Config | None:
    """Returns the configuration of --resume's run; None without it. Raises as `saved_config`."""
    run = parsing.value_of("resume", arguments)
    return saved_config(Path(run)) if run else None


def _recipe_of(arguments: Sequence[str]) -> Config:
    """Returns the recipe of a command line's --dataset and --loss; of another one where these are misspelt."""
    alone = "folder" if parsing.value_of("data", arguments) is not None else "digits_lt"
    dataset = parsing.value_of("dataset", arguments) or alone
    loss = parsing.value_of("loss", arguments) or "bcl_rcl"
    return recipe(dataset if dataset in get_args(Dataset) else "digits_lt", loss)


_PROG = "train/run.py"
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
    """Returns an earlier run's configuration, with `resume` and `output` set to its folder.

    Raises:
        NotFound: the folder holds no run.
        UserError: config.json is damaged, or has values that an option can't have; each is named.
    """
    path = run / "config.json"
    if not path.is_file():
        raise NotFound(f"{run}: no config.json there; give the folder of an earlier run, like runs/NAME")
    try:
        config = from_dict(json.loads(path.read_text(encoding="utf-8")))
        ranges.check(config)
    except (OSError, ValueError, RecursionError) as error:
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
    """Returns the configuration from plain values by section.

    Raises ValueError for a name that is unknown or missing; values are as they were.
    """
    sections = get_type_hints(Config)
    _check_names("the configuration", "section", values, sections)
    return Config(**{name: _section(kind, values.get(name, {})) for name, kind in sections.items()})


Section = TypeVar("Section")


def _section(kind: type[Section], values: dict[str, Any]) -> Section:
    hints = get_type_hints(kind)
    _check_names(kind.__name__, "option", values, hints)
    missing = [name for name in hints if name not in values and not hasattr(kind, name)]  # defaults are attributes
    if missing:
        raise ValueError(f"{kind.__name__} needs {missing[0]!r}")
    return kind(**{name: _plain(hints[name], value) for name, value in values.items()})


def _check_names(where: str, what: str, values: Any, known: Collection[str]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} has its {what}s by name, not {ranges.shown(values)}")
    unknown = values.keys() - {*known}
    if unknown:
        raise ValueError(f"{where} has no {what} {min(unknown)!r}; it has {', '.join(known)}")


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
