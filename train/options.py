"""Every option of the five commands, with its range, and its default where no recipe has one.

It imports nothing of the trainer, nor PyTorch: a command prints its help and finds a typo before that.
`train/arguments/ranges.py` holds values to these types and ranges.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from rcl_fast.presets import PRESETS


class Range(NamedTuple):
    """The ends between which a number lies; of a tuple, how many values it has."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None


class Words(NamedTuple):
    """The words that a text may be, and the pattern of any other ones, with an example."""

    words: tuple[str, ...]
    pattern: str
    example: str


# No range ends where values only become unwise: the upper ends rule out slips, like 256000000 for 256.
Count = Annotated[int, Range(at_least=1, at_most=1_000_000)]
Side = Annotated[int, Range(at_least=1, at_most=8192)]
Border = Annotated[int, Range(at_least=0, at_most=8192)]
Width = Annotated[int, Range(at_least=1, at_most=16_384)]
Workers = Annotated[int, Range(at_least=0, at_most=1024)]
Jobs = Annotated[int, Range(at_least=1, at_most=256)]
Seed = Annotated[int, Range(at_least=0, at_most=2**63 - 1)]  # of NumPy's and PyTorch's generators alike
Share = Annotated[float, Range(at_least=0, at_most=1)]
ShareAbove0 = Annotated[float, Range(above=0, at_most=1)]
Factor = Annotated[float, Range(at_least=0, at_most=1e6)]
Rate = Annotated[float, Range(at_least=1e-9, at_most=1e6)]
Momentum = Annotated[float, Range(at_least=0, below=1)]
Decay = Annotated[float, Range(at_least=0, at_most=100)]
Deviation = Annotated[float, Range(at_least=0.001, at_most=1)]
Jitter = Annotated[float, Range(at_least=0, at_most=10)]
Device = Annotated[str, Words(("auto", "cpu", "cuda"), r"cuda:(0|[1-9]\d{0,2})", "cuda:1")]

ViewKind = Literal["crop_flip", "autoaugment", "randaugment", "sim", "sim_randaugment", "digits", "digits_sim"]


@dataclass(frozen=True)
class ViewOptions:
    """How images become the network's input."""

    image_size: Side
    """Height and width of every view, in pixels."""
    mean: tuple[Share, Share, Share]
    """Mean of the data set's red, green and blue, in 0 to 1."""
    std: tuple[Deviation, Deviation, Deviation]
    """Standard deviation of red, green and blue, in 0 to 1."""
    x1: ViewKind
    """View for the classifier."""
    x2: ViewKind
    """First view for the contrastive loss."""
    x3: ViewKind
    """Second view for the contrastive loss."""
    evaluation: Literal["as_is", "resize_center_crop"]
    """How images are evaluated: whole, which must then be image_size square, or resized and cropped."""
    resize: Side = 256
    """Shorter side that resize_center_crop resizes to, in pixels, before it crops image_size."""
    crop_padding: Border = 4
    """Black border that crop_flip and autoaugment crop from, in pixels."""
    cutout: Border = 16
    """Side of autoaugment's black square, in pixels; 0 for none."""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a resized crop takes."""
    jitter: tuple[Jitter, Jitter, Jitter, Annotated[float, Range(at_least=0, at_most=0.5)]] = (0.4, 0.4, 0.4, 0.1)
    """Brightness, contrast, saturation and hue jitter of sim; randaugment takes the first three."""
    jitter_probability: Share = 0.8
    """Probability that sim jitters the colours."""
    gray_probability: Share = 0.2
    """Probability that sim turns the image gray."""
    randaugment: str = "rand-n2-m10-mstd0.5"
    """timm's RandAugment: n operations of magnitude m, with the spread mstd; also p, mmax, inc and t."""


def training_kinds(options: ViewOptions, contrastive: bool) -> tuple[ViewKind, ...]:
    """Returns the kinds of the views x1, x2, x3 of a training image; without a contrastive loss, that of x1 alone."""
    return (options.x1, options.x2, options.x3) if contrastive else (options.x1,)


