"""ObjectPromptPipeline: object pictures as prompts, and the two stages of compositional guidance."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from objectcompose.attention_processors.mask import KeyMask
from objectcompose.errors import (
    CheckpointError,
    ImageInputError,
    LayoutError,
    MissingFieldError,
    ObjectComposeError,
    PhraseNotFoundError,
)
from objectcompose.layout import SceneObject
from tests.pipelines.object_prompt_helpers import (
    PROMPT,
    HalvesSegmenter,
    close,
    guided,
    object_picture,
    plain_images,
    prompt_adapter,
    prompt_pipeline,
    sample,
    two_objects,
)
from tests.pipelines.refusals import MODELS, refused, watched_models
from tests.tiny import tiny_image_encoder, tiny_scheduler, tiny_tiny_vae, tiny_unet


# ---- one run


def test_objects_change_the_picture_and_strength_zero_does_not():
    pipeline = prompt_pipeline()
    expected = plain_images(pipeline)
    assert not close(sample(pipeline).images, expected, 1e-3)
    off = [{**one, "scale": 0.0} for one in two_objects()]
    output = sample(pipeline, objects=off)
    assert torch.equal(output.images, expected) and len(output.objects[0]) == 2
    assert not close(sample(pipeline, objects=off, background=object_picture(8)).images, expected, 1e-3)
    assert torch.equal(sample(pipeline, objects=None).images, expected)
    pipeline.unload_adapter()
    assert torch.equal(sample(pipeline, objects=None).images, expected)


@pytest.mark.parametrize("run", [sample, guided])
def test_scale_0_is_an_object_that_is_not_there(run):
    pipeline = prompt_pipeline()
    dog, cup = two_objects()
    off = {**dog, "scale": 0.0}
    output = run(pipeline, objects=[off, cup])
    assert torch.equal(output.images, run(pipeline, objects=[cup]).images)
    assert [item.phrase for item in output.objects[0]] == ["dog", "cup"] and output.objects[0][0].matched is None
    assert output.objects[0][1].matched == (True if run is guided else None)
    seeds = [[torch.Generator().manual_seed(seed) for seed in range(2)] for _ in range(2)]
    both = run(pipeline, prompt=[PROMPT] * 2, objects=[[off], [cup, off]], generator=seeds[0])
    expected = run(pipeline, prompt=[PROMPT] * 2, objects=[[], [cup]], generator=seeds[1])
    assert torch.equal(both.images, expected.images)
    assert close(both.images[:1], plain_images(pipeline)), "a prompt without objects is the plain pipeline's"


def test_what_is_kept_between_calls_goes_with_the_models():
    pipeline = prompt_pipeline()
    expected = sample(pipeline).images
    assert all(pipeline._caches.values())
    weight = weakref.ref(next(pipeline.image_encoder.parameters()))
    pipeline.to(torch.float64)  # moves all weights to other memory, as another device does
    assert not any(pipeline._caches.values())
    assert torch.equal(sample(pipeline.to(torch.float32)).images, expected)
    pipeline.register_modules(image_encoder=None)
    gc.collect()
    assert weight() is None and not pipeline._caches["tokens"] and not pipeline._caches["null"]


def test_order_of_objects_is_nothing():
    pipeline = prompt_pipeline()
    first, second = (sample(pipeline, objects=two_objects()[::step]).images for step in (1, -1))
    assert close(first, second)


@pytest.mark.slow
def test_every_object_and_its_strength_matter():
    pipeline = prompt_pipeline()
    base = sample(pipeline).images
    dog, cup = two_objects()
    for objects in (
        [dog],
        [dog, {**cup, "scale": 0.5}],
        [dog, {**cup, "image": object_picture(9)}],
        [*two_objects(), {"image": object_picture(4)}],
    ):
        assert not close(sample(pipeline, objects=objects).images, base, 1e-4)


def test_copies_of_the_null_object_act_as_one():
    """In the unconditional row, whatever the number of slots, attention to null objects gives one result."""
    pipeline = prompt_pipeline().to(torch.float64)
    objects = [SceneObject(image=object_picture(seed)) for seed in range(3)]
    with torch.no_grad():
        one, three = (pipeline.prompt_branch([objects[:count]], [None], 1) for count in (1, 3))
        outputs = []
        for branch in (one, three):
            name = branch.part.layers[0]
            key, value = (states[:1] for states in branch.part.keys_values[name])  # the unconditional row
            query = torch.randn(1, 6, key.shape[-1], dtype=key.dtype, generator=torch.Generator().manual_seed(0))
            outputs.append(torch.nn.functional.scaled_dot_product_attention(query, key, value))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_batches_with_other_numbers_of_objects_equal_singles():
    pipeline = prompt_pipeline()
    rows = [two_objects(), [{"image": object_picture(5), "scale": 0.7}]]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
    together = sample(
        pipeline, prompt=[PROMPT] * 2, objects=rows, generator=seeds, background=[None, object_picture(8)]
    )
    for index, row in enumerate(rows):
        background = object_picture(8) if index else None
        alone = sample(pipeline, index, objects=row, background=background)
        assert close(together.images[index : index + 1], alone.images, 1e-4)


def test_a_background_is_one_more_prompt_and_squashed_whole():
    pipeline = prompt_pipeline()
    base = sample(pipeline).images
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (0, 0, 20, 20))
    seen = sample(pipeline, background=wide).images
    assert not close(seen, base, 1e-4)
    assert close(seen, sample(pipeline, background=wide.resize((24, 24), Image.BICUBIC)).images, 2e-2)
    as_object = sample(pipeline, objects=[*two_objects(), {"image": wide}]).images
    assert not close(seen, as_object, 1e-4), "an object is framed, not squashed"


def test_features_keys_and_values_are_computed_once():
    pipeline = prompt_pipeline()
    runs = {"encoder": 0, "keys": 0}
    name = "mid_block-attentions-0-transformer_blocks-0-attn2"
    for label, module in (("encoder", pipeline.image_encoder), ("keys", pipeline.adapter.projections.key_maps[name])):
        module.register_forward_hook(lambda *_, label=label: runs.update({label: runs[label] + 1}))
    first = sample(pipeline).images
    assert runs == {"encoder": 2, "keys": 2}, "objects and the null object, once each"
    assert torch.equal(sample(pipeline).images, first) and runs == {"encoder": 2, "keys": 2}
    sample(pipeline, objects=two_objects()[:1])
    assert runs == {"encoder": 3, "keys": 3}
    with torch.no_grad():
        pipeline.adapter.projections.key_maps[name].weight.mul_(-1)
    assert not close(sample(pipeline, objects=two_objects()[:1]).images, first, 1e-4) and runs["keys"] == 5


def test_guidance_may_be_switched_off_in_the_loop():
    """As diffusers' cut-off callback does: from then on the batch is the conditional half."""
    pipeline = prompt_pipeline()

    def cut_off(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    options = {"callback_on_step_end": cut_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    images = sample(pipeline, objects=[*two_objects(), {"image": object_picture(3), "scale": 0.2}], **options).images
    assert torch.isfinite(images).all() and not close(images, sample(pipeline).images, 1e-4)


def test_without_phrases_and_with_embeddings():
    pipeline = prompt_pipeline()
    objects = [{"image": one["image"]} for one in two_objects()]
    expected = sample(pipeline, objects=objects)
    assert [item.phrase for item in expected.objects[0]] == [None, None]
    embeds, negative = pipeline.encode_prompt(PROMPT, "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(sample(pipeline, objects=objects, **given).images, expected.images)


def test_maps_of_phrases_and_fields_that_go_unused(caplog):
    pipeline = prompt_pipeline()
    objects = [{**two_objects()[0], "box": (0, 0, 0.5, 0.5)}, {"image": object_picture(2), "order": 1}]
    output = sample(pipeline, objects=objects, return_attention=True)
    assert list(output.attention[0]) == ["dog"] and output.attention[0]["dog"].max() > 0
    assert [item.unused for item in output.objects[0]] == [("box",), ("order",)]
    assert [item.matched for item in output.objects[0]] == [None, None]


# ---- bad input, refused before any model runs


def test_what_the_refusals_watch_is_every_model():
    pipeline = prompt_pipeline(tiny_vae=tiny_tiny_vae())
    with watched_models(pipeline) as ran:
        guided(pipeline)
    assert ran == set(MODELS)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"objects": [{"image": object_picture(0)}] * 7}, LayoutError, "at most 6 objects per prompt, got 7"),
        ({"objects": [{"phrase": "dog"}]}, MissingFieldError, "ObjectPromptPipeline needs `image`"),
        ({"objects": [{"image": "no/such.png"}]}, ImageInputError, "no/such.png"),
        ({"objects": [{"image": object_picture(0), "phrase": "dragon"}]}, PhraseNotFoundError, "dragon"),
        ({"objects": [{"image": Image.new("RGBA", (9, 9))}]}, ImageInputError, "alpha channel that is 0"),
        ({"background": "no/such.png"}, ImageInputError, "`background`"),
        ({"background": Image.new("RGBA", (9, 9))}, ImageInputError, "`background`.* alpha channel that is 0"),
        ({"background": [None, None]}, LayoutError, "`background` must hold one picture .* 1 prompts, got 2"),
        ({"objects": None, "background": object_picture(0)}, MissingFieldError, "`background` needs `objects`"),
        ({"objects": [], "background": object_picture(0)}, MissingFieldError, "`background` needs `objects`"),
        ({"objects": None, "compositional_guidance": True}, MissingFieldError, "`compositional_guidance` needs"),
        ({"mode": "fast"}, ObjectComposeError, "`mode` needs `compositional_guidance=True`"),
        ({"segmenter": HalvesSegmenter()}, ObjectComposeError, "`segmenter` needs `compositional_guidance=True`"),
    ],
)
def test_bad_objects(change, error, words):
    refused(sample, prompt_pipeline(tiny_vae=tiny_tiny_vae()), error, words, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segmenter": None}, "`segmenter` is needed"),
        ({"segmenter": object()}, "`segmenter` needs a method"),
        ({"mode": "slow"}, "`mode` must be one of exact, fast, got 'slow'"),
        ({"similarity_threshold": float("nan")}, "`similarity_threshold` must be finite"),
        ({"refinement_steps": -1}, "`refinement_steps` must be a whole number"),
        ({"num_restarts": 0.5}, "`num_restarts` must be a whole number"),
        ({"num_restarts": 1, "latents": torch.randn(1, 4, 16, 16)}, "cannot be used with `latents`"),
        ({"num_restarts": 1, "num_images_per_prompt": 2}, "needs a list of `generator`s"),
        ({"objects": [{"image": object_picture(1), "scale": 0.0}]}, "an object with a `scale` above 0"),
        ({"parts": [KeyMask(torch.ones(77), rows=slice(1, 2))]}, r"`parts\[0\]` names batch rows"),
    ],
)
def test_bad_guidance(change, words):
    refused(guided, prompt_pipeline(tiny_vae=tiny_tiny_vae()), ObjectComposeError, words, **change)


