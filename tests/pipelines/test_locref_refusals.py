"""What LocRefPipeline refuses, each with its typed error and before any model runs."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.errors import (
    CheckpointError,
    ImageInputError,
    LayoutError,
    MissingFieldError,
    NonFiniteError,
    ObjectComposeError,
    PartConflictError,
    PhraseNotFoundError,
    RegionError,
)
from objectcompose.layout import SceneObject
from tests.pipelines.helpers import sample
from tests.pipelines.locref_helpers import DOG, PROMPT, locref
from tests.pipelines.refusals import refused
from tests.tiny import tiny_components, tiny_image_encoder


@pytest.fixture(scope="module")
def shared():
    return locref()


def refuses(pipeline, error, message, objects, **arguments):
    refused(sample, pipeline, error, message, **{"prompt": PROMPT, "objects": objects, **arguments})


@pytest.mark.parametrize(
    ("objects", "error", "message"),
    [
        (
            [{"image": DOG.image}],
            MissingFieldError,
            r"LocRefPipeline needs `box` of every object with `image`; objects\[0\]",
        ),
        ([{"image": DOG.image, "mask": torch.ones(4, 4)}], MissingFieldError, r"`box`.*objects\[0\]"),
        ([{"box": DOG.box}], MissingFieldError, r"LocRefPipeline needs `image` or `phrase` or `token` .*objects\[0\]"),
        ([DOG] * 21, LayoutError, "at most 20 objects per prompt, got 21"),
        ([{"image": DOG.image, "box": (0.5, 0.2, 0.5, 0.9)}], LayoutError, "x0 < x1"),
        ([{"image": DOG.image, "box": (0.5, 0.2, 1.2, 0.9)}], LayoutError, r"\[0, 1\]"),
        ([{"image": "nowhere.png", "box": DOG.box}], ImageInputError, "nowhere.png"),
        ([{"image": 7, "box": DOG.box}], ImageInputError, "PIL image or a path, got 7"),
        ([{"image": Image.new("RGBA", (4, 4)), "box": DOG.box}], ImageInputError, "alpha channel that is 0"),
        ([{"image": DOG.image, "box": DOG.box, "phrase": "cat"}], PhraseNotFoundError, "cat"),
        ([{"image": DOG.image, "box": DOG.box, "weight": 1}], LayoutError, "weight"),
        ([{"image": DOG.image, "box": DOG.box, "scale": -1}], LayoutError, "scale"),
    ],
)
def test_objects_that_cannot_be_used_are_refused(shared, objects, error, message):
    refuses(shared, error, message, objects)


def test_strengths_that_are_no_numbers_are_refused(shared):
    refuses(shared, ObjectComposeError, "`gamma` must be at least 0.0, got -1", [DOG], gamma=-1)
    refuses(shared, NonFiniteError, "`ri_scale`", [DOG], ri_scale=float("nan"))
    refuses(shared, ObjectComposeError, "`ci_scale` must be a number, got '1'", [DOG], ci_scale="1")


@pytest.mark.parametrize("name", ["region_mask", "null_references"])
def test_switches_are_true_or_false(shared, name):
    refuses(shared, ObjectComposeError, f"`{name}` must be True or False, got 'no'", [DOG], **{name: "no"})


@pytest.mark.parametrize("objects", [None, [], [{"phrase": "dog"}]])
@pytest.mark.parametrize(
    "option", [{"ci_scale": 0.5}, {"gamma": 0.0}, {"region_mask": True}, {"null_references": True}]
)
def test_options_without_references_are_refused(shared, objects, option):
    [name] = option
    refuses(shared, ObjectComposeError, f"`{name}` needs `objects` with an `image`, got none", objects, **option)


def test_more_boxes_than_the_finest_grid_holds_are_refused(shared):
    refuses(shared, RegionError, "17 regions", [SceneObject(image=DOG.image, box=DOG.box)] * 17, height=8, width=8)


def test_components_that_are_missing_or_do_not_fit_are_refused():
    refuses(locref(adapter=None), CheckpointError, "`adapter` is needed.*load_adapter", [DOG])
    refuses(locref(image_encoder=None), CheckpointError, "`image_encoder` is needed", [DOG])
    wide = locref({"image_encoder": None})  # for the encoder of IP-Adapter
    refuses(
        wide, CheckpointError, r"widths {'hidden_size': 1280} that `adapter` reads, got {'hidden_size': 10}", [DOG]
    )
    refuses(locref(adapter=None), ObjectComposeError, "`return_composite=True`", None, return_composite=True)
    coordinates = locref({"composite": "coordinates"})
    refuses(coordinates, ObjectComposeError, "`return_composite=True`", [DOG], return_composite=True)


def test_an_adapter_of_another_base_is_refused():
    torch.manual_seed(99)
    other = UNet2DConditionModel.from_config(tiny_components()["unet"].config)
    adapter = LocRefAdapter.from_unet(other, "tester/other", tiny_image_encoder())
    with pytest.raises(CheckpointError, match="tester/other"):
        locref(adapter=adapter)
    pipeline = locref()
    before = pipeline.adapter
    with pytest.raises(CheckpointError, match="tester/other"):
        pipeline.load_adapter(adapter)
    assert pipeline.adapter is before


def test_processors_that_cannot_be_replaced_are_refused_before_any_model_runs():
    class ForeignProcessor(AttnProcessor2_0):
        pass

    pipeline = locref()
    pipeline.unet.set_attn_processor(ForeignProcessor())
    refuses(pipeline, PartConflictError, "ForeignProcessor", [DOG])
