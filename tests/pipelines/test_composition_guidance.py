"""Compositional guidance of ObjectPromptPipeline: two stages, and what the first one is good for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from transformers import BitImageProcessor, CLIPImageProcessor, CLIPVisionModelWithProjection, Dinov2Model

from objectcompose.adapters.object_prompt_adapter import ObjectPromptAdapter
from objectcompose.attention_processors.install import use_parts
from objectcompose.attention_processors.mask import KeyMask
from objectcompose.errors import ObjectComposeError
from objectcompose.grounding.grounder import load_grounder
from objectcompose.layout import SceneObject
from objectcompose.pipelines.object_prompts import ObjectPromptBranch
from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline
from objectcompose.toybox.identities import PICTURES
from objectcompose.toybox.weights import active_categories, toybox_path
from tests.pipelines.object_prompt_helpers import (
    PROMPT,
    HalvesSegmenter,
    close,
    guided,
    object_picture,
    plain_images,
    prompt_pipeline,
    sample,
    two_objects,
)
from tests.tiny import tiny_scheduler, tiny_tiny_vae


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("found", [(), ("left", "right")])
def test_where_nothing_matches_it_is_the_unguided_run(mode, found):
    """Bit for bit, also with a sampler that draws noise at each step."""
    for scheduler in (tiny_scheduler(), EulerAncestralDiscreteScheduler.from_config(tiny_scheduler().config)):
        pipeline = prompt_pipeline(scheduler=scheduler)
        options = {"return_attention": True, "num_inference_steps": 2}
        expected = sample(pipeline, **options)
        output = guided(pipeline, mode=mode, segmenter=HalvesSegmenter(found), similarity_threshold=1.0, **options)
        assert torch.equal(output.images, expected.images)
        assert all(torch.equal(output.attention[0][name], one) for name, one in expected.attention[0].items())
        assert [item.matched for item in output.objects[0]] == [False, False]
        assert all((item.similarity is None) == (not found) for item in output.objects[0])


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_matches_are_reported(mode):
    pipeline = prompt_pipeline()
    output = guided(pipeline, mode=mode, num_inference_steps=8)
    unguided = sample(pipeline, num_inference_steps=8)
    assert not close(output.images, unguided.images, 1e-3) and torch.isfinite(output.images).all()
    items = output.objects[0]
    assert [item.matched for item in items] == [True, True]
    assert sorted(item.box for item in items) == [(0.0, 0.0, 13 / 32, 1.0), (20 / 32, 0.0, 1.0, 1.0)]
    for item in items:
        assert item.region.shape == (32, 32) and -1 <= item.similarity <= 1
        assert 1 <= len(item.refinement_losses) <= 8
    assert sample(pipeline).objects[0][0].region is None


def test_the_first_stage_is_the_unguided_picture():
    pipeline, segmenter = prompt_pipeline(), HalvesSegmenter()
    guided(pipeline, segmenter=segmenter)
    expected = sample(pipeline, output_type="pil").images[0]
    assert [one.tobytes() for one in segmenter.pictures] == [expected.tobytes()]


def test_steps_of_both_stages_and_callbacks():
    pipeline = prompt_pipeline()
    for mode, lengths in (("exact", [6, 6]), ("fast", [3, 6])):
        seen = []

        def look(pipe, step, timestep, tensors, seen=seen):
            seen.append((step, pipe.num_timesteps))
            return tensors

        guided(pipeline, mode=mode, num_inference_steps=6, callback_on_step_end=look)
        assert seen == [(step, count) for count in lengths for step in range(count)]


def test_fast_mode_halves_what_is_given():
    pipeline = prompt_pipeline()
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(int(timestep))
        return tensors

    scheduler = EulerAncestralDiscreteScheduler.from_config(tiny_scheduler().config)
    with pytest.raises(ObjectComposeError, match="takes no custom timesteps"):
        guided(pipeline, mode="fast", timesteps=[900, 500, 100])
    guided(prompt_pipeline(scheduler=scheduler), mode="fast", num_inference_steps=1, callback_on_step_end=look)
    assert len(seen) == 2 and seen[0] == seen[1]


def test_an_interrupt_ends_both_stages():
    pipeline, segmenter = prompt_pipeline(), HalvesSegmenter()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    output = guided(pipeline, segmenter=segmenter, callback_on_step_end=stop)
    assert torch.equal(output.images, sample(pipeline, callback_on_step_end=stop).images) and not segmenter.pictures
    assert [item.matched for item in output.objects[0]] == [False, False]
    assert torch.isfinite(guided(pipeline).images).all()


def test_guided_runs_repeat_and_leave_no_trace():
    pipeline = prompt_pipeline()
    before = {name: weight.clone() for name, weight in pipeline.adapter.state_dict().items()}
    processors = dict(pipeline.unet.attn_processors)
    unguided, plain = sample(pipeline).images, plain_images(pipeline)
    first = guided(pipeline).images
    assert torch.equal(guided(pipeline).images, first)
    assert torch.equal(sample(pipeline).images, unguided), "refined values must not stay in a cache"
    assert torch.equal(plain_images(pipeline), plain) and pipeline.unet.attn_processors == processors
    assert all(torch.equal(weight, before[name]) for name, weight in pipeline.adapter.state_dict().items())


@pytest.mark.slow
def test_masks_alone_and_refinement_alone_matter():
    pipeline = prompt_pipeline()
    steps = {"num_inference_steps": 8}
    unguided, masked = sample(pipeline, **steps).images, guided(pipeline, refinement_steps=0, **steps)
    refined = guided(pipeline, **steps).images
    assert not close(masked.images, unguided, 1e-3) and not close(refined, masked.images, 1e-4)
    assert all(item.refinement_losses == () for item in masked.objects[0])
    tiny = guided(prompt_pipeline(tiny_vae=tiny_tiny_vae()), **steps).images
    assert not close(tiny, refined, 1e-5) and not close(tiny, masked.images, 1e-5)


@pytest.mark.slow
def test_a_guided_batch_equals_singles():
    pipeline = prompt_pipeline()
    rows = [two_objects(), [{"image": object_picture(5)}]]
    scheduler = EulerAncestralDiscreteScheduler.from_config(tiny_scheduler().config)
    pipeline = prompt_pipeline(scheduler=scheduler)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
    options = {"background": object_picture(8), "num_inference_steps": 5}
    together = guided(pipeline, prompt=[PROMPT] * 2, objects=rows, generator=seeds, **options)
    for index, row in enumerate(rows):
        alone = guided(pipeline, index, objects=row, **options)
        assert close(together.images[index : index + 1], alone.images, 1e-3)
        for one, other in zip(together.objects[index], alone.objects[0], strict=True):
            assert one.matched and torch.equal(one.region, other.region)
            assert one.refinement_losses == pytest.approx(other.refinement_losses, abs=1e-3)


def test_fewer_segments_leave_an_object_unmatched_and_unrefined():
    output = guided(prompt_pipeline(), segmenter=HalvesSegmenter(("left",)), num_inference_steps=8)
    items = sorted(output.objects[0], key=lambda item: not item.matched)
    assert [item.matched for item in items] == [True, False]
    assert items[0].refinement_losses and not items[1].refinement_losses
    assert items[1].region is None and items[1].similarity is None


@pytest.mark.parametrize("returned", [None, "masks", [None]])
def test_a_segmenter_that_returns_no_masks_is_refused_and_leaves_no_trace(returned):
    pipeline = prompt_pipeline()
    expected = sample(pipeline, num_inference_steps=2).images
    with pytest.raises(ObjectComposeError, match="`segmenter` must return"):
        guided(pipeline, num_inference_steps=2, segmenter=SimpleNamespace(segment=lambda picture: returned))
    assert torch.equal(sample(pipeline, num_inference_steps=2).images, expected)


def test_attention_is_confined_to_matched_segments():
    """What the installed branch adds is nothing outside its object's cells, in both halves of the batch."""
    pipeline = prompt_pipeline()
    objects = [SceneObject(image=object_picture(seed)) for seed in range(2)]
    with torch.no_grad():
        branch: ObjectPromptBranch = pipeline.prompt_branch([objects], [None], 1)
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    branch.confine([[left, 1 - left]], (16, 16), [[False, False]])
    weights = branch.part._grid(256, torch.device("cpu")).weights.unflatten(-1, (16, 16))
    assert weights.shape == (2, 2, 16, 16), "rows for both halves"
    for row in weights:
        assert torch.equal(row[0], (torch.arange(16) < 8).float().expand(16, 16)) and torch.equal(row[1], 1 - row[0])
    unet, text = pipeline.unet, torch.randn(2, 77, 22)
    latents = torch.randn(2, 4, 16, 16)
    with torch.no_grad(), use_parts(unet, [branch.part]):
        both = unet(latents, 10, encoder_hidden_states=text).sample
        conditional = unet(latents[1:], 10, encoder_hidden_states=text[1:]).sample
    assert close(both[1:], conditional), "a forward of one row is the conditional half"


