"""What swaps attention processors behind a pipeline's back is handled, or refused aloud."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor

from objectcompose.errors import PartConflictError
from tests.pipelines.conformance.test_calls import maps_of, plain_call
from tests.pipelines.helpers import add_ip_adapter, ip_embeds


def kinds(unet):
    return {type(processor).__name__ for processor in unet.attn_processors.values()}


def assert_same_method(first, second):
    torch.testing.assert_close(first.images, second.images, atol=1e-4, rtol=0)
    for one, other in zip(maps_of(first), maps_of(second), strict=True):
        for label in one:
            torch.testing.assert_close(one[label], other[label], atol=1e-5, rtol=0)


def test_attention_slicing(row):
    pipeline = row.build()
    expected = row.call(pipeline)
    pipeline.enable_attention_slicing(1)
    assert kinds(pipeline.unet) == {"SlicedAttnProcessor"}
    assert_same_method(row.call(pipeline), expected)
    assert kinds(pipeline.unet) == {"SlicedAttnProcessor"}, "the user's choice was not put back"
    pipeline.disable_attention_slicing()
    assert_same_method(row.call(pipeline), expected)


def test_fused_projections(row):
    plain, pipeline = row.build_both()
    expected = row.call(pipeline)
    pipeline.fuse_qkv_projections()
    assert_same_method(row.call(pipeline), expected)
    assert torch.equal(plain_call(plain), plain_call(pipeline))
    pipeline.unfuse_qkv_projections()
    assert_same_method(row.call(pipeline), expected)


def test_ip_adapter_comes_and_goes(row):
    pipeline = row.build()
    expected = row.call(pipeline)
    add_ip_adapter(pipeline.unet)
    before = dict(pipeline.unet.attn_processors)
    row_arguments = {"ip_adapter_image_embeds": ip_embeds()}
    output = row.call(pipeline, **row_arguments)
    assert torch.isfinite(output.images).all() and not torch.equal(output.images, expected.images)
    assert pipeline.unet.attn_processors == before
    with pytest.raises(ValueError, match="ip_adapter_image"):
        row.call(pipeline)  # loaded, but no picture given
    pipeline.unload_ip_adapter()
    assert_same_method(row.call(pipeline), expected)


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_xformers_is_refused_aloud_where_it_is_missing(row):
    pipeline = row.build()
    with pytest.raises(ModuleNotFoundError, match="xformers"):
        pipeline.enable_xformers_memory_efficient_attention()
    assert torch.isfinite(row.call(pipeline).images).all()


def test_unknown_processors_are_refused_and_stay(row):
    class ForeignProcessor(AttnProcessor2_0):
        pass

    pipeline = row.build()
    pipeline.unet.set_attn_processor(ForeignProcessor())
    assert torch.isfinite(plain_call(pipeline)).all()  # without parts nothing is replaced
    with pytest.raises(PartConflictError, match="ForeignProcessor"):
        row.call(pipeline)
    assert kinds(pipeline.unet) == {"ForeignProcessor"}


def test_a_swap_in_the_middle_of_a_call_is_refused(row):
    plain, pipeline = row.build_both()
    before = dict(pipeline.unet.attn_processors)

    def swap(pipe, step, timestep, tensors):
        pipe.unet.set_attn_processor(SlicedAttnProcessor(1))
        return tensors

    with pytest.raises(PartConflictError, match="SlicedAttnProcessor"):
        row.call(pipeline, callback_on_step_end=swap)
    with_parts = {name for name, processor in pipeline.unet.attn_processors.items() if processor is before[name]}
    assert with_parts, "the layers of the parts were not put back"
    pipeline.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(plain_call(plain), plain_call(pipeline))


def test_lora_on_the_layers_that_parts_act_on(row):
    peft = pytest.importorskip("peft")
    pipeline = row.build()
    expected = row.call(pipeline)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    changed = row.call(pipeline)
    assert not torch.equal(changed.images, expected.images)
    off = row.call(pipeline, cross_attention_kwargs={"scale": 0.0})
    assert_same_method(off, expected)
    pipeline.unet.delete_adapters("default")
    pipeline.unload_lora_weights()
    assert_same_method(row.call(pipeline), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading(row, offload):
    pipeline = row.build()
    expected = row.call(pipeline)
    getattr(pipeline, offload)()
    assert_same_method(row.call(pipeline), expected)
    assert_same_method(row.call(pipeline), expected)


@pytest.mark.gpu
def test_half_precision_on_a_gpu(row):
    pipeline = row.build().to("cuda", torch.float16)
    assert torch.isfinite(row.call(pipeline, 0, 1).images).all()
