"""Turned off, the pipeline is `StableDiffusionPipeline`, bit for bit."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.pipelines.helpers import (
    CLIP_WIDTH,
    add_ip_adapter,
    both_pipelines,
    compose_pipeline,
    ip_embeds,
    sample,
    seeded,
)
from tests.tiny import TEXT_WIDTH, tiny_components


def assert_same(plain, ours, **arguments):
    """Both calls get equal arguments; generators are made anew by `sample` or by a function."""

    def call(pipeline):
        return sample(
            pipeline, **{k: v() if callable(v) and k != "callback_on_step_end" else v for k, v in arguments.items()}
        )

    expected, found = call(plain), call(ours)
    assert expected.images.shape == found.images.shape
    assert torch.equal(expected.images, found.images)
    assert found.objects is None and found.attention is None
    return found.images


def embeds(rows, tokens=77):
    return torch.randn(rows, tokens, TEXT_WIDTH, generator=seeded(3))


CASES = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "batch of two": {"prompt": ["a dog", "a red cup on the table"]},
    "two pictures each": {"prompt": ["a dog", "a cat"], "num_images_per_prompt": 2},
    "a generator each": {"prompt": ["a dog", "a cat"], "generator": lambda: [seeded(1), seeded(2)]},
    "non-square": {"height": 40, "width": 24},
    "negative prompt": {"negative_prompt": "a teddy bear"},
    "negative prompts": {"prompt": ["a dog", "a cat"], "negative_prompt": ["blue", "a bird"]},
    "negative prompt unguided": {"negative_prompt": "blue", "guidance_scale": 0.5},
    "guidance rescale": {"guidance_rescale": 0.7},
    "eta": {"eta": 0.6},
    "latents": {"latents": lambda: torch.randn(1, 4, 16, 16, generator=seeded(4))},
    "embeddings": {"prompt": None, "prompt_embeds": lambda: embeds(2), "negative_prompt_embeds": lambda: -embeds(2)},
    "embeddings, no negative": {"prompt": None, "prompt_embeds": lambda: embeds(1)},
    "short embeddings": {"prompt": None, "prompt_embeds": lambda: embeds(1, 9), "num_images_per_prompt": 2},
    "embeddings unguided": {"prompt": None, "prompt_embeds": lambda: embeds(1), "guidance_scale": 1.0},
    "long prompt": {"prompt": "a dog and a cat " * 30},
    "latent output": {"output_type": "latent"},
    "empty prompt": {"prompt": ""},
}


@pytest.mark.parametrize("case", CASES)
def test_same_as_stable_diffusion(case):
    assert_same(*both_pipelines(), **CASES[case])


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_same_with_clip_skip(clip_skip):
    plain, ours = both_pipelines()
    images = sample(ours, clip_skip=clip_skip).images
    if not hasattr(plain.text_encoder, "text_model"):
        # transformers 5 has no inner model any more, which breaks the plain pipeline's `clip_skip`: lend it one
        plain.text_encoder.__dict__["text_model"] = plain.text_encoder
    assert torch.equal(sample(plain, clip_skip=clip_skip).images, images)
    assert torch.equal(sample(ours).images, images) == (clip_skip == 0)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_same_for_both_layouts_and_predictions(kind, prediction_type):
    scheduler = DDIMScheduler.from_config(tiny_components()["scheduler"].config, prediction_type=prediction_type)
    assert_same(*both_pipelines(kind, scheduler=scheduler), guidance_rescale=0.3)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, LCMScheduler])  # the usual ones: conformance/
def test_same_with_schedulers(scheduler):
    plain, ours = both_pipelines(scheduler=scheduler.from_config(tiny_components()["scheduler"].config))
    assert_same(plain, ours, num_inference_steps=3)


def test_same_with_custom_schedules():
    plain, ours = both_pipelines(scheduler=EulerDiscreteScheduler())
    assert_same(plain, ours, timesteps=[801, 401, 1])
    assert_same(plain, ours, sigmas=[7.0, 2.0, 0.5, 0.0])


def test_old_scheduler_configs_are_treated_alike():
    components = [{"scheduler": DDIMScheduler(steps_offset=0, clip_sample=True)} for _ in range(2)]
    plain, ours = both_pipelines(**components[0])[0], both_pipelines(**components[1])[1]
    assert ours.scheduler.config.steps_offset == 1 and ours.scheduler.config.clip_sample is False
    assert_same(plain, ours)


def test_same_with_callbacks():
    plain, ours = both_pipelines()
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), tuple(tensors), tensors["prompt_embeds"].shape, pipeline.num_timesteps))
        return {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] * 1.1}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    assert_same(plain, ours, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert len(seen) == 4 and seen[:2] == seen[2:]


def test_same_when_a_callback_cuts_guidance_off():
    plain, ours = both_pipelines()
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    assert_same(plain, ours, callback_on_step_end=cutoff, num_inference_steps=3)


def test_same_when_a_callback_interrupts():
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        return tensors

    plain, ours = both_pipelines()
    stopped = assert_same(plain, ours, callback_on_step_end=stop, num_inference_steps=4)
    assert not torch.equal(stopped, sample(ours, num_inference_steps=4).images)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_same_with_ip_adapter_embeddings(guidance_scale):
    plain, ours = both_pipelines()
    add_ip_adapter(ours.unet)
    embeddings = ip_embeds(guidance_scale > 1)
    for count in (1, 2):
        assert_same(
            plain, ours, ip_adapter_image_embeds=embeddings, guidance_scale=guidance_scale, num_images_per_prompt=count
        )


def test_same_with_lora():
    peft = pytest.importorskip("peft")
    plain, ours = both_pipelines()
    without = sample(ours).images
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    ours.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    text_targets = ["q_proj", "v_proj"]
    ours.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=text_targets, init_lora_weights=False))
    assert not torch.equal(assert_same(plain, ours), without)
    halved = assert_same(plain, ours, cross_attention_kwargs={"scale": 0.5})
    assert not torch.equal(halved, sample(ours).images)


def test_same_with_a_distilled_unet():
    config = {**tiny_components()["unet"].config, "time_cond_proj_dim": 9}
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config)
    plain, ours = both_pipelines(unet=unet)
    assert_same(plain, ours, guidance_scale=3.0)


def test_same_with_textual_inversion():
    plain, ours = both_pipelines()
    ours.load_textual_inversion(torch.randn(2, TEXT_WIDTH, generator=seeded(8)), token="<pet>")
    assert_same(plain, ours, prompt="a <pet> on the table")
    found = sample(ours, "a <pet> on the table", objects=[{"phrase": "<pet>"}])
    assert found.objects[0][0].token_indices == (2, 3)  # the second vector was written out


def test_a_placeholder_that_is_written_out_is_encoded_where_it_is_found():
    ours, seen = compose_pipeline(), []
    ours.load_textual_inversion(torch.randn(2, TEXT_WIDTH, generator=seeded(8)), token="<pet>")
    short, written_out = ("a photo of <pet> and a dog", "a photo of <pet> <pet>_1 and a dog")
    objects = [{"phrase": "<pet>"}, {"phrase": "dog"}]
    ours.text_encoder.register_forward_pre_hook(lambda _, ids: seen.append(ids[0][0].tolist()))
    output = sample(ours, written_out, objects=objects)
    wanted = [ours.tokenizer.convert_tokens_to_ids(words) for words in (["<pet>", "<pet>_1"], ["dog</w>"])]
    assert [[seen[0][index] for index in item.token_indices] for item in output.objects[0]] == wanted
    assert torch.equal(output.images, sample(ours, short, objects=objects).images)


def test_half_precision_is_the_same():
    plain, ours = both_pipelines()
    ours.to(dtype=torch.bfloat16)
    images = assert_same(plain, ours)
    assert torch.isfinite(images).all()


def tiny_image_encoder():
    config = CLIPVisionConfig(
        hidden_size=12,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=CLIP_WIDTH,
    )
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(config).eval()


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_same_with_ip_adapter_pictures(guidance_scale):
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    plain, ours = both_pipelines(image_encoder=tiny_image_encoder(), feature_extractor=extractor)
    add_ip_adapter(ours.unet)
    picture = PIL.Image.new("RGB", (20, 16), (200, 90, 10))
    images = assert_same(plain, ours, ip_adapter_image=picture, guidance_scale=guidance_scale)
    ours.set_ip_adapter_scale(0.0)
    weaker = assert_same(plain, ours, ip_adapter_image=picture, guidance_scale=guidance_scale)
    assert not torch.equal(images, weaker)


@pytest.mark.parametrize("is_strict", [False, True])
def test_same_with_a_safety_checker(is_strict):
    vision = {
        "hidden_size": 12,
        "intermediate_size": 17,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=CLIP_WIDTH)).eval()
    checker.concept_embeds_weights.fill_(-2.0 if is_strict else 2.0)  # cosines above it are flagged
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    plain, ours = both_pipelines(safety_checker=checker, feature_extractor=extractor)
    arguments = {"num_images_per_prompt": 2, "output_type": "np"}
    expected, found = sample(plain, **arguments), sample(ours, **arguments)
    assert expected.nsfw_content_detected == found.nsfw_content_detected == [is_strict] * 2
    assert np.array_equal(expected.images, found.images) and (found.images == 0).all() == is_strict
