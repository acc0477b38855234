import dataclasses
import sys
import warnings

import numpy as np
import pytest
import torch

from rcl_fast.train.config import parse
from rcl_fast.train.data.samples import Samples
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import LoaderSpec, training_spec
from rcl_fast.train.loaders.build import choose, make_loader
from rcl_fast.train.options import LoaderName, ViewOptions
from rcl_fast.train.runtime.hardware import choose_runtime

OPTIONS = ViewOptions(16, (0, 0, 0), (1, 1, 1), x1="randaugment", x2="sim", x3="sim", evaluation="as_is")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
PIXELS = Samples(np.zeros((4, 16, 16, 3), np.uint8), np.array([0, 0, 1, 1]))
FILES = Samples([f"/data/{number}.jpg" for number in range(4)], np.array([0, 0, 1, 1]))


def spec(samples: Samples, options: ViewOptions = OPTIONS) -> LoaderSpec:
    return training_spec(samples, ("randaugment", "sim", "sim"), options, seed=0, batch_size=2)


def test_images_in_memory_stay_on_the_device() -> None:
    for device in (CPU, GPU):
        assert choose(spec(PIXELS), device) == ("device", None)


@pytest.mark.parametrize(
    ("device", "dali", "expected"),
    [(GPU, True, "dali"), (GPU, False, "torchvision"), (CPU, True, "torchvision"), (CPU, False, "torchvision")],
)
def test_files_go_through_dali_for_a_gpu_where_it_is_installed(
    device: torch.device, dali: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "has_dali", lambda: dali)
    assert choose(spec(FILES), device)[0] == expected


def test_only_a_gpu_without_dali_gets_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "has_dali", lambda: True)
    assert choose(spec(FILES), GPU)[1] is None
    monkeypatch.setattr(build, "has_dali", lambda: False)
    assert choose(spec(FILES), CPU)[1] is None
    note = choose(spec(FILES), GPU)[1]
    assert note is not None
    assert "pip install '.[dali]'" in note


def test_a_randaugment_that_only_timm_carries_out_goes_to_torchvision() -> None:
    options = dataclasses.replace(OPTIONS, randaugment="rand-n2-m10-inc1")
    for samples in (PIXELS, FILES):
        name, note = choose(spec(samples, options), GPU)
        assert name == "torchvision"
        assert note is not None
        assert "rand-n2-m10-inc1" in note


def test_without_dali_its_loader_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("nvidia.dali") or name.endswith("loaders.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"\.\[dali\]"):
        make_loader("dali", spec(FILES), device=CPU, workers=1)


def test_the_device_loader_has_no_use_for_files() -> None:
    with pytest.raises(ValueError, match="--loader"):
        make_loader("device", spec(FILES), device=CPU, workers=0)


@pytest.mark.parametrize("name", ["torchvision", "device"])
def test_each_is_built_by_name(name: LoaderName) -> None:
    loader = make_loader(name, spec(PIXELS), device=CPU, workers=0)
    assert loader.fingerprint["loader"].startswith(name)
    assert len(list(loader.epoch(0))) == loader.steps_per_epoch == 2


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no loader 'auto'"):
        make_loader("auto", spec(PIXELS), device=CPU, workers=0)


def test_more_workers_than_cpus_are_noted_once_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(build._logger, "info", said.append)
    monkeypatch.setattr(build, "usable_cpus", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = parse(["--dataset", "digits_lt", "--loader", "torchvision", "--workers", "3"])
    splits, runtime = build.load(config), choose_runtime(config.run)
    build.training_loader(config, splits, runtime)
    build.evaluation_loader(config, splits.test, runtime)
    assert said == ["note: 6 workers load images on 2 CPUs: --workers 1 may be as fast"]


def test_pytorch_does_not_warn_of_workers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_loader("torchvision", spec(PIXELS), device=CPU, workers=1000)
