"""Refinement of appearance tokens: the rule by itself, and one step on real models at tiny size."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from objectcompose.attention_processors.install import frozen_parameters, use_parts
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.errors import ObjectComposeError
from objectcompose.layout import SceneObject
from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline
from objectcompose.pipelines.segment_refinement import RefinedObject, SegmentRefiner
from objectcompose.pipelines.token_refinement import (
    TokenRefinement,
    predict_clean_latents,
    refined_tokens,
    refinement_indices,
    signal_share,
)
from tests.pipelines.object_prompt_helpers import PROMPT, object_picture, prompt_pipeline
from tests.tiny import tiny_scheduler, tiny_tiny_vae


# ---- when


def test_eight_steps_evenly_between_750_and_250():
    schedule = torch.arange(981, 0, -20)  # 50 steps of DDIM
    times = [int(schedule[index]) for index in refinement_indices(schedule, 8)]
    assert len(times) == 8 and times[0] == 741 and times[-1] == 261
    assert all(abs(time - (750 - 500 / 7 * place)) <= 20 for place, time in enumerate(times))


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, [5]), (2, [3, 7]), (50, [3, 4, 5, 6, 7])])
def test_short_schedules_refine_at_each_step_once(count, expected):
    schedule = [999, 900, 800, 750, 650, 500, 400, 250, 200, 100]
    assert refinement_indices(schedule, count) == expected


def test_schedules_outside_of_the_range_are_not_refined():
    assert refinement_indices([999, 751, 249, 1], 8) == []


def test_of_two_iterations_of_one_timestep_the_first_is_meant():
    assert refinement_indices([900, 500, 500, 100, 100], 3) == [1]


# ---- one-step prediction


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_of_a_perfect_model_is_the_clean_picture(kind):
    scheduler, timestep = tiny_scheduler(), 400
    clean, noise = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    noisy = scheduler.add_noise(clean, noise, torch.tensor([timestep]))
    velocity = scheduler.get_velocity(clean, noise, torch.tensor([timestep]))
    prediction = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind]
    found = predict_clean_latents(noisy, prediction, signal_share(scheduler, timestep), kind)
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-5)


def test_euler_latents_are_read_on_the_models_scale():
    scheduler = EulerDiscreteScheduler.from_config(tiny_scheduler().config)
    scheduler.set_timesteps(7)
    timestep = scheduler.timesteps[3]
    clean, noise = torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3, 5)
    noisy = scheduler.add_noise(clean, noise, timestep[None])
    scaled = scheduler.scale_model_input(noisy, timestep)
    found = predict_clean_latents(scaled, noise, signal_share(scheduler, float(timestep)), "epsilon")
    torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)


def test_signal_share_between_whole_timesteps():
    scheduler = tiny_scheduler()
    low, high = signal_share(scheduler, 500), signal_share(scheduler, 501)
    assert low == pytest.approx(float(scheduler.alphas_cumprod[500])) and high < signal_share(scheduler, 500.5) < low
    assert signal_share(scheduler, 2000) == signal_share(scheduler, 999)
    with pytest.raises(ObjectComposeError, match="alphas_cumprod"):
        signal_share(object(), 3)


# ---- the update


def test_the_update_by_hand():
    tokens = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])  # norms 5 and 2
    gradients = torch.tensor([[[0.0, 10.0]], [[1e-3, 0.0]]])
    found = refined_tokens(tokens, gradients, tokens)
    torch.testing.assert_close(found, torch.tensor([[[3.0, 4.0 - 0.1]], [[-0.04, 2.0]]]))


def test_tokens_stay_within_the_ball():
    torch.manual_seed(0)
    originals = torch.randn(3, 4, 5)
    tokens, direction = originals.clone(), torch.randn(3, 4, 5)
    for _ in range(20):
        tokens = refined_tokens(tokens, direction, originals)
    away = (tokens - originals).flatten(1).norm(dim=1) / originals.flatten(1).norm(dim=1)
    torch.testing.assert_close(away, torch.full((3,), 0.15))
    torch.testing.assert_close(refined_tokens(originals, torch.zeros(3, 4, 5), originals), originals)


def test_an_object_stops_after_two_rises_and_keeps_its_best():
    refinement = TokenRefinement(torch.randn(2, 3, 4))
    direction = torch.randn(2, 3, 4)
    seen = []
    for loss in (0.9, 0.5, 0.6, 0.55, 0.6, 0.7, 0.1):  # two rises in a row end at the sixth
        seen.append(refinement.tokens.clone())
        refinement.update(torch.tensor([loss, 0.9 - 0.1 * len(seen)]), direction)
    assert refinement.active.tolist() == [False, True]
    assert refinement.losses[0] == pytest.approx([0.9, 0.5, 0.6, 0.55, 0.6, 0.7]) and len(refinement.losses[1]) == 7
    assert torch.equal(refinement.tokens[0], seen[1][0]), "where the loss was 0.5"
    assert not torch.equal(refinement.tokens[1], seen[6][1])


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_no_number_stops_an_object(broken):
    refinement = TokenRefinement(torch.randn(2, 3, 4))
    before = refinement.tokens.clone()
    losses, gradients = torch.tensor([0.5, 0.5]), torch.ones(2, 3, 4)
    if broken == "loss":
        losses[0] = float("nan")
    else:
        gradients[0, 0, 0] = float("inf")
    refinement.update(losses, gradients)
    assert refinement.active.tolist() == [False, True] and torch.isfinite(refinement.tokens).all()
    assert torch.equal(refinement.tokens[0], before[0]) and not torch.equal(refinement.tokens[1], before[1])


def test_weights_are_thawed_again_after_an_exception():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="on purpose"), frozen_parameters([first, None, second]):
        assert not any(weight.requires_grad for weight in [*first.parameters(), *second.parameters()])
        raise RuntimeError("on purpose")
    assert first.weight.requires_grad and not second.weight.requires_grad and second.bias.requires_grad


# ---- one step on real models


class Scene:
    """A pipeline in the middle of a call: one picture, three objects, the first two of them matched."""

    def __init__(self, timestep=500, dtype=torch.float32, **components):
        self.pipeline = prompt_pipeline(**components).to(dtype)
        objects = [SceneObject(image=object_picture(seed)) for seed in range(3)]
        with torch.no_grad():
            call = self.pipeline.take_arguments(call_arguments())
            self.state = self.pipeline.start_sampling(call, 1)
            self.branch = self.pipeline.prompt_branch([objects], [None], 1)
        self.timestep = torch.tensor(timestep)
        left = torch.zeros(32, 32)
        left[4:28, 2:14] = 1
        generator = torch.Generator().manual_seed(3)
        references = torch.nn.functional.normalize(torch.randn(2, 16, generator=generator), dim=-1)
        masks = (left, left.flip(1))
        targets = [RefinedObject(0, slot, masks[slot], references[slot]) for slot in range(2)]
        self.refiner = SegmentRefiner(self.pipeline, self.branch, targets)

    def run(self, steps=1):
        with torch.no_grad(), use_parts(self.pipeline.unet, [self.branch.part]):
            for _ in range(steps):
                self.refiner.step(self.state, self.timestep)
        return self.refiner.refinement


def call_arguments():
    """Arguments of a call with their defaults, as `take_arguments` wants them."""
    signature = inspect.signature(ObjectPromptPipeline.__call__).parameters
    values = {name: item.default for name, item in signature.items() if name != "self"}
    generator = torch.Generator().manual_seed(0)
    return {**values, "prompt": PROMPT, "generator": generator, "num_inference_steps": 4}


@pytest.mark.parametrize("decoder", ["vae", "tiny_vae"])
def test_the_loss_falls_within_the_ball(decoder):
    scene = Scene(tiny_vae=tiny_tiny_vae() if decoder == "tiny_vae" else None)
    refinement = scene.run(8)
    for losses in refinement.losses:
        assert len(losses) == 8 and losses[-1] < losses[0] - 1e-4, losses
    moved = (refinement.tokens - refinement.originals).flatten(1).norm(dim=1)
    assert (moved <= 0.15 * refinement.originals.flatten(1).norm(dim=1) + 1e-5).all() and (moved > 0).all()


def test_only_values_of_matched_objects_change():
    scene = Scene()
    pipeline, branch = scene.pipeline, scene.branch
    weights = {name: weight.clone() for name, weight in pipeline.adapter.state_dict().items()}
    unet_weights = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    before = {name: [one.clone() for one in pair] for name, pair in branch.part.keys_values.items()}
    refinement = scene.run(3)
    for name, (key, value) in branch.part.keys_values.items():
        old_key, old_value = before[name]
        assert torch.equal(key, old_key), "keys say where, and stay"
        same = (value == old_value).unflatten(1, (3, 3)).all(-1).all(-1)  # (rows, objects)
        assert same.tolist() == [[True] * 3, [False, False, True]], "others and the null row stay"
        expected = pipeline.adapter.values_of(refinement.tokens)[name]
        torch.testing.assert_close(value[1].unflatten(0, (3, 3))[:2], expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weight, weights[name]) for name, weight in pipeline.adapter.state_dict().items())
    assert all(torch.equal(weight, unet_weights[name]) for name, weight in pipeline.unet.state_dict().items())
    for model in (pipeline.unet, pipeline.vae, pipeline.adapter, pipeline.dino):
        assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def slope_of_step(scene):
    """The direction in which one step moved the tokens."""
    before = scene.refiner.refinement.tokens.clone()
    return scene.run().tokens - before


def test_the_slope_is_that_of_the_whole_chain():
    """In two halves, it must equal automatic differentiation from tokens to loss in one go."""
    scene = Scene()
    tokens = scene.refiner.refinement.tokens.clone().requires_grad_()
    slots = scene.branch.tokens.values.unflatten(1, (3, 3)).clone()
    slots[0, :2] = tokens
    known = scene.branch.values
    scene.branch.values = scene.pipeline.adapter.values_of(slots.flatten(1, 2))
    with use_parts(scene.pipeline.unet, [scene.branch.part]):
        (slope,) = torch.autograd.grad(scene.refiner.losses(scene.state, scene.timestep, None).sum(), tokens)
    scene.branch.values = known
    length = slope.flatten(1).norm(dim=1)[:, None, None]
    expected = -0.02 * tokens.detach().flatten(1).norm(dim=1)[:, None, None] * slope / length
    torch.testing.assert_close(slope_of_step(scene), expected, atol=1e-5, rtol=1e-3)


def test_gradient_checkpointing_changes_nothing():
    """Also beside a probe, which must rest in both passes over a layer."""
    plain, checkpointed = Scene(), Scene()
    checkpointed.pipeline.unet.enable_gradient_checkpointing()
    probe = TokenMapProbe([2], layers="attn2$", rows=slice(1, 2))
    with use_parts(checkpointed.pipeline.unet, [probe]):
        found = slope_of_step(checkpointed)
    torch.testing.assert_close(found, slope_of_step(plain), atol=1e-6, rtol=1e-4)
    assert not probe.maps, "of the conditional half alone, row 1 does not exist"


def test_velocity_models_are_refined_too():
    scheduler = DDIMScheduler.from_config(tiny_scheduler().config, prediction_type="v_prediction")
    refinement = Scene(scheduler=scheduler, kind="sd2").run(6)
    assert all(losses[-1] < losses[0] for losses in refinement.losses)


def test_half_precision():
    refinement = Scene(dtype=torch.bfloat16).run(2)
    assert refinement.tokens.dtype == torch.float32 and torch.isfinite(refinement.tokens).all()
    assert all(len(losses) == 2 and all(map(math.isfinite, losses)) for losses in refinement.losses)
    assert (refinement.tokens != refinement.originals).any()


def test_objects_that_are_done_are_left_alone():
    scene = Scene()
    scene.refiner.refinement.active[0] = False
    refinement = scene.run(2)
    assert torch.equal(refinement.tokens[0], refinement.originals[0]) and refinement.losses[0] == []
    assert len(refinement.losses[1]) == 2
    refinement.active[1] = False
    before = scene.branch.values
    scene.run()
    assert all(torch.equal(one, before[name]) for name, one in scene.branch.values.items())


def test_an_object_without_influence_does_not_move():
    scene = Scene()
    scene.branch.part.scale = torch.tensor([[0.0, 1.0, 1.0]])
    refinement = scene.run()
    assert torch.equal(refinement.tokens[0], refinement.originals[0])
    assert not torch.equal(refinement.tokens[1], refinement.originals[1])
