"""What a run's checkpoints are held to beside its options: steps where the schedule follows them, base, data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from objectcompose.errors import CheckpointError
from objectcompose.toybox.categories import PRESETS
from objectcompose.training import learn_mifo, train_locref, train_separate_enhance
from objectcompose.training.common import Checkpointer, read_log
from objectcompose.training.grounded_captions import GroundedCaptions, read_records
from objectcompose.training.mifo_scene import make_scene, scene_files
from objectcompose.training.reference_samples import ToyboxReferences
from tests.tiny import tiny_components
from tests.training.locref_data import write_coco
from tests.training.test_learn_mifo import arguments as mifo_arguments
from tests.training.test_trainers import write_captions


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture
def scene(tmp_path) -> Path:
    folder = tmp_path / "scene"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "img.png")
    for index in range(2):
        mask = np.zeros((32, 32), np.uint8)
        mask[6:26, 16 * index : 14 + 16 * index] = 255
        Image.fromarray(mask).save(folder / f"mask{index}.png")
    return folder


def learn_keys(base: Path, out: Path, *more: str) -> int:
    """Two steps of the quickest script."""
    arguments = ["--pretrained_model", str(base), "--output_dir", str(out), "--learning_rate", "1e-3"]
    arguments += ["--max_train_steps", "2", *([] if "--concepts_file" in more else ["--concepts", "dog", "cup"])]
    return train_separate_enhance.main([*arguments, *more])


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "cosine", "linear", "polynomial"])
def test_a_run_is_made_longer_where_that_changes_no_step(base, tmp_path, schedule):
    more = ["--lr_scheduler", schedule, "--lr_warmup_steps", "1"]
    assert learn_keys(base, tmp_path, *more) == 0
    if schedule.startswith("constant"):
        assert learn_keys(base, tmp_path, *more, "--max_train_steps", "3") == 0
        assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
    else:
        with pytest.raises(CheckpointError, match="max_train_steps is 2 there and 3 here"):
            learn_keys(base, tmp_path, *more, "--max_train_steps", "3")
        assert learn_keys(base, tmp_path, *more) == 0


def test_another_base_under_the_same_path_is_another_run(base, tmp_path):
    own, out = shutil.copytree(base, tmp_path / "base"), tmp_path / "out"
    assert learn_keys(own, out) == 0
    components = tiny_components()
    for parameter in components["unet"].parameters():
        torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(1))
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(own)
    with pytest.raises(CheckpointError, match="another run: base_digest is"):
        learn_keys(own, out)


def test_other_data_under_the_same_path_are_another_run(base, tmp_path):
    words, out = tmp_path / "words.txt", tmp_path / "out"
    words.write_text("dog\ncup\n")
    assert learn_keys(base, out, "--concepts_file", str(words)) == 0
    words.write_text("dog\ncat\n")
    with pytest.raises(CheckpointError, match="another run: data_digest is"):
        learn_keys(base, out, "--concepts_file", str(words))


def test_grounded_captions_are_named_by_texts_pictures_and_masks(tmp_path):
    root = write_captions(tmp_path)

    def digest() -> str:
        return GroundedCaptions(read_records(root), 32).digest()

    seen = {digest()}
    assert seen == {digest()}
    metadata = next(root.rglob("metadata.jsonl"))
    metadata.write_text(metadata.read_text().replace("on a table", "at a table"))
    seen.add(digest())
    for path in (next(root.rglob("000.png")), next(root.rglob("mask_000_*.png"))):
        with Image.open(path) as picture:
            changed = Image.new(picture.mode, picture.size)
        changed.save(path)
        seen.add(digest())
    assert len(seen) == 4


def test_boxed_pictures_are_named_by_annotations_and_pictures(tmp_path):
    data = write_coco(tmp_path)

    def digest() -> str:
        args = train_locref.create_parser().parse_args(data)
        return train_locref.load_dataset(args, 32).digest()

    seen = {digest()}
    assert seen == {digest()}
    captions = tmp_path / "captions.json"
    captions.write_text(captions.read_text().replace("a corgi", "a dog"))
    seen.add(digest())
    instances = json.loads((tmp_path / "instances.json").read_text())
    instances["annotations"][0]["bbox"][2] += 1
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    seen.add(digest())
    Image.new("RGB", (48, 32)).save(tmp_path / "images" / "0.png")
    seen.add(digest())
    assert len(seen) == 4
    assert ToyboxReferences(PRESETS["cpu"], 3).digest() != ToyboxReferences(PRESETS["gpu"], 3).digest()


def test_scenes_are_named_by_pixels_and_masks(scene):
    def digest() -> str:
        return make_scene(*scene_files(scene), 32).digest()

    seen = {digest()}
    assert seen == {digest()}
    mask = np.array(Image.open(scene / "mask0.png"))
    mask[6] = 0
    Image.fromarray(mask).save(scene / "mask0.png")
    seen.add(digest())
    Image.new("RGB", (32, 32)).save(scene / "img.png")
    seen.add(digest())
    assert len(seen) == 3


def test_stages_of_mifo_are_held_to_scene_and_first_steps(base, scene, tmp_path):
    def begin(*more: str) -> None:
        args = mifo_arguments(base, scene, tmp_path / "out", "--lr_scheduler", "constant", *more)
        learn_mifo.Learning(learn_mifo.create_parser().parse_args(args), args)

    def finish(stage: str, steps: int) -> None:
        Checkpointer(tmp_path / "out" / stage / "checkpoints").save(steps, {"x": torch.ones(1)})

    begin()
    finish("stage1", 8)
    begin("--max_train_steps", "9")  # the first stage may be longer as long as the second has not begun
    finish("stage2", 4)
    begin("--max_train_steps", "9", "--stage2_steps", "5")
    with pytest.raises(CheckpointError, match="stage2 has checkpoints of another run: max_train_steps is 9 there"):
        begin("--max_train_steps", "10")
    with pytest.raises(CheckpointError, match="stage1 has checkpoints of another run: lr_scheduler"):
        begin("--max_train_steps", "9", "--lr_scheduler", "cosine")
    Image.new("RGB", (32, 32)).save(scene / "img.png")
    with pytest.raises(CheckpointError, match="stage1 has checkpoints of another run: data_digest"):
        begin("--max_train_steps", "9")