def test_restarts_keep_the_best_run_of_each_picture():
    """The second seed is the one whose picture has both segments."""

    class SecondTry(HalvesSegmenter):
        def segment(self, picture):
            self.found = ("left", "right") if len(self.pictures) == 1 else ("left",)
            return super().segment(picture)

    pipeline, segmenter = prompt_pipeline(), SecondTry()
    output = guided(pipeline, segmenter=segmenter, num_restarts=2, refinement_steps=0)
    assert [item.matched for item in output.objects[0]] == [True, True]
    assert len(segmenter.pictures) == 2, "nothing is left to find"
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 4, 16, 16, generator=generator)  # the first try's noise
    expected = guided(pipeline, generator=generator, refinement_steps=0)
    assert torch.equal(output.images, expected.images)


@pytest.mark.slow
def test_restarts_of_a_batch_are_chosen_for_each_picture():
    class ByTurns(HalvesSegmenter):
        """First run: both in picture 0, one in picture 1; second run: the other way round."""

        def segment(self, picture):
            self.found = ("left", "right") if len(self.pictures) in (0, 3) else ("left",)
            return super().segment(picture)

    pipeline = prompt_pipeline()
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
    options = {"num_restarts": 1, "refinement_steps": 0, "num_images_per_prompt": 2}
    output = guided(pipeline, generator=seeds, segmenter=ByTurns(), **options)
    assert all(item.matched for row in output.objects for item in row)
    assert close(output.images[:1], guided(pipeline, 0, refinement_steps=0).images, 1e-4)