Dataset = Literal["digits_lt", "cifar10_lt", "cifar100_lt", "imagenet_lt", "places_lt", "inaturalist18", "folder"]
LoaderName = Literal["auto", "dali", "torchvision", "device"]
Loss = Literal["ce", "balanced_softmax", "logit_adjusted", "cb_focal", "ldam_drw", "scl", "bcl", "scl_rcl", "bcl_rcl"]


@dataclass(frozen=True)
class DataOptions:
    """The images. Choose --dataset first: its recipe sets the default of every other option."""

    dataset: Dataset = "digits_lt"
    """Data set and recipe. "folder" is your own images, DATA/train/CLASS/*, DATA/test/CLASS/*, and what --data alone
    stands for."""
    data: Path | None = None
    """Folder that holds the data set. digits_lt needs none."""
    imbalance: Annotated[float, Range(at_least=1, at_most=1e6)] = 100.0
    """Images of the largest class over those of the smallest, for digits_lt and CIFAR."""
    imbalance_shape: Literal["exponential", "step"] = "exponential"
    """How the counts fall from the largest class to the smallest."""
    validation_fraction: Annotated[float, Range(above=0, below=1)] = 0.1
    """Share of the training images held out for validation, where the data set has no validation set of its own."""
    validate_on: Literal["validation", "test"] = "validation"
    """Where the best epoch is selected. "test" holds nothing out and repeats what the literature does."""
    loader: LoaderName = "auto"
    """What decodes and augments: dali (files or pixels, on GPU or CPU), torchvision (Pillow, in worker processes, the
    reference), device (small data sets, held and augmented in whole batches on the training device). auto: device
    for digits_lt and CIFAR; for files dali on a GPU, where it is installed, else torchvision."""
    workers: Workers = 2
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
    cosine_scale: Rate = 30.0
    """Scale of the cosine classifier's logits."""
    head_hidden: Width = 512
    """Hidden width of the projection head and of the prototypes' head."""
    head_out: Width = 128
    """Width D of the embeddings that the contrastive loss compares."""
    sync_batchnorm: bool = False
    """On several GPUs: BatchNorm over the images of all processes, instead of each process's own."""


@dataclass(frozen=True)
class LossOptions:
    """alpha · cross-entropy(logits + tau · log prior) + beta · contrastive."""

    loss: Loss = "bcl_rcl"
    """The contrastive losses (scl, bcl, scl_rcl: the paper's RCL, bcl_rcl: its BCL+RCL), or a one-stage baseline."""
    alpha: Factor = 1.0
    """Weight of the cross-entropy side."""
    beta: Factor = 1.0
    """Weight of the contrastive side."""
    tau: Annotated[float, Range(at_least=0, at_most=100)] = 1.0
    """Strength of the logit adjustment; 0 is plain cross-entropy."""
    temperature: Annotated[float, Range(at_least=1e-30, at_most=1e30)] = 0.1
    """Temperature T of the contrastive loss."""
    backend: Literal["auto", "triton", "tiled", "dense", "reference"] = "auto"
    """How the contrastive loss is computed."""
    compression: bool = True
    """With *_rcl: compress features by class from compression_from on (paper, section 3.3.2)."""
    compression_from: Share = 0.5
    """When compression starts, as a share of all epochs."""
    compression_threshold: Share = 0.2
    """Validation accuracy, a share, that parts the failing classes from the rest."""
    compression_under: Factor = 1.0
    """Factor of the failing classes. Section 4.3 of the paper: 1; section 3.3.2: 0.005."""
    compression_rest: Factor = 0.005
    """Factor of the rest. Section 4.3 of the paper: 0.005; section 3.3.2: 1."""
    drw_from: Share = 0.8
    """ldam_drw: when classes are weighted by their effective number, as a share of all epochs."""


