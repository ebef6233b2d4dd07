"""`learn_mifo` end to end on tiny models: both stages, what they move and leave, resume, refusals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor

from benchmarks.measure import measuring_unet
from objectcompose.errors import (
    CheckpointError,
    LayoutError,
    ObjectComposeError,
    ObjectNotFoundError,
    PhraseNotFoundError,
    PromptTooLongError,
)
from objectcompose.pipelines.learned_instances import load_instances
from objectcompose.pipelines.pipeline_mifo import MIFOPipeline
from objectcompose.toybox.weights import toybox_path
from objectcompose.training import learn_mifo
from objectcompose.training.common import Checkpointer, read_log
from objectcompose.training.export import loading_line
from tests.pipelines.helpers import quiet
from tests.tiny import TEXT_WIDTH, tiny_components
from tests.training.look_alikes import mask_overlap, two_bears


SIZE = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    values = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE + 8, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / "img.png")
    for index in range(2):
        mask = np.zeros((SIZE, SIZE + 8), np.uint8)
        mask[6:26, 4 + 18 * index : 18 + 18 * index] = 255
        Image.fromarray(mask).save(folder / f"mask{index}.png")
    return folder


def arguments(base, scene, out, *more):
    common = ["--pretrained_model", str(base), "--data", str(scene), "--output_dir", str(out)]
    common += ["--max_train_steps", "8", "--lr_warmup_steps", "2", "--reward_steps", "3"]
    common += ["--checkpointing_steps", "2", "--validation_steps", "4", "--class_pictures", "2"]
    common += ["--class_steps", "2", "--stage2_steps", "4", "--stage2_learning_rate", "1e-3"]
    return [*common, *more]


def embeddings(out):
    return {path.stem: load_file(path) for path in sorted((out / "embeddings").glob("*.safetensors"))}


def vocabulary(pipeline):
    return pipeline.text_encoder.get_input_embeddings().weight.detach()


@pytest.fixture(scope="module")
def learned(base, scene, tmp_path_factory):
    """A run of both stages that trains the whole model."""
    out = tmp_path_factory.mktemp("learned")
    assert learn_mifo.main(arguments(base, scene, out, "--vectors", "2", "--gradient_checkpointing")) == 0
    return out


@pytest.mark.slow
def test_both_stages_leave_embeddings_and_a_pipeline(learned, base):
    lines = read_log(learned / "stage1" / "log.jsonl")
    assert len(lines) == 8 and {"loss", "reconstruction", "attention", "inside"} <= lines[0].keys()
    assert lines[-1]["learning_rate"] == pytest.approx(0, abs=1e-9) and lines[3]["learning_rate"] > 0
    assert "prior" in read_log(learned / "stage2" / "log.jsonl")[0]
    assert len(list((learned / "class_pictures").glob("*/*.png"))) == 2
    for stage in ("stage1", "stage2"):
        assert (learned / stage / "validation" / "step-000004.png").is_file()
    assert (learned / "embeddings" / "README.md").is_file() and (learned / "weights" / "README.md").is_file()

    assert loading_line(learned / "weights") == f"MIFOPipeline.from_pretrained('{learned / 'weights'}')"
    with pytest.raises(CheckpointError, match="whole fine-tuned pipeline"):
        load_instances(quiet(MIFOPipeline.from_pretrained(base)), learned)
    whole = quiet(MIFOPipeline.from_pretrained(learned / "weights"))
    assert load_instances(whole, learned) == ["<asset0>", "<asset1>"]
    found = embeddings(learned)
    before = StableDiffusionPipeline.from_pretrained(base)
    rows = vocabulary(whole)
    assert torch.equal(rows[: len(vocabulary(before))], vocabulary(before))  # words keep their embeddings
    assert torch.equal(rows[-4:], torch.cat([found["asset0"]["<asset0>"], found["asset1"]["<asset1>"]]))
    for model in ("unet", "text_encoder"):
        pairs = zip(getattr(whole, model).parameters(), getattr(before, model).parameters(), strict=True)
        assert any(new.shape == old.shape and not torch.equal(new, old) for new, old in pairs)
    objects = [
        {"token": "<asset0>", "box": (0.0, 0.1, 0.5, 0.9)},
        {"token": "<asset1>", "box": (0.5, 0.1, 1.0, 0.9)},
        {"phrase": "table", "box": (0.1, 0.8, 0.9, 1.0)},
    ]
    output = whole("a photo of <asset0> and <asset1> on a table", objects=objects, num_inference_steps=2)
    assert [len(item.token_indices) for item in output.objects[0]] == [2, 2, 1]


@pytest.mark.slow
def test_the_first_stage_moves_the_placeholders_only(base, scene, tmp_path, capsys):
    learn_mifo.main(arguments(base, scene, tmp_path, "--stage2_steps", "0", "--names", "<cup>", "<mug>"))
    assert capsys.readouterr().out.endswith(f"to load them: load_instances(pipe, '{tmp_path}')\n")
    found = embeddings(tmp_path)
    assert list(found) == ["cup", "mug"] and not (tmp_path / "weights").exists()
    start = Checkpointer(tmp_path / "stage1" / "checkpoints")
    assert start.steps() == [6, 8] and list(start.latest()[1]["weights"]) == ["placeholders"]
    plain = quiet(MIFOPipeline.from_pretrained(base))
    before = vocabulary(plain).clone()
    for name in found:
        plain.load_textual_inversion(tmp_path / "embeddings", weight_name=f"{name}.safetensors")
    assert torch.equal(vocabulary(plain)[: len(before)], before)
    assert not torch.equal(found["cup"]["<cup>"], found["mug"]["<mug>"])
    output = plain("a <mug>", objects=[{"token": "<mug>", "box": (0, 0, 0.5, 1)}], num_inference_steps=2)
    assert output.objects[0][0].token_indices == (2,)


@pytest.mark.slow
def test_lora_loads_beside_the_embeddings(base, scene, tmp_path):
    pytest.importorskip("peft")
    more = ["--train_modules", "lora", "--lora_rank", "2", "--prior_weight", "0", "--attention_loss", "penalty"]
    learn_mifo.main(arguments(base, scene, tmp_path, *more))
    assert not (tmp_path / "class_pictures").exists()
    pipeline = quiet(MIFOPipeline.from_pretrained(base))
    for name in embeddings(tmp_path):
        pipeline.load_textual_inversion(tmp_path / "embeddings", weight_name=f"{name}.safetensors")
    call = {"num_inference_steps": 2, "output_type": "pt"}
    without = pipeline("<asset0>", generator=torch.Generator().manual_seed(0), **call).images
    pipeline.load_lora_weights(tmp_path / "weights")
    with_lora = pipeline("<asset0>", generator=torch.Generator().manual_seed(0), **call).images
    assert not torch.equal(with_lora, without)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_killed_and_resumed_equals_unbroken(base, scene, learned, tmp_path, stage):
    more = ["--vectors", "2", "--gradient_checkpointing"]
    command = [
        sys.executable,
        "-P",
        "-m",
        "objectcompose.training.learn_mifo",
        *arguments(base, scene, tmp_path, *more),
    ]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = tmp_path / stage / "log.jsonl"
    try:
        for _ in range(1200):
            if log.is_file() and len(read_log(log)) >= 3:
                break
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert learn_mifo.main(arguments(base, scene, tmp_path, *more)) == 0
    first, second = embeddings(learned), embeddings(tmp_path)
    assert all(torch.equal(first[name][f"<{name}>"], second[name][f"<{name}>"]) for name in ("asset0", "asset1"))
    for model in ("unet", "text_encoder"):
        file = next((learned / "weights" / model).glob("*.safetensors"))
        one, other = load_file(file), load_file(tmp_path / "weights" / model / file.name)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(base, scene, learned, tmp_path):
    """Each stage is held to what it depends on; how long it is may change."""
    out = tmp_path / "out"
    shutil.copytree(learned, out)
    same = ["--vectors", "2", "--gradient_checkpointing"]
    for other, stage in ((["--reward_weight", "1"], "stage1"), (["--prior_weight", "0.5"], "stage2")):
        with pytest.raises(CheckpointError, match=f"{stage} has checkpoints of another run: {other[0][2:]}"):
            learn_mifo.main(arguments(base, scene, out, *same, *other))
    assert learn_mifo.main(arguments(base, scene, out, *same, "--stage2_steps", "5")) == 0
    assert [line["step"] for line in read_log(out / "stage2" / "log.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["attention", "all"])
def test_lora_on_further_layers_loads_as_it_was_trained(base, scene, tmp_path, layers):
    pytest.importorskip("peft")
    more = ["--train_modules", "lora", "--lora_layers", layers, "--lora_rank", "2", "--prior_weight", "0"]
    learn_mifo.main(arguments(base, scene, tmp_path, *more, "--validation_steps", "100"))
    weights = load_file(tmp_path / "weights" / "pytorch_lora_weights.safetensors")
    assert any(".attn1." in name for name in weights)
    assert any(".resnets." in name for name in weights) == (layers == "all")
    pipeline = quiet(MIFOPipeline.from_pretrained(base))
    assert load_instances(pipeline, tmp_path) == ["<asset0>", "<asset1>"]
    loaded = {
        name: weight for name, weight in pipeline.unet.named_parameters() if "lora_A" in name or "lora_B" in name
    }
    assert len(loaded) == len(weights) and all(weight.abs().sum() > 0 for weight in loaded.values())


@pytest.mark.slow
def test_a_photograph_with_masks_from_phrases(tmp_path):
    """A portrait in the public domain, segmented by toybox's CLIPSeg, on the layout of Stable Diffusion 2."""
    photo = Path(pytest.importorskip("matplotlib").get_data_path()) / "sample_data" / "grace_hopper.jpg"
    unet = measuring_unet("sd2", cross_attention_dim=TEXT_WIDTH)
    unet.register_to_config(sample_size=16)  # pictures of 32 pixels
    StableDiffusionPipeline(**{**tiny_components(), "unet": unet}, requires_safety_checker=False).save_pretrained(
        tmp_path / "base"
    )
    out = tmp_path / "out"
    common = ["--pretrained_model", str(tmp_path / "base"), "--output_dir", str(out)]
    common += ["--image", str(photo), "--phrases", "a car", "a teddy bear"]  # what it takes cloth and hair for
    common += ["--detector_model", str(toybox_path("clipseg")), "--max_train_steps", "2", "--lr_warmup_steps", "0"]
    common += ["--stage2_steps", "1", "--class_pictures", "1", "--class_steps", "1", "--reward_steps", "1"]
    assert learn_mifo.main(common) == 0
    pipeline = quiet(MIFOPipeline.from_pretrained(out / "weights"))
    objects = [{"token": f"<asset{index}>", "box": (index / 2, 0.1, index / 2 + 0.5, 0.9)} for index in range(2)]
    prompt = "a photo of <asset0> and <asset1>"
    images = pipeline(prompt, objects=objects, num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(images).all()


@pytest.mark.slow
def test_a_picture_with_mask_files_is_learned_as_a_folder_is(base, scene, tmp_path):
    brief = ["--max_train_steps", "2", "--stage2_steps", "0", "--validation_steps", "100"]
    assert learn_mifo.main(arguments(base, scene, tmp_path / "folder", *brief)) == 0
    files = arguments(base, scene, tmp_path / "files", *brief)
    place = files.index("--data")
    masks = ["--masks", str(scene / "mask0.png"), str(scene / "mask1.png")]
    files[place : place + 2] = ["--image", str(scene / "img.png"), *masks]
    assert learn_mifo.main(files) == 0
    one, other = embeddings(tmp_path / "folder"), embeddings(tmp_path / "files")
    assert list(one) == list(other) == ["asset0", "asset1"]
    assert all(torch.equal(one[name][f"<{name}>"], other[name][f"<{name}>"]) for name in one)
    assert len(read_log(tmp_path / "files" / "stage1" / "log.jsonl")) == 2


@pytest.mark.slow
def test_one_phrase_for_two_look_alikes(tmp_path):
    """`--phrases` as a user types them, on the embedded segmenter; the left one comes first."""
    picture, exact = two_bears()
    picture.save(tmp_path / "photo.png")
    common = ["--image", str(tmp_path / "photo.png"), "--output_dir", str(tmp_path), "--phrases", "a teddy bear"]
    scene = learn_mifo.load_scene(learn_mifo.create_parser().parse_args([*common, "a teddy bear"]), 64)
    assert scene.masks.shape == (2, 64, 64)
    assert all(
        mask_overlap(mask > 0, exact[side]) > 0.5 for mask, side in zip(scene.masks, ("left", "right"), strict=True)
    )
    with pytest.raises(ObjectNotFoundError, match="'a teddy bear' 3 times, and 2 could"):
        learn_mifo.load_scene(learn_mifo.create_parser().parse_args([*common, "a teddy bear", "a teddy bear"]), 64)


def class_arguments(folder, *more):
    return learn_mifo.create_parser().parse_args(["--output_dir", str(folder), "--class_pictures", "2", *more])


def test_class_pictures_are_those_of_their_prompt_steps_size_and_base(base, tmp_path):
    pipeline, other_base = quiet(MIFOPipeline.from_pretrained(base)), quiet(MIFOPipeline(**tiny_components()))
    found = {}
    for name, model, size, *more in (
        ("first", pipeline, SIZE),
        ("prompt", pipeline, SIZE, "--class_prompt", "a dog"),
        ("steps", pipeline, SIZE, "--class_steps", "1"),
        ("size", pipeline, SIZE + 8),
        ("base", other_base, SIZE),
    ):
        options = class_arguments(tmp_path, "--class_steps", "2", *more)
        found[name] = learn_mifo.class_moments(model, options, size)
    assert len(list((tmp_path / "class_pictures").iterdir())) == 5
    assert not any(torch.equal(found["first"], found[other]) for other in ("prompt", "steps"))
    assert found["size"].shape[-1] == (SIZE + 8) // 2


def test_the_safety_checker_blacks_no_picture_out_and_stays_in_the_result(scene, tmp_path):
    vision = {"hidden_size": 12, "intermediate_size": 17, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.fill_(-2.0)  # below all cosines: each picture is flagged
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    parts = {**tiny_components(), "safety_checker": checker, "feature_extractor": extractor}
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "base")
    more = ["--max_train_steps", "1", "--lr_warmup_steps", "0", "--stage2_steps", "1", "--class_pictures", "1"]
    assert learn_mifo.main(arguments(tmp_path / "base", scene, tmp_path / "out", *more)) == 0
    pictures = [*(tmp_path / "out").rglob("*.png")]
    assert len(pictures) == 3  # of the class, and a sheet of each stage
    assert all(np.array(Image.open(path)).any() for path in pictures)
    assert MIFOPipeline.from_pretrained(tmp_path / "out" / "weights").safety_checker is not None


def test_class_pictures_that_are_there_are_not_painted_again(base, tmp_path):
    pipeline = quiet(MIFOPipeline.from_pretrained(base))
    options = class_arguments(tmp_path, "--class_steps", "2")
    first = learn_mifo.class_moments(pipeline, options, SIZE)
    kept, lost = sorted(tmp_path.rglob("*.png"))
    Image.new("RGB", (SIZE, SIZE), "red").save(kept)
    lost.unlink()  # as after an interruption
    second = learn_mifo.class_moments(quiet(MIFOPipeline.from_pretrained(base)), options, SIZE)
    assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--names", "<one>"], LayoutError, "1 names for 2 masks"),
        (["--initial", "cat", "dog", "cup"], LayoutError, "3 words for 2 masks"),
        (["--vectors", "40"], PromptTooLongError, "2 instances"),
        (["--masks", "mask0.png"], LayoutError, "--data"),
        (["--image", "img.png"], LayoutError, "either"),
        (["--stage2_steps", "-1"], ObjectComposeError, "stage2_steps"),
        (["--adam_beta2", "1"], ObjectComposeError, "adam_beta2"),
        (["--gate", "-5"], ObjectComposeError, "gate"),
        (["--pretrained_model", "./nowhere"], CheckpointError, "`--pretrained_model` './nowhere' is no checkpoint"),
        (["--delta_rank", "4"], ObjectComposeError, "`delta_rank` needs `train_modules`"),
        (["--delta_rank", "4", "--train_modules", "lora"], ObjectComposeError, "`lora_rank`"),
        (["--pretrained_model", "stabilityai/stable-diffusion-2-1"], ObjectComposeError, "mirrors: sd2-community/"),
    ],
)
def test_bad_arguments_are_refused_before_training(base, scene, tmp_path, more, error, message):
    with pytest.raises(error, match=message):
        learn_mifo.main(arguments(base, scene, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_masks_that_do_not_match_are_refused(base, scene, tmp_path):
    broken = tmp_path / "scene"
    shutil.copytree(scene, broken)
    Image.new("L", (SIZE + 8, SIZE)).save(broken / "mask1.png")
    with pytest.raises(ObjectComposeError, match="empty mask"):
        learn_mifo.main(arguments(base, broken, tmp_path / "out"))
    shutil.copy(scene / "mask0.png", broken / "mask1.png")
    with pytest.raises(ObjectComposeError, match="not overlap"):
        learn_mifo.main(arguments(base, broken, tmp_path / "out"))


def test_a_known_word_is_no_placeholder(base, scene, tmp_path):
    with pytest.raises((LayoutError, PhraseNotFoundError), match="new to the tokenizer"):
        learn_mifo.main(arguments(base, scene, tmp_path / "out", "--names", "dog</w>", "<b>"))
