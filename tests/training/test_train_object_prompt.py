"""`train_object_prompt` end to end on tiny models: what it leaves, refuses, and does after a kill."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from objectcompose.adapters.object_prompt_adapter import ObjectPromptAdapter
from objectcompose.errors import CheckpointError, LayoutError, ObjectComposeError
from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline
from objectcompose.training import train_object_prompt
from objectcompose.training.common import Checkpointer, read_log
from tests.pipelines.object_prompt_helpers import object_picture, prompt_pipeline
from tests.training.captions_data import write_records
from tests.training.test_trainers import run_until_step


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    prompt_pipeline(adapter=None, dino=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng, samples = np.random.default_rng(0), []
    for number, nouns in enumerate((("dog",), ("dog", "cup"), ("cup", "bird"))):
        picture = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(picture)
        masks = [torch.zeros(32, 32) for _ in nouns]
        for place, mask in enumerate(masks):
            mask[6:24, 15 * place + 1 : 15 * place + 13] = 1
        samples.append((f"{number:03d}", picture, " and ".join(nouns), list(zip(nouns, masks, strict=True))))
    write_records(folder / "set", samples)
    return folder / "set"


def arguments(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    common = ["--pretrained_model", str(base), "--data", str(data), "--output_dir", str(out), "--resolution", "32"]
    common += ["--num_tokens", "3", "--resampler_depth", "1", "--train_batch_size", "2", "--learning_rate", "1e-3"]
    return [*common, "--max_train_steps", "4", "--checkpointing_steps", "2", *more]


def test_the_adapter_that_is_left_loads(base, data, tmp_path, capsys):
    assert train_object_prompt.main(arguments(base, data, tmp_path, "--validation_scenes", "2")) == 0
    assert f"to load it: ObjectPromptAdapter.from_pretrained('{tmp_path / 'weights'}')" in capsys.readouterr().out
    lines = read_log(tmp_path / "log.jsonl")
    assert len(lines) == 4 and {"loss", "objects", "dropped_text", "grad_norm"} <= lines[0].keys()
    adapter = ObjectPromptAdapter.from_pretrained(tmp_path / "weights")
    trained = Checkpointer(tmp_path / "checkpoints").latest()[1]["weights"]
    assert all(torch.equal(weight, trained[name]) for name, weight in adapter.state_dict().items())
    assert "ObjectPrompt adapter" in (tmp_path / "weights" / "README.md").read_text(encoding="utf-8")
    with Image.open(tmp_path / "validation" / "step-000004.png") as sheet:
        assert sheet.size == (4 * 32, 2 * 32)  # scene, painted, two prompts
    pipeline = ObjectPromptPipeline.from_pretrained(base, adapter=adapter)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline("a dog", num_inference_steps=2, output_type="pt", objects=[{"image": object_picture(1)}])
    assert output.images.shape == (1, 3, 32, 32)


def test_only_the_scenes_that_are_shown_are_read_for_validation(tmp_path):
    scenes = ManyScenes()
    assert train_object_prompt.scene_painter(prompt_pipeline(), scenes, 2, tmp_path) is not None
    assert scenes.read == {0, 1, 2}  # the first has no object
    assert train_object_prompt.scene_painter(prompt_pipeline(), scenes, 0, tmp_path) is None


class ManyScenes:
    """A data set that nobody should read whole."""

    def __init__(self) -> None:
        self.read: set[int] = set()
        self.captions = range(5000)

    def count(self, index: int) -> int:
        self.read.add(index)
        return int(index > 0)

    def picture(self, index: int, number: int, view: int) -> Image.Image:
        return object_picture(index)


def test_bad_input_before_any_step(base, data, tmp_path):
    out = tmp_path / "out"
    for more, error, match in (
        (["--key_side_share", "2"], ObjectComposeError, "key_side_share"),
        (["--prompt_views", "0"], ObjectComposeError, "prompt_views"),
        (["--value_init", "zero", "--ip_adapter_plus", "x.safetensors"], ObjectComposeError, "value_init"),
        (["--num_tokens", "0"], ObjectComposeError, "num_tokens"),
        (["--drop_text", "1"], ObjectComposeError, "drop_text"),
        (["--learning_rate", "nan"], ObjectComposeError, "learning_rate"),
        (["--ip_adapter_plus", str(tmp_path / "none.safetensors")], CheckpointError, "none.safetensors"),
        (["--pretrained_model", str(tmp_path / "none")], CheckpointError, "none"),
    ):
        with pytest.raises(error, match=match):
            train_object_prompt.main(arguments(base, data, out, *more))
    with pytest.raises(LayoutError, match=r"metadata\.jsonl"):
        train_object_prompt.main(arguments(base, tmp_path, out))
    with pytest.raises(ObjectComposeError, match="toybox_scenes"):
        train_object_prompt.main(["--toybox_scenes", "0", "--output_dir", str(out)])
    assert not out.exists()


def test_a_folder_of_another_run_is_refused(base, data, tmp_path):
    """Before a step; what decides nothing about a step may change, and the same command goes on."""
    start = arguments(base, data, tmp_path, "--max_train_steps", "2")
    assert train_object_prompt.main(start) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for more in (["--streams", "coarse"], ["--learning_rate", "5e-4"], ["--drop_object", "0.2"], ["--seed", "1"]):
        with pytest.raises(CheckpointError, match=f"another run.*{more[0].removeprefix('--')}"):
            train_object_prompt.main([*start, *more])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert train_object_prompt.main([*start, "--max_train_steps", "3", "--checkpointing_steps", "1"]) == 0
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_a_base_without_image_encoder_is_refused(data, tmp_path):
    folder = tmp_path / "plain"
    prompt_pipeline(adapter=None, dino=None, image_encoder=None).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="image_encoder"):
        train_object_prompt.main(arguments(folder, data, tmp_path / "out"))


def test_pictures_without_any_object_are_refused(base, tmp_path):
    picture = tmp_path / "0.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    write_records(tmp_path / "set", [("000", picture, "a dog", [("dog", torch.ones(32, 32))])])
    with pytest.raises(LayoutError, match="cut out"):
        train_object_prompt.main(arguments(base, tmp_path / "set", tmp_path / "out"))


def test_pictures_without_an_object_are_left_out_and_cut_captions_told(base, tmp_path, caplog):
    """Each once; no sample is trained on the null picture in place of objects."""
    picture, mask = tmp_path / "0.png", torch.zeros(32, 32)
    Image.new("RGB", (32, 32), "red").save(picture)
    mask[6:24, 6:24] = 1
    captions = ("a dog", "a dog", "a dog " * 40, "a dog " * 40)
    nouns = ([("dog", mask)], [("dog", torch.ones(32, 32))], [("dog", mask)], [("dog", None)])
    samples = [(f"{one:03d}", picture, captions[one], nouns[one]) for one in range(4)]
    write_records(tmp_path / "set", samples)
    out = tmp_path / "out"
    drops = [word for name in ("image", "text", "both", "object") for word in (f"--drop_{name}", "0")]
    assert train_object_prompt.main(arguments(base, tmp_path / "set", out, *drops)) == 0
    assert [line["objects"] for line in read_log(out / "log.jsonl")] == [1.0] * 4
    told = [record.getMessage() for record in caplog.records if record.name.startswith("objectcompose")]
    assert len(told) == 2 and told[0].startswith("2 of 4 pictures are left out")
    assert told[1].startswith("1 of 2 captions have more than the 77 tokens")
    assert "2 scenes from set" in (out / "weights" / "README.md").read_text(encoding="utf-8")


def test_values_from_zero_start_as_the_base(base):
    """And learn: their gradient is not 0."""
    args = train_object_prompt.create_parser().parse_args(["--toybox_scenes", "1", "--value_init", "zero"])
    pipeline = ObjectPromptPipeline.from_pretrained(base)
    pipeline.register_modules(adapter=train_object_prompt.make_adapter(args, pipeline))
    pipeline.set_progress_bar_config(disable=True)

    def paint(**more):
        generator = torch.Generator().manual_seed(0)
        return pipeline("a dog", num_inference_steps=2, output_type="pt", generator=generator, **more).images

    assert torch.allclose(paint(objects=[{"image": object_picture(1)}]), paint(), atol=1e-5)
    embeds, grid = torch.randn(1, 1, 13), torch.randn(1, 1, 10, 10)
    key, value = pipeline.adapter(embeds, grid)["mid_block.attentions.0.transformer_blocks.0.attn2"]
    value.sum().backward()
    name = "mid_block-attentions-0-transformer_blocks-0-attn2"
    assert key.any() and not value.any() and pipeline.adapter.projections.value_maps[name].weight.grad.any()


@pytest.mark.slow
def test_killed_and_resumed_equals_unbroken(base, data, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-P", "-m", "objectcompose.training.train_object_prompt"]
    more = ["--max_train_steps", "20", "--ema_decay", "0.9", "--cache_dir", str(tmp_path / "cache")]
    for out in ("unbroken", "killed"):
        command = [*script, *arguments(base, data, tmp_path / out, *more)]
        if out == "killed":
            step = random.randrange(1, 15)
            print(f"killed at step {step}")
            run_until_step(command, tmp_path / out, step, environment)
            assert max(Checkpointer(tmp_path / out / "checkpoints").steps(), default=0) < 20
        subprocess.run(command, check=True, env=environment, capture_output=True)
    first, second = (Checkpointer(tmp_path / out / "checkpoints").latest() for out in ("unbroken", "killed"))
    assert first[0] == second[0] == 20
    assert all(torch.equal(first[1]["weights"][name], second[1]["weights"][name]) for name in first[1]["weights"])
    assert [line["step"] for line in read_log(tmp_path / "killed" / "log.jsonl")] == list(range(1, 21))
    weights = [
        load_file(tmp_path / out / "weights/diffusion_pytorch_model.safetensors") for out in ("unbroken", "killed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_warm_start_trains_keys_first(base, data, tmp_path):
    """From weights in IP-Adapter-Plus' form; the value side is theirs until the first tenth is over."""
    pipeline = ObjectPromptPipeline.from_pretrained(base)
    adapter = ObjectPromptAdapter.from_unet(
        pipeline.unet, image_encoder=pipeline.image_encoder, num_tokens=3, resampler_depth=1
    )
    tensors = {f"image_proj.{name}": weight for name, weight in adapter.appearance_adapter.state_dict().items()}
    layers = [name.removesuffix(".processor") for name in pipeline.unet.attn_processors]
    cross = [name for name in layers if name.endswith("attn2")]
    for place, name in enumerate(cross):
        for theirs, maps in (("to_k_ip", "key_maps"), ("to_v_ip", "value_maps")):
            weight = getattr(adapter.projections, maps)[name.replace(".", "-")].weight
            tensors[f"ip_adapter.{2 * place + 1}.{theirs}.weight"] = torch.randn_like(weight)
    path = tmp_path / "plus.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    more = ["--ip_adapter_plus", str(path), "--key_side_share", "0.5", "--checkpointing_steps", "1"]
    train_object_prompt.main(arguments(base, data, tmp_path / "out", *more, "--max_train_steps", "2"))
    first = load_file(tmp_path / "out/checkpoints/step-00000001/weights.safetensors")
    last = load_file(tmp_path / "out/checkpoints/step-00000002/weights.safetensors")
    name = cross[0].replace(".", "-")
    assert torch.equal(first[f"projections.value_maps.{name}.weight"], tensors["ip_adapter.1.to_v_ip.weight"])
    assert not torch.equal(first[f"projections.key_maps.{name}.weight"], tensors["ip_adapter.1.to_k_ip.weight"])
    assert torch.equal(first["appearance_adapter.latents"], tensors["image_proj.latents"])
    assert not torch.equal(last[f"projections.value_maps.{name}.weight"], tensors["ip_adapter.1.to_v_ip.weight"])
    with pytest.raises(
        CheckpointError, match="key_side_steps is 1 there and 2 here"
    ):  # values would stand still again
        train_object_prompt.main(arguments(base, data, tmp_path / "out", *more, "--max_train_steps", "4"))
