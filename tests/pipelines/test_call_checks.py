"""Checks of components, schedules and canvases: what they let through, and that they come before any model runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, LCMScheduler, PNDMScheduler, UNet2DConditionModel

from objectcompose.errors import CheckpointError, ObjectComposeError, RegionError
from objectcompose.pipelines.call_checks import check_attention_steps
from tests.pipelines.helpers import compose_pipeline, sample
from tests.tiny import tiny_scheduler, tiny_text_encoder, tiny_unet


def unet_with(**changes):
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config({**tiny_unet().config, **changes}).eval()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"unet": lambda: tiny_unet("sdxl"), "text_encoder": lambda: None},
            "Stable Diffusion 1.x/2.x layout.*text_time",
        ),
        ({"unet": lambda: unet_with(in_channels=9)}, "4 latent channels of `vae`, got one that reads 9"),
        ({"unet": lambda: unet_with(cross_attention_dim=16)}, "text of width 22.*reads 16"),
        ({"text_encoder": lambda: tiny_text_encoder(projected=True)}, "text of width 26.*reads 22"),
    ],
    ids=["SDXL", "inpainting", "UNet of another width", "text encoder of another width"],
)
def test_components_of_different_checkpoints_are_refused(changes, words):
    with pytest.raises(CheckpointError, match=words):
        compose_pipeline(**{name: make() for name, make in changes.items()})


@pytest.mark.parametrize("missing", ["vae", "text_encoder", "unet"])
def test_components_that_are_left_out_are_not_compared(missing):
    assert getattr(compose_pipeline(**{missing: None}), missing) is None


@pytest.fixture
def untouched():
    """A pipeline whose models must not run, and a function that builds it with a scheduler."""

    def build(scheduler=None):
        pipeline = compose_pipeline(**({} if scheduler is None else {"scheduler": scheduler}))

        def refuse(*_):
            raise AssertionError("a model ran before the input was checked")

        for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            model.register_forward_pre_hook(refuse)
        return pipeline

    return build


def test_schedules_that_the_scheduler_cannot_follow(untouched):
    with pytest.raises(ObjectComposeError, match="`num_inference_steps` cannot be used with DDIMScheduler.*1000"):
        sample(untouched(), num_inference_steps=1001)
    lcm = LCMScheduler.from_config(tiny_scheduler().config)
    with pytest.raises(ObjectComposeError, match="`timesteps` cannot be used with LCMScheduler"):
        sample(untouched(lcm), timesteps=[1, 400, 800])  # must descend


def test_masks_must_have_the_proportions_of_the_picture(untouched):
    wide = [{"phrase": "dog", "mask": np.ones((4, 8))}]
    with pytest.raises(RegionError, match=r"proportions of the canvas \(32, 32\)"):
        sample(untouched(), objects=wide)
    output = sample(compose_pipeline(), objects=wide, height=32, width=64)
    assert output.objects[0][0].unused == ("mask",)


@pytest.mark.parametrize(
    ("scheduler_class", "iterations"),
    [(PNDMScheduler, 4), (HeunDiscreteScheduler, 5)],  # for three steps
)
def test_attention_steps_count_the_loops_own_iterations(untouched, scheduler_class, iterations):
    options = {"skip_prk_steps": True} if scheduler_class is PNDMScheduler else {}
    scheduler = scheduler_class.from_config(tiny_scheduler().config, **options)
    arguments = {"objects": [{"phrase": "dog"}], "return_attention": True, "num_inference_steps": 3}
    last = sample(compose_pipeline(scheduler=scheduler), attention_steps=[iterations - 1], **arguments)
    assert last.attention[0]["dog"].max() > 0
    with pytest.raises(ObjectComposeError, match=f"from 0 to {iterations - 1}, got {iterations}"):
        sample(untouched(scheduler), attention_steps=[iterations], **arguments)


@pytest.mark.parametrize("wrong", ["all", 3, [], [True], [-1], [1.0]])
def test_attention_steps_of_a_wrong_form(wrong):
    with pytest.raises(ObjectComposeError, match="attention_steps"):
        check_attention_steps(wrong, 4)
    check_attention_steps(range(4), 4)
    check_attention_steps(None, 4)
