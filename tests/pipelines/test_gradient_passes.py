"""Passes with gradients beside LoRA at a scale, gradient checkpointing and inference mode, over all who take them."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import apply_group_offloading

from objectcompose.errors import ObjectComposeError
from objectcompose.layout import SceneObject
from objectcompose.pipelines.gradient_passes import held_lora_scale
from objectcompose.pipelines.mifo_control import MIFOBoxControl
from objectcompose.pipelines.pipeline_mifo import MIFOPipeline
from tests.pipelines.conformance.rows import picture
from tests.pipelines.helpers import compose_pipeline, quiet, sample, seeded
from tests.pipelines.locref_helpers import locref
from tests.pipelines.object_prompt_helpers import guided, prompt_pipeline
from tests.pipelines.refusals import refused
from tests.tiny import tiny_components, tiny_unet


PROMPT = "a dog and a cup on the table"
LEFT, RIGHT = (0.0, 0.1, 0.4, 0.9), (0.5, 0.1, 1.0, 0.8)
BOXES = [{"phrase": "dog", "box": LEFT}, {"phrase": "cup", "box": RIGHT}]
CONTROL = {"guided_steps": 2, "iterations": 2, "stop_below": 0.0, "refine": False}
MASKS_ALONE = {**CONTROL, "guided_steps": 0}


def mifo_pipeline(**changes):
    return quiet(MIFOPipeline(**{**tiny_components(), **changes}))


def sample_mifo(pipeline, takes_gradients=True, **arguments):
    control = CONTROL if takes_gradients else MASKS_ALONE
    return sample(pipeline, PROMPT, objects=BOXES, box_control=control, num_inference_steps=4, **arguments)


def sample_locref(pipeline, takes_gradients=True, **arguments):
    parts = [MIFOBoxControl(BOXES, CONTROL if takes_gradients else MASKS_ALONE)]
    objects = [SceneObject(phrase="dog", image=picture("red"), box=LEFT)]
    return sample(pipeline, PROMPT, objects=objects, parts=parts, **arguments)


def sample_object_prompt(pipeline, takes_gradients=True, **arguments):
    return guided(pipeline, refinement_steps=8 if takes_gradients else 0, num_inference_steps=4, **arguments)


METHODS = {
    "mifo": (mifo_pipeline, sample_mifo),
    "locref with boxes": (locref, sample_locref),
    "object_prompt": (prompt_pipeline, sample_object_prompt),
}


def add_lora(unet):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


def lora_scales(unet):
    return [scale for module in unet.modules() for scale in getattr(module, "scaling", {}).values()]


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def test_checkpointing_and_earlier_inference_change_nothing_with_lora_at_a_scale(method):
    build, call = method
    arguments = {"output_type": "latent", "cross_attention_kwargs": {"scale": 0.2}}

    def painted(is_checkpointed, after_inference):
        pipeline = build()
        add_lora(pipeline.unet)
        if is_checkpointed:
            pipeline.unet.enable_gradient_checkpointing()
        if after_inference:
            with torch.inference_mode():
                call(pipeline, takes_gradients=False, **arguments)
        return call(pipeline, **arguments).images

    expected = painted(False, False)
    for given in ((True, False), (True, True)):
        torch.testing.assert_close(painted(*given), expected, atol=2e-4, rtol=0)


def test_gradients_depend_on_the_scale_of_lora(method):
    """Else the test above could not tell one scale from another."""
    build, call = method
    moves = []
    for scale in (0.2, 1.0):
        pipeline = build()
        add_lora(pipeline.unet)
        before = lora_scales(pipeline.unet)
        arguments = {"output_type": "latent", "cross_attention_kwargs": {"scale": scale}}
        found, without = (call(pipeline, is_moved, **arguments).images for is_moved in (True, False))
        moves.append(found - without)
        assert before and lora_scales(pipeline.unet) == pytest.approx(before)
    assert moves[0].abs().max() > 1e-2 and (moves[1] - moves[0]).abs().max() > 1e-2


def test_a_held_scale_is_taken_back_after_an_error():
    unet = tiny_unet()
    add_lora(unet)
    before = lora_scales(unet)
    given = {"scale": 0.5, "other": 1}
    with pytest.raises(RuntimeError, match="on purpose"), held_lora_scale(unet, given) as rest:
        assert rest == {"other": 1} and lora_scales(unet) != before
        raise RuntimeError("on purpose")
    assert lora_scales(unet) == before and given == {"scale": 0.5, "other": 1}
    for nothing in (None, {}, {"other": 1}):
        with held_lora_scale(unet, nothing) as rest:
            assert rest is nothing and lora_scales(unet) == before


# ---- inference mode


@pytest.mark.parametrize("name", ["mifo", "as a part", "object_prompt"])
def test_gradients_in_inference_mode_are_refused(name):
    build, call = {**METHODS, "as a part": (compose_pipeline, sample_as_a_part)}[name]
    with torch.inference_mode():
        made_there = tiny_unet()
        argument = "refinement_steps" if name == "object_prompt" else "guided_steps"
        refused(call, build(), ObjectComposeError, f"`{argument}` needs gradients.*{argument}")
        assert torch.isfinite(call(build(), takes_gradients=False).images).all()
    message = f"`{argument}` needs gradients, which a `unet` that was made in inference mode forbids"
    refused(call, build(unet=made_there), ObjectComposeError, message)
    assert torch.isfinite(call(build(unet=made_there), takes_gradients=False).images).all()


def sample_as_a_part(pipeline, takes_gradients=True):
    parts = [MIFOBoxControl(BOXES, CONTROL if takes_gradients else MASKS_ALONE)]
    return sample(pipeline, PROMPT, parts=parts)


def test_boxes_that_do_not_act_ask_for_no_gradients():
    pipeline = mifo_pipeline()
    with torch.inference_mode():
        for arguments in ({"objects": []}, {"objects": BOXES, "use_box_control": False}):
            found = sample(pipeline, PROMPT, **arguments).images
            assert torch.equal(found, sample(pipeline, PROMPT, generator=seeded()).images)


# ---- weights that change around a forward pass


def offload_in_blocks(model):
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


def store_in_float8(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("change", [offload_in_blocks, store_in_float8])
@pytest.mark.parametrize(
    ("name", "component"), [("mifo", "unet"), ("object_prompt", "unet"), ("object_prompt", "vae")]
)
def test_gradients_through_weights_that_change_are_refused(name, component, change):
    build, call = METHODS[name]
    pipeline = build()
    change(getattr(pipeline, component))
    argument = "refinement_steps" if name == "object_prompt" else "guided_steps"
    refused(call, pipeline, ObjectComposeError, f"`{argument}` needs gradients through `{component}`.*{argument}=0")
    assert torch.isfinite(call(pipeline, takes_gradients=False).images).all()


def test_an_adapter_that_runs_in_parts_is_not_offloaded_in_blocks():
    pipeline = prompt_pipeline()
    offload_in_blocks(pipeline.adapter)
    refused(guided, pipeline, ObjectComposeError, "`adapter` .*exclude_modules")
