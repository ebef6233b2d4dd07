"""The example scripts, each as a user runs it, with fewer steps."""

from __future__ import annotations

from importlib import import_module

import pytest
from PIL import Image

from objectcompose.toybox.weights import toybox_path


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["token_compose", "locref", "object_prompt", "mifo", "stacking"])
def test_example_paints(name, tmp_path, capsys):
    example = import_module(f"objectcompose.examples.{name}")
    out = tmp_path / "picture.png"
    assert example.main(["--steps", "4", "--out", str(out)]) == 0
    assert Image.open(out).convert("L").getextrema() != (0, 0)
    assert str(out) in capsys.readouterr().out


def test_stock_checkpoints(tmp_path):
    """With toybox in Stable Diffusion's place: a folder in its layout."""
    example = import_module("objectcompose.examples.stable_diffusion")
    out = tmp_path / "picture.png"
    assert example.main(["--model", str(toybox_path("base")), "--steps", "2", "--out", str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "picture.png", "picture_attention_0.png", "picture_attention_1.png",
    ]  # fmt: skip


def test_training_in_five_minutes(tmp_path):
    example = import_module("objectcompose.examples.train_in_five_minutes")
    assert example.main(["--steps", "2", "--scenes", "32", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "gallery.png").is_file() and (tmp_path / "weights" / "unet_delta.safetensors").is_file()
    assert example.main(["--steps", "2", "--scenes", "32", "--out", str(tmp_path)]) == 0  # goes on where it stopped
