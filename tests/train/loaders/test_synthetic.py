import numpy as np
import torch

from rcl_fast.train.data.samples import Samples
from rcl_fast.train.loaders.base import training_spec
from rcl_fast.train.loaders.synthetic import SyntheticLoader
from rcl_fast.train.options import ViewOptions

OPTIONS = ViewOptions(16, (0, 0, 0), (1, 1, 1), x1="crop_flip", x2="sim", x3="sim", evaluation="as_is")


def test_noise_comes_in_as_many_steps_as_images_would() -> None:
    samples = Samples(np.zeros((23, 16, 16, 3), np.uint8), np.arange(23) % 5)
    spec = training_spec(samples, ("crop_flip", "sim", "sim"), OPTIONS, seed=0, batch_size=8)
    loader = SyntheticLoader(spec, torch.device("cpu"))
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps_per_epoch == 2
    assert len(list(loader.epoch(1, start=1))) == 1
    for batch in batches:
        assert [tuple(view.shape) for view in batch.views] == [(8, 3, 16, 16)] * 3
        assert torch.equal(batch.labels, batch.indices % 5)
        assert abs(float(batch.views[0].mean())) < 0.05  # 6,144 normal draws: four standard errors
