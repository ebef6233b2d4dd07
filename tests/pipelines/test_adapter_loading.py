"""The main road: a stock base and an adapter, put together in memory."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from objectcompose.adapters.layer_adapter import LayerAdapter
from objectcompose.errors import CheckpointError, CheckpointFileError
from tests.package.pipeline_layer_branch import LayerBranchPipeline
from tests.pipelines.helpers import quiet, sample
from tests.pipelines.locref_helpers import locref
from tests.tiny import TEXT_WIDTH, tiny_components, tiny_unet


TOKENS = torch.randn(1, 3, TEXT_WIDTH, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A stock base and an adapter for it, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("roads")
    StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False).save_pretrained(folder / "base")
    LayerAdapter.from_unet(tiny_unet(), "owner/base").save_pretrained(folder / "adapter")
    other = tiny_unet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    LayerAdapter.from_unet(other, "owner/other").save_pretrained(folder / "foreign")
    return folder


def paint(pipeline, **arguments):
    return sample(pipeline, image_tokens=TOKENS, **arguments).images


def test_load_and_unload(folders):
    pipeline = quiet(LayerBranchPipeline.from_pretrained(folders / "base"))
    plain = paint(pipeline)
    pipeline.load_adapter(folders / "adapter")
    with_adapter = paint(pipeline)
    assert not torch.equal(with_adapter, plain)
    at_once = LayerBranchPipeline.from_pretrained(
        folders / "base", adapter=LayerAdapter.from_pretrained(folders / "adapter")
    )
    assert torch.equal(paint(quiet(at_once)), with_adapter)
    pipeline.unload_adapter()
    assert pipeline.adapter is None and torch.equal(paint(pipeline), plain)
    pipeline.load_adapter(LayerAdapter.from_pretrained(folders / "adapter"))
    assert torch.equal(paint(pipeline), with_adapter)


def test_it_comes_in_the_bases_dtype(folders):
    pipeline = LayerBranchPipeline.from_pretrained(folders / "base", dtype=torch.bfloat16)
    pipeline.load_adapter(folders / "adapter")
    assert pipeline.adapter.dtype == torch.bfloat16 and torch.isfinite(paint(quiet(pipeline))).all()


def test_an_adapter_for_another_base_is_refused_and_changes_nothing(folders):
    pipeline = LayerBranchPipeline.from_pretrained(folders / "base")
    pipeline.load_adapter(folders / "adapter")
    before = pipeline.adapter
    with pytest.raises(CheckpointError, match="made for owner/other"):
        pipeline.load_adapter(folders / "foreign")
    pipeline.register_to_config(_name_or_path="owner/here")  # as loading by id does
    with pytest.raises(CheckpointError, match="made for owner/other, not for owner/here"):
        pipeline.load_adapter(folders / "foreign")
    with pytest.raises(CheckpointFileError, match="cannot be loaded"):
        pipeline.load_adapter(folders / "nowhere")
    assert pipeline.adapter is before
    with pytest.raises(CheckpointError, match="made for owner/other"):
        LayerBranchPipeline.from_pretrained(
            folders / "base", adapter=LayerAdapter.from_pretrained(folders / "foreign")
        )


@pytest.mark.parametrize("kind", ["LayerAdapter", "int", "NoneType"])
def test_what_is_no_adapter_of_the_method_is_refused(kind):
    pipeline = locref()
    wrong = {"LayerAdapter": LayerAdapter.from_unet(pipeline.unet), "int": 5, "NoneType": None}[kind]
    before = pipeline.adapter
    with pytest.raises(CheckpointError, match="`adapter` must be .*, got (LayerAdapter|int|None)"):
        pipeline.load_adapter(wrong)
    assert pipeline.adapter is before
    if wrong is not None:
        with pytest.raises(CheckpointError, match=f"`adapter` must be a LocRefAdapter, got {kind}"):
            locref(adapter=wrong)


def test_it_is_refused_once_offloading_is_enabled(folders):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipeline = LayerBranchPipeline.from_pretrained(folders / "base")
    add_hook_to_module(pipeline.unet, ModelHook())  # as `enable_model_cpu_offload` does, which wants an accelerator
    with pytest.raises(CheckpointError, match="before offloading"):
        pipeline.load_adapter(folders / "adapter")
    remove_hook_from_module(pipeline.unet)
    pipeline.load_adapter(folders / "adapter")


def test_a_bundled_save_holds_the_adapters_code_too(folders, tmp_path):
    pipeline = LayerBranchPipeline.from_pretrained(folders / "base")
    pipeline.load_adapter(folders / "adapter")
    pipeline.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["adapter"] == ["layer_adapter", "LayerAdapter"]
    assert (tmp_path / "saved/adapter/layer_adapter.py").is_file()
    loaded = quiet(LayerBranchPipeline.from_pretrained(tmp_path / "saved"))
    assert type(loaded.adapter) is LayerAdapter
    assert torch.equal(paint(loaded), paint(quiet(pipeline)))


def test_from_pipe_takes_the_adapter_along(folders):
    pipeline = LayerBranchPipeline.from_pretrained(folders / "base")
    pipeline.load_adapter(folders / "adapter")
    assert LayerBranchPipeline.from_pipe(pipeline).adapter is pipeline.adapter
    assert StableDiffusionPipeline.from_pipe(pipeline).unet is pipeline.unet
