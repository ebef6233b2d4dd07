"""What a call accepts and returns, as users of diffusers expect it, with the method at work."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from objectcompose.errors import CheckpointError
from tests.pipelines.conformance.rows import generators
from tests.pipelines.refusals import watched_models
from tests.tiny import TEXT_WIDTH


def plain_call(pipeline, **arguments):
    """A call that asks for nothing of the method's own."""
    defaults = {
        "prompt": "a dog",
        "num_inference_steps": 2,
        "output_type": "pt",
        "generator": generators(1)[0],
    }
    return pipeline(**{**defaults, **arguments}).images


def maps_of(output):
    assert output.attention is not None, "each row asks for maps"
    return output.attention


def assert_close_outputs(first, second):
    torch.testing.assert_close(first.images, second.images, atol=1e-4, rtol=0)
    for one, other in zip(maps_of(first), maps_of(second), strict=True):
        assert list(one) == list(other)
        for label in one:
            torch.testing.assert_close(one[label], other[label], atol=1e-5, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_off_it_is_the_plain_pipeline_bit_for_bit(row, guidance_scale):
    plain, ours = row.build_both()
    assert torch.equal(
        plain_call(plain, guidance_scale=guidance_scale), plain_call(ours, guidance_scale=guidance_scale)
    )
    row.call(ours)
    assert torch.equal(plain_call(plain), plain_call(ours)), "a call left a trace"
    assert torch.equal(plain_call(plain), plain_call(ours, objects=[]))


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_batch_equals_singles(row, guidance_scale):
    pipeline = row.build()
    together = row.call(pipeline, 0, 1, guidance_scale=guidance_scale)
    for index in range(2):
        alone = row.call(pipeline, index, generator=generators(1, 1 + index), guidance_scale=guidance_scale)
        torch.testing.assert_close(together.images[index], alone.images[0], atol=1e-4, rtol=0)
        for label, found in maps_of(alone)[0].items():
            torch.testing.assert_close(together.attention[index][label], found, atol=1e-5, rtol=0)


def test_num_images_per_prompt_equals_repeated_prompts(row):
    pipeline = row.build()
    repeated = row.call(pipeline, 0, 0, 1, 1)
    assert_close_outputs(row.call(pipeline, 0, 1, num_images_per_prompt=2), repeated)


def test_generators(row):
    pipeline = row.build()
    first = row.call(pipeline, 0, generator=generators(1)[0]).images
    assert torch.equal(first, row.call(pipeline, 0, generator=generators(1)).images)
    assert not torch.equal(first, row.call(pipeline, 0, generator=generators(1, 5)).images)
    one = torch.Generator().manual_seed(4)
    assert row.call(pipeline, 0, 1, generator=one).images.shape[0] == 2


def test_latents_in(row):
    pipeline = row.build()
    latents = torch.cat([torch.randn(1, 4, 16, 16, generator=item) for item in generators(2)])
    given = row.call(pipeline, 0, 1, latents=latents, generator=None)
    assert_close_outputs(given, row.call(pipeline, 0, 1))


def test_latents_out(row):
    pipeline = row.build()
    latents = row.call(pipeline, output_type="latent").images
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    pictures = pipeline.image_processor.postprocess(decoded.detach(), output_type="pt")
    assert torch.equal(pictures, row.call(pipeline).images)


def test_prompt_embeds_in_without_tokenizer(row):
    pipeline = row.build()
    embeds, negative = pipeline.encode_prompt("a dog", "cpu", 1, True, "blue")
    expected = plain_call(pipeline, negative_prompt="blue")
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(plain_call(pipeline, **given), expected)
    without = row.build(tokenizer=None, text_encoder=None)
    assert torch.equal(plain_call(without, **given), expected)
    with pytest.raises(ValueError, match="prompt_embeds"):
        plain_call(without)


def test_output_types_dict_and_tuple(row):
    pipeline = row.build()
    outputs = {kind: row.call(pipeline, 0, 1, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert [type(image) for image in outputs["pil"].images] == [PIL.Image.Image] * 2
    assert outputs["np"].images.shape == (2, 32, 32, 3) and outputs["pt"].images.shape == (2, 3, 32, 32)
    assert outputs["latent"].images.shape == (2, 4, 16, 16)
    np.testing.assert_allclose(outputs["np"].images, outputs["pt"].images.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    rounded = (outputs["np"].images * 255).round().astype(int)
    assert (np.stack([np.asarray(image) for image in outputs["pil"].images]).astype(int) == rounded).all()
    as_tuple = row.call(pipeline, 0, 1, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs["pt"].images)
    assert len(as_tuple) == len(vars(outputs["pt"]))  # absent fields keep their place


def test_negative_prompt_and_guidance(row):
    pipeline = row.build()
    base = row.call(pipeline).images
    assert not torch.equal(base, row.call(pipeline, negative_prompt=["blue"]).images)
    assert not torch.equal(base, row.call(pipeline, guidance_scale=3.0).images)
    unguided = row.call(pipeline, guidance_scale=1.0).images
    assert torch.equal(unguided, row.call(pipeline, guidance_scale=1.0, negative_prompt=["blue"]).images)


def test_guidance_rescale_and_clip_skip(row):
    pipeline = row.build()
    base = row.call(pipeline).images
    for change in ({"guidance_rescale": 0.7}, {"clip_skip": 1}):
        changed = row.call(pipeline, **change).images
        assert torch.isfinite(changed).all() and not torch.equal(base, changed)
    assert torch.equal(base, row.call(pipeline, guidance_rescale=0.0, clip_skip=0).images)


@pytest.mark.parametrize(("height", "width"), [(40, 24), (24, 56), (8, 32)])
def test_sizes_that_halve_to_odd_grids(row, height, width):
    output = row.call(row.build(), 0, 1, height=height, width=width)
    assert output.images.shape == (2, 3, height, width) and torch.isfinite(output.images).all()
    for maps in maps_of(output):
        assert all(torch.isfinite(one).all() and one.max() > 0 for one in maps.values())


def test_odd_sizes_are_refused(row):
    with pytest.raises(ValueError, match="height"):
        row.call(row.build(), height=33)


def test_callback_changes_latents(row):
    pipeline = row.build()

    def blank(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else tensors

    latents = row.call(pipeline, callback_on_step_end=blank, output_type="latent").images
    assert (latents == 0).all()
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        row.call(pipeline, callback_on_step_end=blank, callback_on_step_end_tensor_inputs=["noise"])


def test_callbacks_may_return_nothing_and_ask_for_nothing(row):
    pipeline, seen = row.build(), []
    expected = row.call(pipeline).images

    def look(pipe, step, timestep, tensors):
        seen.append(dict(tensors))

    for names in ((), None):
        options = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
        assert torch.equal(row.call(pipeline, **options).images, expected)
    assert seen == [{}] * 4


def test_pixels_need_a_vae(row):
    pipeline = row.build(vae=None)
    with watched_models(pipeline) as ran, pytest.raises(CheckpointError, match='`vae` is needed .*"latent"'):
        row.call(pipeline)
    assert not ran and row.call(pipeline, output_type="latent", height=32, width=32).images.ndim == 4


def test_callback_sees_each_tensor_that_is_promised(row):
    pipeline, seen = row.build(), []
    names = list(pipeline._callback_tensor_inputs)

    def look(pipe, step, timestep, tensors):
        seen.append({name: tensors[name].shape for name in tensors})
        return tensors

    row.call(pipeline, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert len(seen) == 2 == pipeline.num_timesteps and list(seen[0]) == names
    assert seen[0]["prompt_embeds"][-1] == TEXT_WIDTH


def test_callback_stops_the_loop(row):
    pipeline, forwards = row.build(), []
    handle = pipeline.unet.register_forward_pre_hook(lambda *_: forwards.append(1))

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    row.call(pipeline, callback_on_step_end=stop, num_inference_steps=4)
    after_one_step = len(forwards)
    row.call(pipeline, num_inference_steps=4)
    handle.remove()
    assert len(forwards) - after_one_step == 4 * after_one_step
    assert pipeline.interrupt is False


@pytest.mark.parametrize("step", [0, 1])
def test_an_exception_leaves_no_trace(row, step):
    plain, pipeline = row.build_both()
    before = dict(pipeline.unet.attn_processors)

    def fail(pipe, index, timestep, tensors):
        if index == step:
            raise RuntimeError("on purpose")
        return tensors

    with pytest.raises(RuntimeError, match="on purpose"):
        row.call(pipeline, callback_on_step_end=fail)
    assert pipeline.unet.attn_processors == before
    assert torch.equal(plain_call(plain), plain_call(pipeline))


def test_half_precision_and_back(row):
    pipeline = row.build()
    pipeline.to(torch.bfloat16)
    half = row.call(pipeline).images
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    pipeline.to(torch.float32)
    assert row.call(pipeline).images.dtype == torch.float32
