"""Compositional guidance beside what else may be at work: a compiled UNet, offloading, box control."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from objectcompose.errors import ObjectComposeError
from objectcompose.pipelines.mifo_control import MIFOBoxControl
from tests.pipelines.helpers import processor_ids
from tests.pipelines.object_prompt_helpers import close, guided, plain_images, prompt_pipeline, sample
from tests.pipelines.refusals import refused
from tests.tiny import tiny_tiny_vae


BOXES = [{"phrase": "dog", "box": (0.0, 0.1, 0.5, 0.9)}, {"phrase": "cup", "box": (0.5, 0.1, 1.0, 0.9)}]
CONTROL = {"guided_steps": 2, "iterations": 1, "refine_start": 2, "refine_period": 2, "stop_below": 0.0}


def assert_same_guidance(output, expected, atol=1e-4):
    """The same pictures, matches and losses of refinement."""
    assert close(output.images, expected.images, atol)
    for row, expected_row in zip(output.objects, expected.objects, strict=True):
        for one, other in zip(row, expected_row, strict=True):
            assert one.matched and other.matched and torch.equal(one.region, other.region)
            assert one.refinement_losses == pytest.approx(other.refinement_losses, abs=1e-4)
            assert one.refinement_losses


# ---- a compiled UNet


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_unet_is_guided_as_another(fresh_compiler):
    """Both stages and the gradients of refinement, in whole graphs with backward graphs of their own."""
    pipeline, options = prompt_pipeline(), {"num_inference_steps": 4}
    expected = guided(pipeline, **options)
    pipeline.unet.compile(backend="aot_eager", fullgraph=True)
    assert_same_guidance(guided(pipeline, **options), expected)


@pytest.mark.slow
def test_a_compiled_unet_is_guided_with_boxes_and_compiled_once(fresh_compiler):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    # refined masks have other sizes in each picture, for which a compiled UNet compiles anew
    part = MIFOBoxControl(BOXES, {**CONTROL, "refine": False})
    pipeline, options = prompt_pipeline(), {"num_inference_steps": 4, "parts": [part]}
    expected = guided(pipeline, **options)
    pipeline.unet.compile(backend=count, fullgraph=True)
    assert_same_guidance(guided(pipeline, **options), expected)
    built = len(graphs)
    assert built > 0
    assert_same_guidance(guided(pipeline, **options), expected)
    assert len(graphs) == built, "something was compiled again"


# ---- offloading


def test_refinement_under_sequential_offloading_is_refused_and_confining_is_not():
    pipeline = prompt_pipeline()
    expected = guided(pipeline, refinement_steps=0)
    cpu_offload(pipeline.unet, execution_device=torch.device("cpu"))  # as `enable_sequential_cpu_offload` does
    assert all(weight.device.type == "meta" for weight in pipeline.unet.parameters())
    refused(guided, pipeline, ObjectComposeError, "under sequential offloading; use `refinement_steps=0`")
    assert torch.equal(guided(pipeline, refinement_steps=0).images, expected.images)


def test_refinement_under_model_offloading_needs_a_tiny_decoder():
    pipeline = prompt_pipeline()
    confined = guided(pipeline, refinement_steps=0)
    add_hook_to_module(pipeline.unet, ModelHook())  # as `enable_model_cpu_offload` does, which wants an accelerator
    refused(guided, pipeline, ObjectComposeError, "under model offloading needs `tiny_vae`.*`refinement_steps=0`")
    assert torch.equal(guided(pipeline, refinement_steps=0).images, confined.images)
    pipeline.register_modules(tiny_vae=tiny_tiny_vae())
    hooked = guided(pipeline, num_inference_steps=6)
    remove_hook_from_module(pipeline.unet)
    assert_same_guidance(hooked, guided(pipeline, num_inference_steps=6), atol=0.0)


# ---- box control of MIFO as a part


@pytest.mark.parametrize("mode", ["exact", pytest.param("fast", marks=pytest.mark.slow)])
def test_boxes_and_guidance_act_together_and_leave_no_trace(mode):
    pipeline = prompt_pipeline()
    before, plain, unguided = processor_ids(pipeline.unet), plain_images(pipeline), sample(pipeline).images
    part = MIFOBoxControl(BOXES, CONTROL)
    options = {"mode": mode, "num_inference_steps": 4}
    both = guided(pipeline, parts=[part], **options)
    assert torch.isfinite(both.images).all()
    assert all(item.matched and item.refinement_losses for item in both.objects[0])
    for other in (guided(pipeline, **options), sample(pipeline, parts=[part], num_inference_steps=4)):
        assert not close(both.images, other.images, 1e-3)

    assert processor_ids(pipeline.unet) == before
    assert all(weight.requires_grad and weight.grad is None for weight in pipeline.unet.parameters())
    assert torch.equal(guided(pipeline, parts=[part], **options).images, both.images)
    assert torch.equal(plain_images(pipeline), plain) and torch.equal(sample(pipeline).images, unguided)


def test_boxes_act_in_both_stages_as_they_do_alone():
    """The first stage is the call without guidance; where nothing matches it is the result."""
    pipeline, part = prompt_pipeline(), MIFOBoxControl(BOXES, CONTROL)
    alone = sample(pipeline, parts=[part])
    assert torch.equal(guided(pipeline, parts=[part], similarity_threshold=1.0).images, alone.images)
    nothing = guided(pipeline, mode="fast", parts=[part], similarity_threshold=1.0)
    assert torch.equal(nothing.images, alone.images)


def test_bad_boxes_are_refused_before_any_stage():
    part = MIFOBoxControl([{"phrase": "dog", "box": BOXES[0]["box"]}, {"phrase": "cup", "box": BOXES[0]["box"]}])
    refused(guided, prompt_pipeline(), ObjectComposeError, "'dog' and 'cup'.*overlap", parts=[part])
