"""What no option's range can say of a run's configuration: values that don't go together, names that are none."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from rcl_fast.presets import PRESETS
from rcl_fast.train.arguments import ranges, spellings
from rcl_fast.train.errors import UserError, refuse, refuse_each
from rcl_fast.train.options import Config, ViewOptions, training_kinds

ARCHITECTURES = ("resnet32", "resnet50", "resnext50")
MAKES_IMBALANCE = ("digits_lt", "cifar10_lt", "cifar100_lt")


def check(config: Config, given: Collection[str] = ()) -> None:
    """Raises UserError, with what to change, for what a configuration of values in their ranges can't be.

    Args:
        given: the options that the person gave; a recipe's warm-up is cut where a run has fewer epochs.
    """
    data = None if config.data.dataset == "digits_lt" else config.data.data  # which reads no folder
    check_results_folder("--output", config.run.output, data)
    warmup, epochs = config.optimization.warmup_epochs, config.optimization.epochs
    refuse(
        {
            f"--warmup-epochs {warmup} must be less than --epochs {epochs}": (
                "warmup_epochs" in given and warmup >= epochs
            ),
            **_together(config),
            **_views(config.views),
        }
    )


def _together(config: Config) -> dict[str, bool]:
    """Returns what options can't be together, and whether they are."""
    loss, optimization = config.loss, config.optimization
    milestones, steps = optimization.milestones, optimization.schedule == "steps"
    warmup = min(optimization.warmup_epochs, optimization.epochs - 1)
    within = f"--warmup-epochs {optimization.warmup_epochs}"
    early = [str(share) for share in milestones if steps and config.epoch_of(share) < warmup]
    minimised = loss.alpha > 0 or (config.contrastive and loss.beta > 0)
    return {
        f"--accumulate must lie between 1 and half the batch size, got {optimization.accumulate}": (
            optimization.accumulate > optimization.batch_size // 2
        ),
        "--loss ldam_drw sets margins between angles: add --classifier cosine": (
            loss.loss == "ldam_drw" and config.model.classifier != "cosine"
        ),
        f"--alpha and --beta leave --loss {loss.loss} nothing to minimise: one that counts must be above 0": (
            not minimised
        ),
        f"--milestones must ascend, got {' '.join(map(str, milestones))}": list(milestones) != sorted(set(milestones)),
        f"--milestones {' '.join(early)} would come within the warm-up, {within}: later ones, or 0": bool(early),
    }


def _views(views: ViewOptions) -> dict[str, bool]:
    """Returns what views can't be, and whether these are."""
    smallest, largest = views.crop_scale
    return {
        f"--crop-scale must be the smallest share, then the largest, got {smallest} {largest}": smallest > largest,
        f"--resize {views.resize} is less than --image-size {views.image_size}, which would be cropped from it": (
            views.evaluation == "resize_center_crop" and views.resize < views.image_size
        ),
        f"--randaugment {views.randaugment}: {_RANDAUGMENT}": not _is_randaugment(views.randaugment),
    }


_RANDAUGMENT = (
    "expected rand and parts of timm's, each once: mM of 0 to 10 (or to mmax), nN of 0 to 14, pP of 0 to 1, mstdS, "
    "mmaxM from 1 on, inc0 or inc1, tweights, t3a or t3aw; like rand-n2-m10-mstd0.5"
)
_RANDAUGMENT_PART = re.compile(r"(m|n|mmax)(\d{1,3})|(p|mstd)(\d+(?:\.\d*)?)|(inc)([01])|(t)(weights|3a|3aw)")


def _is_randaugment(text: str) -> bool:
    """Returns whether timm reads all of it as it is meant; timm passes over parts that it doesn't know."""
    first, *parts = text.split("-")
    found = [_RANDAUGMENT_PART.fullmatch(part) for part in parts]
    pairs = [tuple(filter(None, match.groups())) for match in found if match]
    values = dict(pairs)
    if first != "rand" or None in found or len(values) < len(pairs):
        return False
    largest = int(values.get("mmax", 10))
    magnitude = int(values.get("m", min(largest, 10)))
    return largest >= 1 and magnitude <= largest and int(values.get("n", 2)) <= 14 and float(values.get("p", 0)) <= 1


def check_arch(arch: str) -> None:
    """Raises UserError, with names that are near, for an architecture that there is not."""
    refuse_each(arch_mistakes(arch))


def arch_mistakes(arch: str | None) -> list[str]:
    """Returns a sentence, with names that are near, for an architecture that there is not."""
    if arch is None or arch in ARCHITECTURES:
        return []
    if not arch.startswith("timm/"):
        meant = spellings.another_name(arch, ARCHITECTURES)
        near = [meant] if meant else [f"timm/{name}" for name in _near_in_timm(arch)[:1]]
        hint = f"; did you mean {near[0]}?" if near else ""
        return [f"--arch {arch}: unknown; choose {', '.join(ARCHITECTURES)} or timm/NAME{hint}"]
    import timm  # slow to import, and only these architectures need it

    name = arch.removeprefix("timm/")
    if name in timm.list_models():
        return []
    near = _near_in_timm(name)
    similar = f"; similar: {', '.join(near)}" if near else ""
    return [f"--arch {arch}: timm {timm.__version__} has no such model{similar}"]


