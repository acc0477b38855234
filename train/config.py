"""The typed configuration of a run: its options, the recipe of their defaults, the command line that changes them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import tyro

from rcl_fast.losses import PRESETS
from rcl_fast.train.data.views import ViewOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Dataset = Literal["digits_lt", "cifar10_lt", "cifar100_lt", "imagenet_lt", "places_lt", "inaturalist18", "folder"]
Loss = Literal["ce", "balanced_softmax", "logit_adjusted", "cb_focal", "ldam_drw", "scl", "bcl", "scl_rcl", "bcl_rcl"]


@dataclass(frozen=True)
class DataOptions:
    """The images. Choose --dataset first: its recipe sets the default of every other option."""

    dataset: Dataset = "digits_lt"
    """Data set and recipe. "folder" is your own images: DATA/train/CLASS/*, DATA/test/CLASS/*."""
    data: Path | None = None
    """Folder that holds the data set. digits_lt needs none."""
    imbalance: float = 100.0
    """Images of the largest class over those of the smallest, for digits_lt and CIFAR."""
    imbalance_shape: Literal["exponential", "step"] = "exponential"
    """How the counts fall from the largest class to the smallest."""
    validation_fraction: float = 0.1
    """Share of the training images held out for validation, where the data set has no validation set of its own."""
    validate_on: Literal["validation", "test"] = "validation"
    """Where the best epoch is selected. "test" holds nothing out and repeats what the literature does."""
    loader: Literal["auto", "dali", "torchvision", "device"] = "auto"
    """What decodes and augments: dali (files or pixels, on GPU or CPU), torchvision (Pillow, in worker processes, the
    reference), device (small data sets, held and augmented in whole batches on the training device). auto: device
    for digits_lt and CIFAR; for files dali on a GPU, where it is installed, else torchvision."""
    workers: int = 2
    """Processes of the torchvision loader (0: none but the main one), CPU threads of dali."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An image that can't be read ends the run, or is left out; train/verify.py finds them all beforehand."""
    manifest: Path | None = None
    """What train/verify.py wrote; by default rcl_fast_manifest.jsonl in DATA."""
    synthetic_data: bool = False
    """Train on noise that lies on the device, to see how fast the trainer is when it never waits for data."""


@dataclass(frozen=True)
class ModelOptions:
    """The network."""

    arch: str = "resnet32"
    """resnet32 (the 0.46 M one for small images), resnet50, resnext50 (32x4d), or timm/NAME."""
    classifier: Literal["linear", "cosine"] = "linear"
    """Linear with bias, or cosine: both sides normalised, no bias."""
    cosine_scale: float = 30.0
    """Scale of the cosine classifier's logits."""
    head_hidden: int = 512
    """Hidden width of the projection head and of the prototypes' head."""
    head_out: int = 128
    """Width D of the embeddings that the contrastive loss compares."""
    sync_batchnorm: bool = False
    """On several GPUs: BatchNorm over the images of all processes, instead of each process's own."""


@dataclass(frozen=True)
class LossOptions:
    """alpha · cross-entropy(logits + tau · log prior) + beta · contrastive."""

    loss: Loss = "bcl_rcl"
    """The contrastive losses (scl, bcl, scl_rcl: the paper's RCL, bcl_rcl: its BCL+RCL), or a one-stage baseline."""
    alpha: float = 1.0
    """Weight of the cross-entropy side."""
    beta: float = 1.0
    """Weight of the contrastive side."""
    tau: float = 1.0
    """Strength of the logit adjustment; 0 is plain cross-entropy."""
    temperature: float = 0.1
    """Temperature T of the contrastive loss."""
    backend: Literal["auto", "triton", "tiled", "dense", "reference"] = "auto"
    """How the contrastive loss is computed."""
    compression: bool = True
    """With *_rcl: compress features by class from compression_from on (paper, section 3.3.2)."""
    compression_from: float = 0.5
    """When compression starts, as a share of all epochs."""
    compression_threshold: float = 0.2
    """Validation accuracy that parts the failing classes from the rest."""
    compression_under: float = 1.0
    """Factor of the failing classes. Section 4.3 of the paper: 1; section 3.3.2: 0.005."""
    compression_rest: float = 0.005
    """Factor of the rest. Section 4.3 of the paper: 0.005; section 3.3.2: 1."""
    drw_from: float = 0.8
    """ldam_drw: when classes are weighted by their effective number, as a share of all epochs."""


@dataclass(frozen=True)
class OptimizationOptions:
    """SGD and its schedule."""

    epochs: int = 200
    """Passes over the training images."""
    batch_size: int = 256
    """Images a step, of all processes together (each gives up to three views)."""
    accumulate: int = 1
    """Parts that each process runs its batch in, to save memory. The loss stays the whole batch's; BatchNorm sees a
    part at a time; every image goes forward twice."""
    lr: float = 0.1
    """Learning rate at its highest, for the batch of all processes together."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay, on every parameter."""
    schedule: Literal["steps", "cosine"] = "cosine"
    """Per epoch: times lr_decay at each milestone, or a cosine to 0."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up."""
    milestones: tuple[float, ...] = (0.8, 0.9)
    """When the steps schedule decays, as shares of all epochs."""
    lr_decay: float = 0.1
    """Factor at each milestone."""
    clip_grad_norm: float | None = None
    """Largest norm of the gradient; None: no clipping."""
    gradient_compression: Literal["none", "fp16", "bf16"] = "none"
    """What gradients are rounded to while they travel between processes: half the traffic, a little noise."""


@dataclass(frozen=True)
class RunOptions:
    """The machine, the seed, and where the results go."""

    seed: int = 0
    """Seed of weights, order and augmentation."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, ...; under torchrun auto and cuda are each process's own."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the GPU has it, else fp16 with loss scaling; fp32 on a CPU."""
    channels_last: bool = True
    """Keep images as NHWC, which is faster for convolutions."""
    compile: bool = False
    """Compile the network with torch.compile, and on a GPU the views of --loader device (the first step then takes a
    minute)."""
    cuda_graph: bool = False
    """Start all of a step at once, views and update too, as one CUDA graph: for small networks, whose steps otherwise
    wait for the host. For one GPU with --loader device; goes well with --compile."""
    output: Path | None = None
    """Folder of the results; by default runs/DATASET-LOSS-ARCH-TIME."""
    resume: Path | None = None
    """Folder of an earlier run to go on with from its newest checkpoint, exactly as if it had never stopped; only
    --data, --workers, --manifest and these run options but --seed and --output may change."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints within an epoch; 0: one before every step."""
    timeout_minutes: float = 10.0
    """Of several processes: how long one waits for another before the job ends with an error."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    data: DataOptions
    model: ModelOptions
    loss: LossOptions
    optimization: OptimizationOptions
    views: ViewOptions
    run: RunOptions

    @property
    def contrastive(self) -> bool:
        return self.loss.loss in PRESETS

    def epoch_of(self, share: float) -> int:
        """The first epoch (from 0) of a phase that starts after `share` of all epochs."""
        return round(share * self.optimization.epochs)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


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
    """The defaults of a data set and a loss, from recipes/DATASET.toml: [SECTION], then [when.LOSS.SECTION]."""
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
