"""Box control of one call: guidance against whole tables, independence of pictures, what it leaves behind."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.box_control import BoxControlOptions, BoxControlRun
from objectcompose.attention_processors.box_layers import control_layers
from objectcompose.attention_processors.box_masks import PromptSubjects, SubjectRegions
from objectcompose.attention_processors.early_exit import run_until
from objectcompose.attention_processors.install import match_layers, use_parts
from objectcompose.attention_processors.probe import CellMapProbe, TokenMapProbe
from objectcompose.errors import LayerNotFoundError, NonFiniteError, ObjectComposeError
from tests.attention_processors.box_reference import (
    NO_SUBJECT,
    ONE_BOX,
    ONE_SUBJECT,
    TWO_BOXES,
    TWO_SUBJECTS,
    box_pyramids,
    explicit_box_loss,
    explicit_forward,
)
from tests.attention_processors.helpers import unet_and_inputs
from tests.tiny import tiny_unet


CANVAS = (16, 16)
FINE_CANVAS = (32, 32)  # whose finest level the loss does not read
PICTURES = ((TWO_BOXES, TWO_SUBJECTS), (ONE_BOX, ONE_SUBJECT))
ONE_TOKEN = PromptSubjects(((5,), (5,)), (5, 5), end_index=8, filtered_indices=(1, 3))
SHARED = ((TWO_BOXES, ONE_TOKEN), (ONE_BOX, ONE_SUBJECT))
ONE_STEP = {"iterations": 1, "guided_steps": 3}


def same(states):
    return states


class Call:
    """A tiny UNet under box control, with random latents and text for some pictures."""

    def __init__(self, pictures=PICTURES, kind="sd1", num_steps=10, canvas=CANVAS, **options):
        self.unet, inputs = unet_and_inputs(kind, batch_size=2, grid=canvas)
        rows = [0 if subjects is TWO_SUBJECTS else 1 for _, subjects in pictures]
        self.latents = inputs["sample"][rows]
        self.timestep = inputs["timestep"]
        self.text = inputs["encoder_hidden_states"][rows]
        self.boxes, self.subjects = zip(*pictures, strict=True)
        self.regions = SubjectRegions(box_pyramids(canvas, *self.boxes))
        self.layers = control_layers(self.unet, canvas)
        self.run = BoxControlRun(
            self.unet,
            self.subjects,
            self.regions,
            self.text.shape[1],
            self.layers,
            BoxControlOptions(**options),
            num_steps,
        )

    def forward(self, model_input):
        run_until(self.unet, self.run.last_layers, model_input, self.timestep, encoder_hidden_states=self.text)

    @torch.no_grad()
    def step(self, index=0, latents=None, scale_input=same):
        latents = self.latents if latents is None else latents
        with use_parts(self.unet, self.run.parts):
            return self.run.before_step(index, latents, scale_input, self.forward)

    @torch.no_grad()
    def denoise(self, latents):
        """A denoising pass of both halves, which leaves maps behind; inside an installed block."""
        text = torch.cat([torch.zeros_like(self.text), self.text])
        return self.unet(torch.cat([latents] * 2), self.timestep, encoder_hidden_states=text).sample


def explicit_gradient(call, penalty, **weights):
    """Gradient of the loss by whole tables of both halves and all of the UNet."""
    latents = call.latents.clone().requires_grad_()
    text = torch.cat([torch.zeros_like(call.text), call.text])
    inputs = {"sample": torch.cat([latents] * 2), "timestep": call.timestep, "encoder_hidden_states": text}
    _, tables = explicit_forward(call.unet, inputs, call.boxes, call.subjects, "guide")
    losses = explicit_box_loss(tables, call.layers.loss, call.boxes, call.subjects, penalty, **weights)
    return losses.detach(), torch.autograd.grad(losses.sum(), latents)[0]


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("step", [0, 2])
def test_loss_and_gradient_are_those_of_whole_tables(kind, step):
    call = Call(kind=kind, canvas=FINE_CANVAS, **ONE_STEP)
    moved = call.step(step)
    size = 8 - 2 * step  # of three guided steps from 8 to 2
    penalty = call.run.options.penalty_at(step, 3)
    losses, gradient = explicit_gradient(call, penalty)
    assert torch.allclose(call.run.losses[0][0], losses, rtol=1e-5)
    assert gradient.abs().max() > 1e-6
    assert torch.allclose((call.latents - moved) / size, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


def test_loss_and_gradient_of_subjects_that_share_a_token():
    call = Call(SHARED, **ONE_STEP)
    moved = call.step()
    losses, gradient = explicit_gradient(call, call.run.options.penalty_at(0, 3))
    assert torch.isfinite(losses).all() and torch.allclose(call.run.losses[0][0], losses, rtol=1e-5)
    assert torch.allclose((call.latents - moved) / 8, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize(("attention", "weights"), [("cross", (1.5, 0.0)), ("self", (0.0, 0.5))])
def test_one_kind_of_attention_alone(attention, weights):
    call = Call(attention=attention, **ONE_STEP)
    call.step()
    masks = [part.attention for part in call.run.parts if part.kind == "mask"]
    assert masks == (["self"] if attention == "self" else ["any"])
    assert all(name.endswith("attn2" if attention == "cross" else "attn1") for name in call.run.last_layers)
    both = Call(cross_weight=weights[0], self_weight=weights[1], **ONE_STEP)
    both.step()
    # The other kind's masks are off, so the values differ, but by little: the loss is of the same terms.
    assert torch.allclose(call.run.losses[0][0], both.run.losses[0][0], rtol=0.2)


@pytest.mark.parametrize(
    ("penalty", "expected"), [("decay", [0.4, 0.0985]), ("constant", [0.4, 0.4]), ("none", [0.0, 0.0])]
)
def test_penalty_modes(penalty, expected):
    options = BoxControlOptions(penalty=penalty)
    assert [options.penalty_at(step, 15) for step in (0, 3)] == pytest.approx(expected, abs=1e-4)


def test_without_a_penalty_the_total_is_the_reward():
    call = Call(penalty="none", **ONE_STEP)
    call.step()
    losses, _ = explicit_gradient(call, 0.0)
    assert torch.allclose(call.run.losses[0][0], losses, rtol=1e-5)


def test_iterations_lower_the_loss():
    call = Call(iterations=5, guided_steps=3)
    call.step()
    losses = torch.stack(call.run.losses[0])  # (5, B)
    assert losses.shape == (5, 2) and (losses[-1] < losses[0]).all()


def test_later_steps_leave_the_latents_alone():
    call = Call(guided_steps=2, refine=False)
    assert call.step(2) is call.latents and call.step(7) is call.latents
    assert call.run.losses == []
    masks_only = Call(guided_steps=0)
    assert masks_only.step(0) is masks_only.latents


@pytest.mark.parametrize("pictures", [PICTURES, SHARED])
def test_pictures_do_not_act_on_each_other(pictures):
    both = Call(pictures, iterations=3, guided_steps=2)
    together = both.step()
    for row, picture in enumerate(pictures):
        alone = Call((picture,), iterations=3, guided_steps=2)
        alone.latents, alone.text = both.latents[row : row + 1], both.text[row : row + 1]
        assert torch.allclose(alone.step()[0], together[row], atol=1e-4)


def test_a_picture_without_subjects_is_not_moved():
    call = Call((PICTURES[0], ((), NO_SUBJECT)), **ONE_STEP)
    moved = call.step()
    assert torch.equal(moved[1], call.latents[1]) and not torch.equal(moved[0], call.latents[0])


def test_each_picture_stops_on_its_own():
    one_step = Call(iterations=1, guided_steps=2)
    one = one_step.step()
    per_subject = one_step.run.losses[0][0] / torch.tensor([2.0, 1.0])
    early, late = int(per_subject.argmin()), int(per_subject.argmax())
    call = Call(iterations=2, guided_steps=2, stop_below=per_subject.mean().item())
    moved, two = call.step(), Call(iterations=2, guided_steps=2).step()
    assert torch.equal(moved[early], one[early]) and not torch.equal(two[early], one[early])
    assert torch.equal(moved[late], two[late]) and not torch.equal(two[late], one[late])
    all_stop = Call(iterations=4, guided_steps=2, stop_below=1e3)
    all_stop.step()
    assert len(all_stop.run.losses[0]) == 1  # one iteration always runs


def test_stopping_on_the_reward_ignores_the_penalty():
    rewards = Call(iterations=1, guided_steps=2, penalty="none")
    rewards.step()
    bound = 2 * rewards.run.losses[0][0].max().item()
    totals = Call(
        iterations=4, guided_steps=2, stop_below=bound, penalty_weights=(50.0, 50.0, 50.0), step_sizes=(0.01, 0)
    )
    totals.step()
    assert len(totals.run.losses[0]) == 4
    reward = Call(
        iterations=4,
        guided_steps=2,
        stop_below=bound,
        stop_on="reward",
        penalty_weights=(50.0, 50.0, 50.0),
        step_sizes=(0.01, 0),
    )
    reward.step()
    assert len(reward.run.losses[0]) == 1


def test_a_scheduler_s_scale_does_not_change_what_the_unet_reads():
    call, scaled = Call(**ONE_STEP), Call(**ONE_STEP)
    moved = call.step()
    sigma = 14.6
    found = scaled.step(latents=sigma * scaled.latents, scale_input=lambda states: states / sigma)
    assert torch.allclose(found / sigma, moved, atol=1e-5)


def test_the_model_is_left_as_it_was():
    call = Call(iterations=2, guided_steps=2)
    call.unet.requires_grad_(True)
    frozen = next(call.unet.parameters())
    frozen.requires_grad_(False)
    before = {name: id(processor) for name, processor in call.unet.attn_processors.items()}
    call.step()
    assert {name: id(processor) for name, processor in call.unet.attn_processors.items()} == before
    assert not frozen.requires_grad and sum(p.requires_grad for p in call.unet.parameters()) > 1
    assert all(parameter.grad is None for parameter in call.unet.parameters())
    assert call.run._visibility.mode == "denoise"
    assert not any(probe.maps for probe in call.run._map_probes)


def test_an_exception_in_guidance_leaves_denoising_masks():
    call = Call(**ONE_STEP)

    def broken(_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError), torch.no_grad(), use_parts(call.unet, call.run.parts):
        call.run.before_step(0, call.latents, same, broken)
    assert call.run._visibility.mode == "denoise"
    assert not any(hasattr(processor, "composed_parts") for processor in call.unet.attn_processors.values())


def test_latents_that_are_not_kept_are_not_moved():
    call = Call(**ONE_STEP)
    with torch.no_grad(), use_parts(call.unet, call.run.parts):
        assert call.run.before_step(0, call.latents, same, call.forward, is_kept=False) is call.latents
        assert call.run.losses == []
        assert not torch.equal(call.run.before_step(0, call.latents, same, call.forward), call.latents)


def test_a_gradient_that_is_not_finite_is_refused():
    call = Call(**ONE_STEP)
    with pytest.raises(NonFiniteError, match="step 0"):
        call.step(latents=torch.full_like(call.latents, float("nan")))


def test_maps_of_denoising_passes_only_refine_the_masks():
    call = Call(guided_steps=1, iterations=1, refine_start=2, refine_period=2)
    run, versions = call.run, []
    with torch.no_grad(), use_parts(call.unet, run.parts):
        latents = call.latents
        for step in range(6):
            latents = run.before_step(step, latents, same, call.forward)
            versions.append(call.regions.version)
            assert run._refiners[0]._count == step  # the guidance passes left nothing
            call.denoise(latents)
    assert versions == [0, 0, 1, 1, 2, 2]
    masks = call.regions.at_tokens(256)
    assert masks.shape == (2, 2, 16, 16) and masks[0].flatten(1).any(1).all() and masks[1, 0].any()
    assert masks.sum(1).max() == 1 and not masks[1, 1].any()  # disjoint; the padded subject stays empty


def test_subjects_that_share_a_token_are_refined_within_their_boxes():
    call = Call((SHARED[0],), guided_steps=0, refine_start=1, refine_period=1)
    with torch.no_grad(), use_parts(call.unet, call.run.parts):
        for step in range(2):
            call.run.before_step(step, call.latents, same, call.forward)
            call.denoise(call.latents)
    masks, boxes = call.regions.at_tokens(256)[0], call.regions.boxes.at_tokens(256)[0]
    assert masks.flatten(1).any(1).all() and masks.sum(0).max() == 1 and not torch.equal(masks, boxes)
    own = (masks[:, None] * boxes[None]).sum((2, 3))  # cells of each mask in each box
    assert own[0, 0] > own[0, 1] and own[1, 1] > own[1, 0]


def test_masks_are_not_refined_when_told_so():
    call = Call(refine=False, guided_steps=0)
    assert not [part for part in call.run.parts if part.kind == "probe"]
    call.step(40)
    assert not call.regions.is_refined


def test_cell_maps_are_the_masked_table_averaged_over_heads():
    call = Call(guided_steps=0)
    layers = call.layers.of_kind(call.layers.maps, call.unet, "self")
    with torch.no_grad():
        text = torch.cat([torch.zeros_like(call.text), call.text])
        inputs = {"sample": torch.cat([call.latents] * 2), "timestep": call.timestep, "encoder_hidden_states": text}
        _, tables = explicit_forward(call.unet, inputs, call.boxes, call.subjects, "denoise")
        with use_parts(call.unet, call.run.parts):
            call.denoise(call.latents)
    cells, tokens = call.run._map_probes
    assert list(cells.maps) == layers
    for name in layers:
        assert torch.allclose(cells.maps[name], tables[name][2:].mean(1), atol=1e-5)
        cross = name.replace("attn1", "attn2")
        assert torch.allclose(tokens.maps[cross][0], tables[cross][2, :, :, [2, 6]].mean(0), atol=1e-5)


def test_large_tables_of_cells_are_refused():
    unet, inputs = unet_and_inputs("sd1", grid=FINE_CANVAS)
    probe = CellMapProbe(match_layers(unet, r"up_blocks\.2.*attn1$"), max_cells=1023)
    with pytest.raises(ObjectComposeError, match="at most 1023 cells"), torch.no_grad(), use_parts(unet, [probe]):
        unet(**inputs)


def test_outer_probes_rest_while_guidance_runs():
    unet, inputs = unet_and_inputs("sd1")
    outer, inner = TokenMapProbe([1]), TokenMapProbe([2], layers=r"mid_block.*attn2$")
    with torch.no_grad(), use_parts(unet, [outer]):
        with use_parts(unet, [inner], outer_probes=False):
            unet(**inputs)
        assert outer.maps == {} and len(inner.maps) == 1
        unet(**inputs)
    assert len(outer.maps) == len(match_layers(unet, r"attn2$"))


@pytest.mark.parametrize(
    ("canvas", "grid", "blocks"),
    [
        ((16, 16), (16, 16), {"up_blocks.2", "up_blocks.1"}),
        ((32, 32), (16, 16), {"up_blocks.1", "mid_block"}),
        ((64, 64), (32, 32), {"up_blocks.1", "mid_block"}),
        ((32, 48), (16, 24), {"up_blocks.1", "mid_block"}),
    ],
)
def test_layers_are_chosen_by_their_grid(canvas, grid, blocks):
    layers = control_layers(tiny_unet("sd1"), canvas)
    assert layers.map_grid == grid
    assert {name.split(".attentions")[0] for name in layers.loss} == blocks


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(LayerNotFoundError, match="up_blocks"):
        control_layers(torch.nn.Linear(2, 2), (16, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guided_steps": -1}, "guided_steps"),
        ({"guided_steps": 1.5}, "guided_steps"),
        ({"iterations": 0}, "iterations"),
        ({"refine_period": 0}, "refine_period"),
        ({"cross_weight": -1.0}, "cross_weight"),
        ({"stop_below": float("nan")}, "stop_below"),
        ({"step_sizes": (8.0,)}, "step_sizes"),
        ({"penalty_weights": (0.1, float("inf"), 0.0)}, "penalty_weights"),
        ({"penalty": "linear"}, "penalty"),
        ({"attention": "none"}, "attention"),
        ({"padding": "hidden"}, "padding"),
        ({"stop_on": "loss"}, "stop_on"),
        ({"filtered_words": "of"}, "filtered_words"),
        ({"filtered_words": ["of", " "]}, "filtered_words"),
        ({"filtered_words": 3}, "filtered_words"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ObjectComposeError, match=message):
        BoxControlOptions(**options)
