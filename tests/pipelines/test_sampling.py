"""What the calls of all pipelines share: arguments, the hook before a step, and maps beside it."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch

from objectcompose.errors import MissingFieldError, ObjectComposeError
from objectcompose.pipelines.call_arguments import CallArguments
from objectcompose.pipelines.pipeline_output import PlacedObject
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from tests.pipelines.conformance.rows import ROWS
from tests.pipelines.helpers import compose_pipeline, sample, seeded


DOG = [PlacedObject(phrase="dog", label="dog", token_indices=(2,))]
UNNAMED = [PlacedObject()]


def arguments_of(pipeline, **given):
    """Arguments of a call of two steps, as `__call__` takes them."""
    defaults = inspect.signature(type(pipeline).__call__).parameters
    names = [field.name for field in fields(CallArguments)]
    plain = {name: defaults[name].default for name in names}
    chosen = {"prompt": "a dog", "num_inference_steps": 2, "output_type": "pt", "generator": seeded()}
    return pipeline.take_arguments({**plain, **chosen, **given})


def run(pipeline, before_step=None, placed=DOG, **given):
    call = arguments_of(pipeline, **given)
    pipeline.check_call(call)
    map_layers = pipeline.check_attention(call, [placed])
    state = pipeline.start_sampling(call, 1)
    recorder = pipeline.make_recorder(call, [placed], map_layers)
    pipeline.denoise(call, state, call.parts, recorder, before_step)
    return pipeline.finish_sampling(call, state, [placed], recorder)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "phrase_boxes"])  # which hands them on as `**`
def test_every_pipeline_takes_the_shared_arguments_with_the_same_defaults(name):
    expected = inspect.signature(TokenComposePipeline.__call__).parameters
    found = inspect.signature(ROWS[name].pipeline_class.__call__).parameters
    for field in fields(CallArguments):
        assert found[field.name].default == expected[field.name].default, field.name


def test_defaults_depend_on_the_pipeline_and_the_latents():
    pipeline = compose_pipeline()
    call = arguments_of(pipeline, num_images_per_prompt=None)
    assert (call.height, call.width, call.num_images_per_prompt) == (32, 32, 1)
    call = arguments_of(pipeline, latents=torch.zeros(1, 4, 8, 12))
    assert (call.height, call.width) == (16, 24)
    call = arguments_of(pipeline, latents=torch.zeros(1, 4, 8, 12), height=40)
    assert (call.height, call.width) == (40, 24)


def test_the_steps_together_are_the_call():
    pipeline = compose_pipeline()
    assert torch.equal(run(pipeline).images, sample(pipeline, "a dog").images)


def test_before_step_sees_each_step_and_changes_the_latents():
    pipeline, seen = compose_pipeline(), []

    def move(step, timestep, latents, prompt_embeds):
        seen.append((step, int(timestep), tuple(latents.shape), len(prompt_embeds)))
        return latents + 1.0

    moved = run(pipeline, move)
    steps = [int(t) for t in pipeline.scheduler.timesteps]
    assert seen == [(0, steps[0], (1, 4, 16, 16), 2), (1, steps[1], (1, 4, 16, 16), 2)]
    assert not torch.equal(moved.images, run(pipeline).images)
    kept = run(pipeline, lambda step, timestep, latents, prompt_embeds: latents)
    assert torch.equal(kept.images, run(pipeline).images)


def test_forwards_before_a_step_do_not_enter_the_maps():
    pipeline = compose_pipeline()

    def look(step, timestep, latents, prompt_embeds):
        pipeline.unet(latents * 3, timestep, prompt_embeds.chunk(2)[1])
        return latents

    alone = run(pipeline, return_attention=True)
    beside = run(pipeline, look, return_attention=True)
    assert torch.equal(alone.images, beside.images)
    assert torch.equal(alone.attention[0]["dog"], beside.attention[0]["dog"])


def test_steps_of_the_maps_may_come_from_an_iterator():
    pipeline = compose_pipeline()
    expected = run(pipeline, return_attention=True, attention_steps=[1]).attention[0]["dog"]
    found = run(pipeline, return_attention=True, attention_steps=iter([1])).attention[0]["dog"]
    assert torch.equal(found, expected)


def test_objects_without_a_phrase_have_no_map():
    pipeline = compose_pipeline()
    output = run(pipeline, placed=[*DOG, *UNNAMED], return_attention=True)
    assert list(output.attention[0]) == ["dog"] and len(output.objects[0]) == 2
    with pytest.raises(MissingFieldError, match="return_attention"):
        run(pipeline, placed=UNNAMED, return_attention=True)


def test_attention_options_need_attention():
    with pytest.raises(ObjectComposeError, match="`attention_layers` needs `return_attention=True`, got 'mid'"):
        run(compose_pipeline(), attention_layers="mid")