def test_phrases_reach_a_segmenter_that_takes_them():
    class ByPhrase(HalvesSegmenter):
        def ground(self, picture, phrases, on_missing):
            self.asked = (list(phrases), on_missing)
            return self.segment(picture)

    segmenter = ByPhrase()
    guided(prompt_pipeline(), segmenter=segmenter)
    assert segmenter.asked == (["dog", "cup"], "skip")
    unnamed = ByPhrase()
    guided(prompt_pipeline(), objects=[{"image": object_picture(1)}, two_objects()[1]], segmenter=unnamed)
    assert not hasattr(unnamed, "asked") and unnamed.pictures


@pytest.mark.slow
def test_guidance_with_other_methods_parts_and_without_guidance_scale():
    pipeline = prompt_pipeline()
    hidden = KeyMask(torch.arange(77) != 2)
    with_part = guided(pipeline, parts=[hidden], num_inference_steps=8)
    assert not close(with_part.images, guided(pipeline, num_inference_steps=8).images, 1e-4)
    output = guided(pipeline, guidance_scale=1.0, num_inference_steps=8)
    assert all(item.refinement_losses for item in output.objects[0])


@pytest.mark.slow
def test_sizes_that_halve_to_odd_grids():
    for height, width in ((40, 24), (24, 56)):
        output = guided(prompt_pipeline(), height=height, width=width, background=object_picture(4))
        assert output.images.shape == (1, 3, height, width) and torch.isfinite(output.images).all()
        assert output.objects[0][0].region.shape == (height, width)


@pytest.mark.slow
def test_half_precision():
    pipeline = prompt_pipeline().to(torch.bfloat16)
    output = guided(pipeline, num_inference_steps=8)
    assert output.images.dtype == torch.bfloat16 and torch.isfinite(output.images).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_on_toybox_with_a_fresh_adapter(mode):
    """The committed base, encoders and CLIPSeg (by phrases): pictures come out, and what matched is said."""
    half = {"dtype": torch.float32}
    pipeline = ObjectPromptPipeline.from_pretrained(
        str(toybox_path("base")),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(toybox_path("image_encoder"), **half),
        feature_extractor=CLIPImageProcessor.from_pretrained(toybox_path("image_encoder")),
        dino=Dinov2Model.from_pretrained(toybox_path("dino"), **half),
        dino_processor=BitImageProcessor.from_pretrained(toybox_path("dino")),
    )
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    pipeline.load_adapter(ObjectPromptAdapter.from_unet(pipeline.unet, "toybox", pipeline.image_encoder))
    names = active_categories()[:2]
    objects = [
        {"phrase": name, "image": PICTURES / "fluent" / f"{name.replace(' ', '_')}.png", "scale": 0.3}
        for name in names
    ]
    output = pipeline(
        f"a photo of a {names[0]} and a {names[1]}",
        objects=objects,
        num_inference_steps=20,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        compositional_guidance=True,
        segmenter=load_grounder("clipseg", toybox_path("clipseg")),
        similarity_threshold=-1.0,
        mode=mode,
    )
    assert output.images[0].size == (64, 64) and np.asarray(output.images[0]).std() > 10
    matched = [item for item in output.objects[0] if item.matched]
    assert matched and all(item.refinement_losses and item.region.shape == (64, 64) for item in matched)
    # each is of another timestep, and of a fresh adapter: nothing says that they fall, see test_token_refinement.py
    assert all(0 <= loss <= 2 for item in matched for loss in item.refinement_losses)
