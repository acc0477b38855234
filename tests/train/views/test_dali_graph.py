"""Each operation of the DALI graphs against Pillow's, and against the traps of DALI's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_augment import (
    FILL,
    GEOMETRY,
    IMAGES,
    IN_PLACE,
    NOTHING,
    OPTIONS,
    chosen,
    gradients,
    magnitudes_of,
    one_by_one,
    view_of,
    with_pillow,
)
from torch import Tensor

pytest.importorskip("nvidia.dali")

from nvidia.dali import fn, pipeline_def
from PIL import Image

from rcl_fast.train.views import dali_graph
from rcl_fast.train.views.params import CROP_ATTEMPTS, NUMBER, OPERATIONS, Plan, ViewParams, resized_boxes

# Levels of 255 by which an operation may differ from Pillow's.
BOUNDS = {
    "brightness": 1,  # rounds where Pillow cuts off
    "contrast": 2,  # the same, and the mean gray rounds the other way
    "saturation": 4,  # DALI's gray is one level off at most, which factor − 1 multiplies, and two roundings
    # Pillow cuts the hue and its shift to 255 steps of a turn, and wraps around after 256 of them: 6 levels each at
    # most; saturation and value are rounded, too. (DALI's own hue is up to 121 levels off, 12 in the mean.)
    "hue": 20,
    "gray": 1,
    "auto_contrast": 1,
    "equalize": 1,
    "invert": 0,
    "posterize": 0,
    "solarize": 0,
    "solarize_add": 0,
    "sharpness": 3,  # the smooth image is rounded, twice that far away, and rounded again
}


def carried_out(images: Tensor, planned: Plan, params: ViewParams) -> Tensor:
    """Operations on uint8 [B, 3, S, S], in one pipeline."""
    inputs = dali_graph.given(planned, params, images.shape[2])

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None, enable_conditionals=True)
    def pipeline():
        pixels, *given = fn.external_source(
            lambda: [images.permute(0, 2, 3, 1).contiguous().numpy(), *(tensor.numpy() for tensor in inputs.values())],
            num_outputs=1 + len(inputs),
            batch=True,
        )
        pixels = fn.reinterpret(pixels, layout="HWC")
        named = {name: given[number] for number, name in enumerate(inputs)}
        return dali_graph.random_view(pixels, planned, OPTIONS, named)

    (output,) = pipeline().run()
    return torch.from_numpy(output.as_array()).permute(0, 3, 1, 2)


@pytest.fixture(scope="module", params=IMAGES)
def images(request: pytest.FixtureRequest) -> Tensor:
    return IMAGES[request.param]


@pytest.fixture(scope="module")
def outcomes(images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each operation on colors makes of the images in the graph, and by Pillow; hue as far as the recipes go."""
    parts = {name: magnitudes_of(name, len(images)) * (0.2 if name == "hue" else 1) for name in IN_PLACE}
    numbers = torch.cat([torch.full((len(images), 1), NUMBER[name]) for name in parts])
    magnitudes = torch.cat(list(parts.values()))[:, None]
    params = chosen(len(numbers), operations=numbers, magnitudes=magnitudes)
    found = carried_out(images.repeat(len(parts), 1, 1, 1), NOTHING._replace(slots=(tuple(parts),)), params)
    return {
        name: (mine, with_pillow(images, IN_PLACE[name], parts[name]))
        for name, mine in zip(parts, found.split(len(images)), strict=True)
    }


@pytest.mark.parametrize("name", IN_PLACE)
def test_each_operation_on_colors_is_pillows_within_rounding(
    name: str, outcomes: dict[str, tuple[Tensor, Tensor]]
) -> None:
    found, expected = outcomes[name]
    apart = (found.int() - expected.int()).abs()
    assert int(apart.max()) <= BOUNDS[name]
    assert float(apart.double().mean()) <= 1  # a rounding


def test_a_whole_view_is_pillows() -> None:
    """But for roundings, of which later operations make more: of one pixel in ten by the crop already."""
    images = gradients(64)
    planned, params = view_of("sim", images)
    apart = (carried_out(images, planned, params).int() - one_by_one(images, planned, params).int()).abs()
    assert apart.float().mean() < 2


@pytest.mark.parametrize("nearest", [True, False], ids=["nearest", "bilinear"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_each_movement_is_pillows(name: str, nearest: bool) -> None:
    """Of soft images, where a position a rounding away is a level away; at the border it may fall in or out."""
    images = IMAGES["gradients"]
    magnitudes = magnitudes_of(name, len(images))
    params = chosen(len(images), operations=torch.full((len(images), 1), NUMBER[name]), magnitudes=magnitudes[:, None])
    found = carried_out(images, NOTHING._replace(slots=((name,),), nearest=nearest, fill=FILL), params)
    mode = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    expected = with_pillow(
        images, lambda image, by: GEOMETRY[name](image, by, resample=mode, fillcolor=FILL), magnitudes
    )
    apart = (found.int() - expected.int()).abs().amax(1)
    assert (apart > 2).float().mean() < 0.002


def test_an_operation_that_was_not_sampled_changes_nothing() -> None:
    images = IMAGES["noise"]
    params = chosen(len(images), operations=torch.zeros(len(images), 1).long(), magnitudes=torch.ones(len(images), 1))
    assert torch.equal(carried_out(images, NOTHING._replace(slots=(OPERATIONS[1:],)), params), images)


@pytest.mark.parametrize("size", [(375, 500), (60, 400), (400, 60), (33, 32)], ids=str)
def test_boxes_in_the_graph_are_those_of_the_random_parameters(size: tuple[int, int]) -> None:
    """Also where no attempt fits."""
    ratio, many = (3 / 4, 4 / 3), 500
    make = torch.Generator().manual_seed(0)
    areas = 0.08 + 0.92 * torch.rand(many, CROP_ATTEMPTS, generator=make)
    ratios = torch.exp(torch.empty(many, CROP_ATTEMPTS).uniform_(np.log(3 / 4), np.log(4 / 3), generator=make))
    params = chosen(many, areas=areas, ratios=ratios, place=torch.rand(many, 2, generator=make).double())
    shape = np.tile(np.array([*size, 3], np.int64), (many, 1))

    @pipeline_def(batch_size=many, num_threads=2, device_id=None, enable_conditionals=True)
    def pipeline():
        given = fn.external_source(
            lambda: [shape, areas.numpy(), ratios.numpy(), params.place.numpy()], num_outputs=4, batch=True
        )
        return dali_graph.resized_box(given[0], ratio, *given[1:])

    found = np.concatenate([output.as_array() for output in pipeline().run()], axis=1)
    height, width = (torch.full((many,), side) for side in size)
    assert np.array_equal(found, resized_boxes(params, ratio, height, width).numpy())


def test_a_hue_beyond_a_sixth_of_a_turn_is_refused() -> None:
    from rcl_fast.train.config import recipe

    options = recipe("cifar100_lt", "bcl_rcl").views
    dali_graph.check(("sim",), options)
    with pytest.raises(ValueError, match="--loader torchvision"):
        dali_graph.check(("sim",), options.__class__(**{**vars(options), "jitter": (0.4, 0.4, 0.4, 0.3)}))
