"""Other components than the usual: schedulers, missing ones, other pipelines' and original checkpoints' ones."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import save_file

from tests.pipelines.conformance.original_layout import original_state_dict
from tests.pipelines.conformance.rows import quiet
from tests.pipelines.conformance.test_calls import plain_call
from tests.tiny import tiny_scheduler


SCHEDULERS = {
    "DDIM": (DDIMScheduler, {}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler a": (EulerAncestralDiscreteScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(row, name):
    scheduler_class, options = SCHEDULERS[name]
    scheduler = scheduler_class.from_config(tiny_scheduler().config, **options)
    plain, ours = row.build_both(scheduler=scheduler)
    assert torch.equal(plain_call(plain, num_inference_steps=3), plain_call(ours, num_inference_steps=3))
    output = row.call(ours, num_inference_steps=3)
    assert torch.isfinite(output.images).all()
    assert torch.equal(output.images, row.call(ours, num_inference_steps=3).images), "state of the first call stayed"


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_both_layouts_of_the_unet(row, kind):
    assert torch.isfinite(row.call(row.build(kind), 0, 1).images).all()


def test_save_and_load(row, tmp_path):
    pipeline = row.build()
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = quiet(row.pipeline_class.from_pretrained(tmp_path / "saved"))
    assert torch.equal(row.call(loaded, 0, 1).images, row.call(pipeline, 0, 1).images)
    assert {name for name, part in loaded.components.items() if part is None} == {
        name for name, part in pipeline.components.items() if part is None
    }


def test_components_may_be_left_out_on_loading(row, tmp_path):
    pipeline = row.build()
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(row.pipeline_class.from_pretrained(tmp_path, text_encoder=None, tokenizer=None))
    embeds, negative = pipeline.encode_prompt("a dog", "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(plain_call(loaded, **given), plain_call(pipeline))
    without_own = row.pipeline_class.from_pretrained(tmp_path, **dict.fromkeys(pipeline._optional_components))
    assert torch.equal(plain_call(quiet(without_own)), plain_call(pipeline))


def test_components_that_are_optional_are_declared(row):
    """A component with a default that is not declared optional is not saved, and a reload gets a list for it."""
    defaults = inspect.signature(row.pipeline_class.__init__).parameters
    with_default = {name for name in row.build().components if defaults[name].default is not inspect.Parameter.empty}
    assert with_default == set(row.pipeline_class._optional_components)


def test_loads_a_checkpoint_of_the_plain_pipeline(row, tmp_path):
    plain, ours = row.build_both()
    plain.save_pretrained(tmp_path)
    loaded = quiet(row.pipeline_class.from_pretrained(tmp_path))
    assert torch.equal(plain_call(loaded), plain_call(plain))


def test_from_pipe_both_ways(row):
    plain, ours = row.build_both()
    there = quiet(row.pipeline_class.from_pipe(plain))
    assert there.unet is plain.unet and torch.equal(plain_call(there), plain_call(plain))
    back = quiet(row.plain_class.from_pipe(ours))
    assert torch.equal(plain_call(back), plain_call(plain))
    again = quiet(row.pipeline_class.from_pipe(ours))  # its own components go along
    assert torch.equal(row.call(again).images, row.call(ours).images)


def test_from_pipe_keeps_a_dtype_that_is_asked_for(row):
    plain, _ = row.build_both()
    plain.to(torch.bfloat16)
    assert row.pipeline_class.from_pipe(plain, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_from_single_file(row, tmp_path):
    plain, ours = row.build_both()
    plain.save_pretrained(tmp_path / "config")
    save_file(original_state_dict(ours.unet, ours.vae), tmp_path / "original.safetensors")
    loaded = row.pipeline_class.from_single_file(
        str(tmp_path / "original.safetensors"),
        config=str(tmp_path / "config"),
        text_encoder=ours.text_encoder,
        tokenizer=ours.tokenizer,
        local_files_only=True,
    )
    assert type(loaded) is row.pipeline_class
    assert torch.equal(plain_call(quiet(loaded)), plain_call(ours))


def test_vae_slicing_and_tiling(row):
    pipeline = row.build()
    expected = row.call(pipeline, 0, 1).images
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(row.call(pipeline, 0, 1).images, expected, atol=1e-5, rtol=0)
    pipeline.vae.disable_slicing()
    pipeline.vae.enable_tiling()
    tiled = row.call(pipeline, 0, 1, height=64, width=96).images
    assert tiled.shape == (2, 3, 64, 96) and torch.isfinite(tiled).all()


def test_freeu(row):
    plain, ours = row.build_both()
    base = row.call(ours).images
    ours.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert torch.equal(plain_call(plain), plain_call(ours))
    assert not torch.equal(row.call(ours).images, base)
    ours.disable_freeu()
    assert torch.equal(row.call(ours).images, base)