@dataclass(frozen=True)
class OptimizationOptions:
    """SGD and its schedule."""

    epochs: Count = 200
    """Passes over the training images."""
    batch_size: Annotated[int, Range(at_least=2, at_most=1_000_000)] = 256
    """Images a step, of all processes together (each gives up to three views)."""
    accumulate: Count = 1
    """Parts that each process runs its batch in, to save memory. The loss stays the whole batch's; BatchNorm sees a
    part at a time; every image goes forward twice."""
    lr: Rate = 0.1
    """Learning rate at its highest, for the batch of all processes together."""
    momentum: Momentum = 0.9
    """Momentum of SGD."""
    weight_decay: Decay = 5e-4
    """Weight decay, on every parameter."""
    schedule: Literal["steps", "cosine"] = "cosine"
    """Per epoch: times lr_decay at each milestone, or a cosine to 0."""
    warmup_epochs: Annotated[int, Range(at_least=0, at_most=1_000_000)] = 0
    """Epochs of linear warm-up."""
    milestones: tuple[ShareAbove0, ...] = (0.8, 0.9)
    """When the steps schedule decays, as shares of all epochs: 0.8, not 160."""
    lr_decay: ShareAbove0 = 0.1
    """Factor at each milestone."""
    clip_grad_norm: Rate | None = None
    """Largest norm of the gradient; None: no clipping."""
    gradient_compression: Literal["none", "fp16", "bf16"] = "none"
    """What gradients are rounded to while they travel between processes: half the traffic, a little noise."""


@dataclass(frozen=True)
class RunOptions:
    """The machine, the seed, and where the results go."""

    seed: Seed = 0
    """Seed of weights, order and augmentation."""
    device: Device = "auto"
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
    checkpoint_minutes: Factor = 10.0
    """Minutes between checkpoints within an epoch; 0: one before every step."""
    timeout_minutes: Annotated[float, Range(at_least=0.01, at_most=1e6)] = 10.0
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
        """Returns the first epoch (from 0) of a phase that starts after `share` of all epochs."""
        return round(share * self.optimization.epochs)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns plain values by section, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def has_prototypes(config: Config) -> bool:
    return config.contrastive and PRESETS[config.loss.loss].prototypes


Method = Literal["crt", "tau_norm", "lws"]


@dataclass(frozen=True)
class SecondStageOptions:
    """Which run, and what becomes of its classifier."""

    run: Path
    """Folder of a finished run, like runs/NAME. Its configuration, data set and loader are used."""
    method: Method
    """crt: the classifier anew. tau_norm: its rows by their norm to the power tau. lws: a learnt factor a class."""
    checkpoint: Literal["best", "last"] = "best"
    """Which of the run's: of the epoch that it selected, or of its last."""
    tau: Annotated[float, Range(at_least=0, at_most=10)] | None = None
    """tau_norm: the power. None: the one of 0, 1 / (tau_steps - 1), ..., 1 that is best on validation."""
    tau_steps: Annotated[int, Range(at_least=2, at_most=10_001)] | None = None
    """tau_norm: how many values of tau are tried. None: 21."""
    epochs: Count | None = None
    """crt, lws: passes over as many images as the training set has. None: 10 (section 5.1 of the paper)."""
    lr: Rate | None = None
    """crt, lws: learning rate at its highest. None: the authors' 0.2 for 512 images a step, in proportion."""
    batch_size: Annotated[int, Range(at_least=2, at_most=1_000_000)] | None = None
    """Images a step. None: the run's."""
    schedule: Literal["cosine", "steps"] | None = None
    """crt, lws: per epoch, a cosine to 0 (None, the authors'), or times 0.1 at 80 and 90 % of the epochs."""
    momentum: Momentum | None = None
    """crt, lws: momentum of SGD. None: the authors' 0.9."""
    weight_decay: Decay | None = None
    """crt, lws: weight decay, of the classifier or of the factors. None: the authors' 5e-4."""
    seed: Seed | None = None
    """crt, lws: of cRT's new weights, the order and the augmentation. None: the run's."""
    output: Path | None = None
    """Folder of the results. None: RUN/second_stage/METHOD."""
    data: Path | None = None
    """Folder that holds the data set, where it has moved. None: the run's."""
    workers: Workers | None = None
    """As for train/run.py. None: the run's."""
    device: Device = "auto"
    """As for train/run.py."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the backbone, as for train/run.py; the classifier is trained in fp32."""


