"""`objectcompose generate` on a tiny checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from objectcompose.__main__ import main
from objectcompose.layout import Layout, SceneObject, save_layout
from tests.pipelines.helpers import compose_pipeline, sample, seeded


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
    assert generate(checkpoint, out, "--prompt", "a dog", "--seed", "3", "--guidance", "4") == 0
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
    second, alone = (np.asarray(Image.open(tmp_path / name), int) for name in ("out_1.png", "one.png"))
    assert abs(second - alone).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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


def test_broken_checkpoints_are_named(checkpoint, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert generate(tmp_path, tmp_path / "out.png", "--prompt", "a dog") == 2
    assert "--model" in capsys.readouterr().err