def test_bad_components():
    refused(sample, prompt_pipeline(adapter=None), CheckpointError, "`adapter` is needed.*load_adapter")
    refused(sample, prompt_pipeline(image_encoder=None), CheckpointError, "`image_encoder` is needed")
    refused(guided, prompt_pipeline(dino=None), CheckpointError, "`dino` is needed")
    words = "`vae` is needed for `compositional_guidance=True`"
    refused(guided, prompt_pipeline(vae=None), CheckpointError, words, output_type="latent")
    finer = AutoencoderTiny(num_encoder_blocks=(1,), num_decoder_blocks=(1,), encoder_block_out_channels=(8,),
                            decoder_block_out_channels=(8,))  # fmt: skip
    words = "`vae` is needed for `output_type` 'pt', got None"
    refused(sample, prompt_pipeline(vae=None), CheckpointError, words)
    words = r"`tiny_vae` .* 4 channels, 2 pixels per cell, got \(4, 1\)"
    refused(guided, prompt_pipeline(tiny_vae=finer), CheckpointError, words)
    config = tiny_image_encoder().config
    wider = type(config)(**{**config.to_dict(), "projection_dim": 17})
    pipeline = prompt_pipeline(image_encoder=CLIPVisionModelWithProjection(wider))
    refused(
        sample, pipeline, CheckpointError, "'projection_dim': 13.*that `adapter` reads, got .*'projection_dim': 17"
    )
    torch.manual_seed(7)
    other = tiny_unet()
    for weight in other.parameters():
        torch.nn.init.normal_(weight)
    with pytest.raises(CheckpointError, match="`adapter` was made for"):
        prompt_pipeline(adapter=prompt_adapter(other))


def test_refinement_refuses_what_has_no_gradients():
    pipeline = prompt_pipeline()
    with torch.inference_mode():
        refused(guided, pipeline, ObjectComposeError, "inference mode")
    with torch.inference_mode():
        assert torch.isfinite(guided(pipeline, refinement_steps=0).images).all()
    flow = DDIMScheduler.from_config(tiny_scheduler().config)
    flow.register_to_config(prediction_type="flow")
    refused(guided, prompt_pipeline(scheduler=flow), ObjectComposeError, "must predict one of")
