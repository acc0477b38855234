"""Options and values by the names that other programs have for them, and what they are called here."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches

# Each option with its other names, without the marks that `_plain` leaves out.
_OPTIONS = {
    "lr": "learningrate baselr maxlr initlr initiallr",
    "epochs": "epoch numepochs nepochs maxepochs trainepochs ep",
    "batch_size": "batch bs b trainbatchsize batchsz minibatch globalbatchsize",
    "weight_decay": "wd decay l2 regweight",
    "momentum": "mom",
    "schedule": "scheduler lrscheduler lrschedule lrpolicy",
    "warmup_epochs": "warmup warm warmepochs lrwarmupepochs",
    "milestones": "lrsteps lrmilestones steps decayepochs lrdecayepochs",
    "lr_decay": "gamma lrgamma lrdecayrate decayrate",
    "clip_grad_norm": "clip clipgrad gradclip gradientclip maxgradnorm gradclipnorm",
    "accumulate": "accum gradaccum accumiter gradientaccumulationsteps accumulationsteps gradaccumsteps",
    "data": "datadir datapath dataroot root path dir datasetpath datasetdir imagedir images",
    "dataset": "ds datasetname dataname task",
    "workers": "numworkers nworkers nw j numthreads threads dataloaderworkers",
    "loader": "dataloader backendloader",
    "imbalance": "if imb imbfactor imbratio imbalancefactor imbalanceratio ir",
    "imbalance_shape": "imbtype imbalancetype imbshape",
    "validation_fraction": "valfraction valsplit valratio valsize valpercent",
    "validate_on": "selecton valon evalon",
    "arch": "model backbone net network architecture modelname a encoder",
    "classifier": "head classifiertype",
    "head_out": "featdim projdim embeddim embeddingdim outdim",
    "head_hidden": "hiddendim projhidden mlpdim",
    "sync_batchnorm": "syncbn syncbatch",
    "loss": "criterion losstype lossfn lossname lossfunction",
    "temperature": "temp t",
    "image_size": "imgsize imgsz size resolution inputsize cropsize",
    "seed": "randomseed manualseed rngseed",
    "device": "gpu gpus gpuid cuda usecuda",
    "precision": "mixedprecision dtype",
    "compile": "torchcompile",
    "output": "out outdir outputdir outputpath savedir savepath save logdir expdir workdir resultdir o",
    "resume": "checkpoint ckpt checkpointpath resumefrom load restore",
    "timeout_minutes": "timeout",
    "run": "rundir runfolder from",
    "checkpoint": "ckpt weights",
    "method": "stage secondstage",
    "tau_steps": "taus numtaus",
    "study": "studyname studydir",
    "grid": "space params parameters search",
    "trials": "ntrials numtrials maxtrials",
    "devices": "device gpu gpus gpuids cuda",
    "jobs_per_device": "jobs njobs parallel jobspergpu runsperdevice",
    "seeds": "numseeds nseeds repeats",
    "folder": "runsdir runs",
    "gpus_per_run": "nproc nprocpernode gpusperjob",
}
_NO_SUCH = {
    "optimizer": "the optimiser is SGD",
    "optimiser": "the optimiser is SGD",
    "opt": "the optimiser is SGD",
    "beta1": "the optimiser is SGD",
    "fp16": "half precision is --precision fp16",
    "half": "half precision is --precision fp16",
    "bf16": "half precision is --precision bf16",
    "amp": "mixed precision is --precision bf16 or fp16",
    "useamp": "mixed precision is --precision bf16 or fp16",
    "pretrained": "networks are trained from scratch",
    "version": "rcl_fast.__version__ has it",
    "nesterov": "momentum is SGD's plain one",
}
# Values by other names. What differs in case, or in the marks that `_plain` leaves out, needs no line.
_VALUES = {
    "folder": "imagefolder custom own",
    "digits_lt": "digits mnist",
    "cifar10_lt": "cifar10",
    "cifar100_lt": "cifar100 cifar",
    "imagenet_lt": "imagenet imagenet1k ilsvrc ilsvrc2012",
    "places_lt": "places places365 places365lt",
    "inaturalist18": "inat inaturalist inat18 inat2018 inaturalist2018 inaturalist18lt",
    "ce": "crossentropy xent softmax celoss",
    "balanced_softmax": "bsoftmax bsce balsoftmax balms",
    "logit_adjusted": "la lc logitadjust logitadjustment logitcompensation",
    "cb_focal": "focal focalloss classbalanced cb",
    "ldam_drw": "ldam drw",
    "scl": "supcon supcontrast supervisedcontrastive",
    "bcl": "balancedcontrastive",
    "scl_rcl": "rcl",
    "resnet50": "rn50 r50",
    "resnet32": "rn32 r32",
    "resnext50": "resnext50324d resnext",
    "cosine": "cos cosineannealing normalized norm",
    "steps": "step multistep multisteplr",
    "linear": "fc",
    "exponential": "exp",
    "fp16": "half float16 amp 16",
    "bf16": "bfloat16",
    "fp32": "float float32 full 32",
    "torchvision": "pil pillow pytorch torch",
    "validation": "val valid dev",
    "resize_center_crop": "centercrop resize",
    "skip": "ignore",
    "error": "raise fail",
    "tau_norm": "tau taunorm taunormalized taunormalised",
    "crt": "classifierretraining retrain",
    "cuda": "gpu",
}


def option(word: str, known: Collection[str]) -> str | None:
    """Returns what an option of another program, like --learning-rate, is called here; None where nobody knows."""
    plain = _plain(word.rpartition(".")[2])  # of optim.lr the last part
    names = [name for name in known if _plain(name) == plain]
    names += [name for name, others in _OPTIONS.items() if name in known and plain in others.split()]
    return names[0] if names else None


def missing(word: str) -> str | None:
    """Returns why there is no such option, for those that people look for."""
    return _NO_SUCH.get(_plain(word))


def value(word: str, choices: Collection[str]) -> str | None:
    """Returns the choice that is meant by a word like imagefolder, or that is spelt almost so; None without either."""
    near = get_close_matches(word.lower(), choices, n=1, cutoff=0.75)
    return another_name(word, choices) or (near[0] if near else None)


def another_name(word: str, choices: Collection[str]) -> str | None:
    """Returns the choice that a word like imagefolder is another name of; None without one."""
    plain = _plain(word)
    names = [choice for choice in choices if _plain(choice) == plain]
    names += [choice for choice, others in _VALUES.items() if choice in choices and plain in others.split()]
    return names[0] if names else None


def _plain(word: str) -> str:
    """Returns a word in small letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", word.lower())
