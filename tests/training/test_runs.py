"""The size that training scripts train at, where none is given: the base's own, as pipelines paint it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from objectcompose.errors import ObjectComposeError
from objectcompose.pipelines.pipeline_mifo import MIFOPipeline
from objectcompose.training import (
    learn_mifo,
    train_locref,
    train_object_prompt,
    train_separate_enhance,
    train_token_compose,
)
from objectcompose.training.common import read_log
from objectcompose.training.runs import picture_side
from tests.pipelines.helpers import quiet
from tests.tiny import tiny_components
from tests.training.locref_data import write_base, write_coco


def pipeline(**config):
    found = quiet(MIFOPipeline(**tiny_components()))
    found.unet.register_to_config(**config)
    return found


def test_the_base_says_how_large_its_pictures_are():
    assert picture_side(pipeline()) == 32
    assert picture_side(pipeline(sample_size=(24, 24))) == 48
    assert picture_side(pipeline(_diffusers_version="0.8.0")) == 128  # wrote wrong sizes: 64 cells are meant
    assert picture_side(pipeline(sample_size=None), 40) == 40


@pytest.mark.parametrize(
    ("size", "resolution", "message"),
    [
        ((16, 24), None, "`resolution` is needed.* 32 x 48 pixels"),
        (None, None, "`resolution`.* no `sample_size`"),
        (16, 0, "`resolution` must be"),
        (16, -8, "`resolution` must be"),
    ],
)
def test_sides_that_cannot_be(size, resolution, message):
    with pytest.raises(ObjectComposeError, match=message):
        picture_side(pipeline(sample_size=size), resolution)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A base whose own pictures are 32 pixels high and 48 wide."""
    folder = write_base(tmp_path_factory.mktemp("wide"))
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": [16, 24]}))
    return folder


@pytest.mark.parametrize("script", [learn_mifo, train_locref, train_object_prompt, train_token_compose])
def test_scripts_ask_for_the_side_where_the_base_has_no_square(wide_base, tmp_path, script):
    data = write_coco(tmp_path) if script is train_locref else ["--data", str(tmp_path / "set")]
    with pytest.raises(ObjectComposeError, match="`resolution` is needed"):
        script.main([*data, "--pretrained_model", str(wide_base), "--output_dir", str(tmp_path / "out")])


def test_prompts_alone_are_trained_at_the_size_of_the_base(wide_base, tmp_path):
    arguments = ["--pretrained_model", str(wide_base), "--concepts", "dog", "cup", "--output_dir", str(tmp_path)]
    seen = []

    def see(module, inputs):
        if isinstance(module, UNet2DConditionModel):
            seen.append(inputs[0].shape)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        assert train_separate_enhance.main([*arguments, "--max_train_steps", "1"]) == 0
    finally:
        handle.remove()
    assert {tuple(shape[1:]) for shape in seen} == {(4, 16, 24)}
    assert len(read_log(tmp_path / "log.jsonl")) == 1
