"""`objectcompose generate` on a tiny checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor

from objectcompose.__main__ import main
from objectcompose.adapters.base_identity import identify_base
from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.layout import Layout, SceneObject, save_layout
from objectcompose.pipelines.model_arguments import steps_and_guidance
from objectcompose.pipelines.pipeline_locref import LocRefPipeline
from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline
from tests.pipelines.helpers import compose_pipeline, quiet, sample, seeded
from tests.pipelines.object_prompt_helpers import object_picture, prompt_adapter
from tests.tiny import TEXT_WIDTH, tiny_components, tiny_image_encoder, tiny_unet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    compose_pipeline().save_pretrained(folder)
    return folder


def generate(checkpoint, out, *arguments):
    common = ["--model", str(checkpoint), "--steps", "2", "--device", "cpu", "--out", str(out)]
    return main(["generate", *common, *arguments])


def test_prompt_to_png(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "dog.png"
    assert generate(checkpoint, out, "--prompt", "a dog", "--seed", "3", "--guidance-scale", "4") == 0
    assert capsys.readouterr().out.split() == [str(out)]
    expected = sample(
        compose_pipeline(), "a dog", generator=[seeded(3)], guidance_scale=4.0, output_type="pil"
    ).images[0]
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))


def test_layout_with_overlays_and_several_pictures(checkpoint, tmp_path, capsys):
    objects = (SceneObject(phrase="dog", box=(0, 0, 0.5, 1)), SceneObject(phrase="cat"))
    save_layout(Layout("a dog and a cat", objects), tmp_path / "scene.json")
    arguments = ["--layout", str(tmp_path / "scene.json"), "--attention", "--num-images", "2"]
    assert generate(checkpoint, tmp_path / "out.png", *arguments) == 0
    written = sorted(path.name for path in tmp_path.glob("out*.png"))
    names = [f"out_{i}{suffix}.png" for i in range(2) for suffix in ("", "_attention_0", "_attention_1")]
    assert written == sorted(names) and len(capsys.readouterr().out.split()) == 6
    assert generate(checkpoint, tmp_path / "one.png", "--prompt", "a dog and a cat", "--seed", "1") == 0
    # a picture depends on its own seed, not on how many were asked for
    assert (tmp_path / "out_1.png").read_bytes() == (tmp_path / "one.png").read_bytes()


@pytest.mark.slow
def test_processes_share_the_pictures(checkpoint, tmp_path, capsys):
    """Two paint one picture each, a third has nothing to do; files and names are those of one process."""
    arguments = ["--prompt", "a dog and a cat", "--phrase", "dog", "--attention", "--num-images", "2"]
    one, several = tmp_path / "one", tmp_path / "several"
    assert generate(checkpoint, one / "out.png", *arguments) == 0
    names = capsys.readouterr().out.replace(str(one), str(several)).split()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command = ["-m", "objectcompose", "generate", "--model", str(checkpoint), "--steps", "2", "--device", "cpu"]
    done = subprocess.run(
        [*launch, *command, "--out", str(several / "out.png"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.split()) == sorted(names) and len(names) == 4
    ours, theirs = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, several))
    assert ours == theirs and len(ours) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a dog", "--unet", "./nowhere"], "--unet"),
        (["--prompt", "a dog", "--delta", "./nowhere"], "nowhere"),
        (["--prompt", "a dog", "--lora", "./nowhere"], "nowhere"),
        (["--prompt", "a dog", "--instances", "./nowhere"], "embeddings/*.safetensors"),
        (["--prompt", "a dog", "--phrase", "zebra"], "zebra"),
        (["--prompt", "a dog", "--attention"], "--phrase"),
        (["--prompt", "a dog", "--num-images", "0"], "--num-images"),
        (["--prompt", "a dog", "--seed", "-1"], "--seed"),
        (["--prompt", "a dog", "--steps", "0"], "num_inference_steps"),
        (["--prompt", "a dog", "--height", "33"], "height"),
        (["--prompt", "a dog", "--device", "abacus"], "--device"),
        (["--prompt", "a dog", "--out", "picture.jpg"], "--out"),
        (["--layout", "missing.json"], "missing.json"),
        (["--layout", "broken.json"], "broken.json"),
        (["--layout", "box.json"], "box"),
        (["--layout", "box.json", "--phrase", "dog"], "--phrase"),
        (["--prompt", "a dog", "--model", "./nowhere"], "nowhere"),
        (["--prompt", "a dog", "--model", "."], "model_index.json"),
        (["--prompt", "a dog", "--adapter", "owner/adapter"], "`--pipeline` token-compose has no adapter"),
        (["--prompt", "a dog", "--pipeline", "locref", "--adapter", "./nowhere"], "nowhere"),
        (["--prompt", "a dog", "--pipeline", "locref", "--image-encoder", "./nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    box = {"schema_version": 1, "prompt": "a dog", "objects": [{"phrase": "dog", "box": [0.5, 0, 0.2, 1]}]}
    (tmp_path / "box.json").write_text(json.dumps(box))
    assert generate(checkpoint, tmp_path / "out.png", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_what_was_trained_on_top_changes_the_picture(checkpoint, tmp_path):
    """The options that `evaluate` has, too; a delta is what its UNet is."""
    pipeline = compose_pipeline()
    made_for = identify_base(pipeline.unet)
    before = {name: value.detach().clone() for name, value in pipeline.unet.named_parameters()}
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(1.5)
    pipeline.unet.save_pretrained(tmp_path / "weights" / "unet")
    delta = UNetDelta.between(before, dict(pipeline.unet.named_parameters()), made_for, dtype=torch.float32)
    delta.save(tmp_path / DELTA_NAME)
    unet = compose_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), "default")
    layers = get_peft_model_state_dict(unet, adapter_name="default")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, weight_name="lora.safetensors")
    (tmp_path / "learned" / "embeddings").mkdir(parents=True)
    vector = torch.ones(1, TEXT_WIDTH)
    save_file({"<asset0>": vector}, tmp_path / "learned" / "embeddings" / "asset0.safetensors")
    made = {}
    for name, extra in {
        "base": [],
        "unet": ["--unet", str(tmp_path / "weights")],
        "delta": ["--delta", str(tmp_path)],
        "lora": ["--lora", str(tmp_path / "lora.safetensors")],
        "instances": ["--instances", str(tmp_path / "learned")],
        "dtype": ["--dtype", "bfloat16"],
    }.items():
        assert generate(checkpoint, tmp_path / f"{name}.png", "--prompt", "a <asset0>", *extra) == 0
        made[name] = (tmp_path / f"{name}.png").read_bytes()
    assert made.pop("unet") == made["delta"] and len(set(made.values())) == 5


def test_steps_and_guidance_are_the_models():
    given = {"model": None, "steps": None, "guidance_scale": None}
    assert steps_and_guidance(argparse.Namespace(**given)) == (20, 5.0)
    assert steps_and_guidance(argparse.Namespace(**{**given, "model": "owner/model"})) == (50, 7.5)
    assert steps_and_guidance(argparse.Namespace(**{**given, "steps": 3, "guidance_scale": 0.0})) == (3, 0.0)


def test_broken_checkpoints_are_named(checkpoint, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert generate(tmp_path, tmp_path / "out.png", "--prompt", "a dog") == 2
    assert "--model" in capsys.readouterr().err


def test_references_of_a_layout(checkpoint, tmp_path):
    """`--pipeline locref`, with adapter and image encoder from folders of their own."""
    encoder = tiny_image_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    CLIPImageProcessor().save_pretrained(tmp_path / "encoder")
    adapter = LocRefAdapter.from_unet(tiny_unet(), "tester/base", encoder, num_tokens=3)
    adapter.save_pretrained(tmp_path / "adapter")
    objects = (SceneObject(image=Image.new("RGB", (9, 9), "red"), box=(0, 0, 0.5, 1)),)
    save_layout(Layout("a dog", objects), tmp_path / "scene.json")
    parts = ["--adapter", str(tmp_path / "adapter"), "--image-encoder", str(tmp_path / "encoder")]
    arguments = ["--pipeline", "locref", "--layout", str(tmp_path / "scene.json"), "--guidance-scale", "4"]
    assert generate(checkpoint, tmp_path / "out.png", *arguments, *parts) == 0
    pipeline = quiet(LocRefPipeline(**{**tiny_components(), "image_encoder": encoder, "adapter": adapter}))
    call = {"generator": [seeded()], "guidance_scale": 4.0, "output_type": "pil"}
    expected = sample(pipeline, "a dog", objects=objects, **call).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected))


def test_references_without_an_adapter_are_one_line_too(checkpoint, tmp_path, capsys):
    objects = (SceneObject(image=Image.new("RGB", (9, 9), "red"), box=(0, 0, 0.5, 1)),)
    save_layout(Layout("a dog", objects), tmp_path / "scene.json")
    arguments = ["--pipeline", "locref", "--layout", str(tmp_path / "scene.json")]
    assert generate(checkpoint, tmp_path / "out.png", *arguments) == 2
    error = capsys.readouterr().err
    assert "`adapter` is needed" in error and error.count("\n") == 1


def test_pictures_of_objects_on_the_command_line(checkpoint, tmp_path, capsys):
    """`--pipeline object-prompt`, each `--object` a file."""
    encoder = tiny_image_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    CLIPImageProcessor().save_pretrained(tmp_path / "encoder")
    adapter = prompt_adapter(tiny_unet())
    adapter.save_pretrained(tmp_path / "adapter")
    files = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, file in enumerate(files):
        object_picture(seed).save(file)
    parts = [
        "--adapter",
        str(tmp_path / "adapter"),
        "--image-encoder",
        str(tmp_path / "encoder"),
        "--guidance-scale",
        "4",
    ]
    pictures = [word for file in files for word in ("--object", str(file))]
    arguments = ["--pipeline", "object-prompt", "--prompt", "a dog", *pictures, *parts]
    assert generate(checkpoint, tmp_path / "out.png", *arguments) == 0
    pipeline = quiet(ObjectPromptPipeline(**{**tiny_components(), "image_encoder": encoder, "adapter": adapter}))
    objects = [SceneObject(image=file) for file in files]
    call = {"generator": [seeded()], "guidance_scale": 4.0, "output_type": "pil"}
    expected = sample(pipeline, "a dog", objects=objects, **call).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected))
    save_layout(Layout("a dog", ()), tmp_path / "scene.json")
    assert generate(checkpoint, tmp_path / "out.png", "--layout", str(tmp_path / "scene.json"), *pictures) == 2
    assert "`--object` goes with `--prompt`" in capsys.readouterr().err