def _near_in_timm(name: str) -> list[str]:
    import timm  # slow to import, and only a wrong name needs it

    known = timm.list_models()
    return [name] if name in known else get_close_matches(name, known, n=5, cutoff=0.7)


def check_results_folder(option: str, folder: Path | None, data: Path | None = None) -> None:
    """Raises UserError where results can't be written to a folder, or would lie among the images of the data.

    A folder that holds a run already was let through when that began.
    """
    if folder is None:
        return
    name = str(folder).encode(errors="backslashreplace").decode()
    try:
        there = _nearest(folder)
    except OSError as error:
        raise UserError(f"{option} {name} can't be used ({error.strerror}): name another folder") from error
    within = data is not None and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(data))
    refuse(
        {
            f"{option} {name}: {there} is a file, not a folder; name another": not there.is_dir(),
            f"{option} {name}: {there} may not be written to; make it writable, or name another folder": (
                there.is_dir() and not os.access(there, os.W_OK | os.X_OK)
            ),
            f"{option} {name} lies in the data, {data}: name a folder elsewhere": (
                within and not os.path.isfile(folder / "config.json")
            ),
            f"{option} {name}: TensorBoard writes to no folder whose name is not UTF-8": name != str(folder),
        }
    )


def _nearest(folder: Path) -> Path:
    """Returns the folder, or what is there of the path to it. Raises OSError where no folder can be made below that."""
    for place in (folder, *folder.parents):
        try:
            os.stat(place)
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():  # to nothing
                raise
        else:
            break
    for name in folder.relative_to(place).parts:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place / name)  # raises for a name that is too long
    return place


def without_effect(config: Config, given: Collection[str]) -> list[str]:
    """Returns a sentence for each choice that leaves some of the given options without effect."""
    found = []
    for choice, names in _unused(config):
        flags = [ranges.flag(name) for name in names if name in given]
        if flags:
            found.append(f"{', '.join(flags)}: without effect with {choice}")
    return found


def _unused(config: Config) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the options that the configuration has no use for, with the choice that leaves them so."""
    loss, data, views = config.loss.loss, config.data, config.views
    kinds = training_kinds(views, config.contrastive)
    in_memory = data.dataset in MAKES_IMBALANCE and not {"randaugment", "sim_randaugment"} & {*kinds}
    compresses = config.contrastive and PRESETS[loss].rebalance
    rule = ("compression_from", "compression_threshold", "compression_under", "compression_rest")
    sides = ("beta", "temperature", "backend", "head_hidden", "head_out", "x2", "x3")
    unused = [
        ("--schedule cosine", config.optimization.schedule == "cosine", ("milestones", "lr_decay")),
        (f"--loss {loss}", not config.contrastive, sides),
        (f"--loss {loss}", not config.contrastive and loss != "logit_adjusted", ("tau",)),
        (f"--loss {loss}", not compresses, ("compression", *rule)),
        ("--no-compression", compresses and not config.loss.compression, rule),
        (f"--loss {loss}", loss != "ldam_drw", ("drw_from",)),
        ("--classifier linear", config.model.classifier == "linear", ("cosine_scale",)),
        (f"--dataset {data.dataset}", data.dataset not in MAKES_IMBALANCE, ("imbalance", "imbalance_shape")),
        (f"--dataset {data.dataset}", data.dataset in MAKES_IMBALANCE, ("on_bad_image", "manifest")),
        ("--dataset digits_lt", data.dataset == "digits_lt" and data.data is not None, ("data",)),
        ("--validate-on test", data.validate_on == "test", ("validation_fraction",)),
        ("--evaluation as_is", views.evaluation == "as_is", ("resize",)),
        ("--loader device", data.loader == "device", ("workers",)),
        ("--loader auto, which is device here", data.loader == "auto" and in_memory, ("workers",)),
        *((f"the views {' '.join(kinds)}", of.isdisjoint(kinds), names) for of, names in _OF_VIEWS.items()),
    ]
    return [(choice, names) for choice, holds, names in unused if holds]


# The options that only some kinds of views have a use for.
_OF_VIEWS = {
    frozenset({"crop_flip", "autoaugment"}): ("crop_padding",),
    frozenset({"autoaugment"}): ("cutout",),
    frozenset({"sim", "randaugment", "sim_randaugment"}): ("crop_scale", "jitter"),
    frozenset({"sim", "sim_randaugment"}): ("jitter_probability", "gray_probability"),
    frozenset({"randaugment", "sim_randaugment"}): ("randaugment",),
}