@dataclass(frozen=True)
class VerifyOptions:
    """The images to verify."""

    dataset: Dataset = "folder"
    """Data set, as for train/run.py. "folder" is your own images: DATA/train/CLASS/*, DATA/test/CLASS/*."""
    data: Path | None = None
    """Folder that holds the data set."""
    manifest: Path | None = None
    """File to write; None: DATA/rcl_fast_manifest.jsonl. Name one elsewhere where DATA is read-only."""
    workers: Workers | None = None
    """Processes that decode; 0: none but the main one. None: one for each CPU."""


@dataclass(frozen=True)
class SweepOptions:
    """What is searched, where it is kept, and on which devices."""

    dataset: Dataset
    """Data set and recipe, as for train/run.py."""
    study: Path
    """Folder of the study: made where there is none, gone on with where there is one. Each trial is a run in it."""
    grid: Annotated[tuple[str, ...], Range(at_least=1)]
    """Options of train/run.py and their values: tau=1.0,1.3,1.5 compression_rest=0.005,0.05. With --sampler tpe also
    ranges: lr=0.05..0.4, or lr=0.01..1:log."""
    data: Path | None = None
    """Folder that holds the data set."""
    sampler: Literal["grid", "tpe"] = "grid"
    """grid: every combination once. tpe: Optuna's tree-structured Parzen estimator, as many as --trials."""
    trials: Annotated[int, Range(at_least=1, at_most=100_000)] | None = None
    """How many trials there are in all. None: the whole grid."""
    devices: Annotated[tuple[str, ...], Range(at_least=1)] | None = None
    """GPUs, as CUDA_VISIBLE_DEVICES names them; by default all, else the CPU."""
    jobs_per_device: Jobs = 1
    """Trials on a device at once: a CIFAR run does not fill a large GPU."""


@dataclass(frozen=True)
class ReproduceOptions:
    """On what, how much of it, and where the results go."""

    data: Path | None = None
    """Folder of the data set, or of several in folders of their names (DIR/cifar10_lt, DIR/cifar100_lt)."""
    seeds: Annotated[int, Range(at_least=1, at_most=1000)] = 3
    """Seeds 0, 1, ... of each row."""
    only: tuple[str, ...] = ()
    """Rows to run and show, by their labels, like BCL+RCL; empty: all."""
    folder: Path = Path("runs/reproduction")
    """Where the runs are kept, each in a folder named by what it computes: tables share them."""
    output: Path | None = None
    """Folder of the table as Markdown and JSON, and of its runs' rows; by default tables/ in --folder."""
    rows: tuple[Path, ...] = ()
    """Files of rows that an earlier call wrote (TABLE.jsonl): those runs are not run again."""
    run: bool = True
    """--no-run: show what is finished, and train nothing."""
    dry_run: bool = False
    """Print the command of every run that is missing, and do nothing."""

    dataset: Dataset | None = None
    """One of the table's data sets alone; or another in place of them, and the table says so."""
    epochs: Count | None = None
    """Not the paper's epochs, to see it work; the table says so."""
    validate_on: Literal["validation", "test"] | None = None
    """Where epochs are selected; by default on CIFAR the test set, as the literature does."""
    more: str = ""
    """Any other options of train/run.py, for all runs, like --more="--batch-size 128"; the table says so. Those that
    change how runs are computed and not what, like --more="--cuda-graph --compile", leave the setting the paper's."""

    devices: Annotated[tuple[str, ...], Range(at_least=1)] | None = None
    """GPUs, as CUDA_VISIBLE_DEVICES names them; by default all, else the CPU."""
    jobs_per_device: Jobs = 1
    """Runs on a device at once: a CIFAR run does not fill a large GPU."""
    gpus_per_run: Jobs = 1
    """GPUs that train one run together, for ImageNet-LT."""
    part: str = "1/1"
    """I/N: only every N-th of the runs, from the I-th on, and no table: for an array of jobs."""
