"""Evaluating learned instances: toybox's scenes, figures by hand, what the scorer sees, and the command."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from objectcompose.__main__ import main
from objectcompose.adapters.base_identity import identify_base
from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.errors import CheckpointError, LayoutError, ObjectComposeError
from objectcompose.evaluation.crop_similarity import _dino_encoder, without_boxes
from objectcompose.evaluation.disentangle import add_arguments
from objectcompose.evaluation.disentangle_cases import (
    EDITING_TEMPLATES,
    TOYBOX_TEMPLATES,
    boxes_of_prompt,
    editing_prompts,
    file_case,
    toybox_case,
)
from objectcompose.evaluation.disentangle_metrics import disentangle_metrics, picture_figures
from objectcompose.evaluation.disentangle_scorer import DisentangleScorer, share_outside
from objectcompose.evaluation.toybox_instance_scenes import ALIKE, HELD_OUT_HUES, UNLIKE, toybox_instances
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.pipelines.learned_instances import learned_names, load_instances
from objectcompose.toybox.categories import PRESETS
from objectcompose.toybox.judge import Detection
from objectcompose.toybox.weights import active_preset, toybox_path
from objectcompose.training.mifo_scene import make_scene, scene_files
from tests.tiny import tiny_tokenizer


CPU = PRESETS["cpu"]


# ---- toybox's scenes


def test_the_lists_are_what_they_were():
    digests = {
        (name, split): hashlib.sha256(repr([one.spec for one in toybox_instances(PRESETS[name], split)]).encode())
        .hexdigest()[:8]
        for name in PRESETS
        for split in ("dev", "test")
    }  # fmt: skip
    assert digests == {
        ("cpu", "dev"): "0decedf1",
        ("cpu", "test"): "90530038",
        ("gpu", "dev"): "8a7929fc",
        ("gpu", "test"): "4cc68661",
    }


@pytest.mark.parametrize("name", PRESETS)
def test_scenes_are_of_their_kinds(name):
    low, high = HELD_OUT_HUES
    scenes = toybox_instances(PRESETS[name], "test")
    assert [scene.kind for scene in scenes] == [ALIKE] * 8 + [UNLIKE] * 4
    assert len({scene.words[0] for scene in scenes[:8]}) == 8
    for scene in scenes:
        first, second = scene.spec.identities
        assert low <= first.hue <= high and low <= second.hue <= high
        assert ((first.category, first.style) == (second.category, second.style)) == (scene.kind == ALIKE)
        assert scene.kind == UNLIKE or first.permutation != second.permutation
        assert scene.masks.shape[0] == 2 and scene.masks.sum(0).max() == 1  # what is seen of them is disjoint
        assert scene.masks.mean((1, 2)).min() >= 0.08
    with pytest.raises(ObjectComposeError, match="train"):
        toybox_instances(PRESETS[name], "train")
    with pytest.raises(ObjectComposeError, match="twins"):
        toybox_instances(PRESETS[name], "test", ["twins"])


def test_a_saved_scene_is_one_to_learn_from(tmp_path):
    scene = toybox_instances(CPU, "dev", [ALIKE])[0]
    image, masks = scene_files(scene.save(tmp_path))
    read = make_scene(image, masks, CPU.image_size)
    assert torch.equal(read.masks, scene.masks)
    from_files = file_case(tmp_path, ["<asset0>", "<asset1>"], scene.words, CPU.image_size)
    for one, other in zip(from_files.references, toybox_case(scene).references, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    with pytest.raises(LayoutError, match="one entry per mask"):
        file_case(tmp_path, ["<asset0>"], None, CPU.image_size)


# ---- prompts


def test_prompts_name_all_instances_and_no_style():
    case = toybox_case(toybox_instances(CPU, "test")[0])
    for templates in (EDITING_TEMPLATES, TOYBOX_TEMPLATES):
        prompts = list(editing_prompts(case, templates).values())
        assert len(prompts) == 10
        for prompt in prompts:
            assert prompt.record.text.startswith("a photo of <asset0> and <asset1>")
            assert prompt.caption.startswith("a photo of dog and dog")
    assert len(editing_prompts(case, TOYBOX_TEMPLATES, 3)) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_boxes_lie_apart_and_move_on(count):
    seen = set()
    for number in range(count):
        boxes = boxes_of_prompt(count, number)
        seen.add(boxes[0])
        for index, (x0, y0, x1, y1) in enumerate(boxes):
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
            for a0, b0, a1, b1 in boxes[:index]:
                assert min(x1, a1) <= max(x0, a0) or min(y1, b1) <= max(y0, b0)
    assert len(seen) == count


# ---- figures


def row(prompt, dino, **more):
    return {"scene": "s", "prompt": prompt, "round": 0, "kind": "", "sim_c": 0.2, "dino": dino,
            "background": [0.1, 0.3], **more}  # fmt: skip


def test_figures_of_a_picture_by_hand():
    table = [[0.8, 0.2], [0.6, 0.4]]  # the second box shows the first instance
    figures = picture_figures(row("a", table, identity=[[0.9, 0.1], [0.2, 0.7]], leakage=None, placed=[True, False]))
    expected = {
        "sim_c": 0.2, "clip_score": 0.5, "sim_d": 0.6, "nsim_d": 0.4, "mixed_up": 0.5, "leakage_background": 0.3,
        "identity": 0.8, "other_identity": 0.15, "identity_mixed_up": 0.0, "shown": 0.0,
        "placed": 0.5,
    }  # fmt: skip
    assert figures == pytest.approx(expected)
    assert "nsim_d" not in picture_figures(row("a", [[0.5]]))  # one instance has no others


def test_composites_are_products_of_means():
    rows = [row("a", [[0.8, 0.2], [0.4, 0.6]]), row("b", [[0.6, 0.6], [0.4, 0.4]])]
    metrics = disentangle_metrics(rows)
    assert metrics["sim_d"] == pytest.approx(0.6) and metrics["nsim_d"] == pytest.approx(0.4)
    assert metrics["cs"] == pytest.approx(0.2 * 0.6 * 0.6) and metrics["learning_cs"] == pytest.approx(0.36)
    assert metrics["cs_scaled"] == pytest.approx(0.5 * 0.6 * 0.6)
    assert metrics["cs.lo"] <= metrics["cs"] <= metrics["cs.hi"]
    # the paper's synthesis table: SIM-C .609, SIM-D .792, NSIM-D .726 give .132
    one = row("a", [[0.792, 0.726], [0.726, 0.792]], sim_c=0.609 / 2.5)
    assert disentangle_metrics([one])["cs_scaled"] == pytest.approx(0.132, abs=5e-4)


def test_kinds_stand_apart_and_scenes_are_drawn_whole():
    rows = [
        {**row(f"{scene}{number}", [[value, 0.1], [0.1, value]]), "scene": scene, "kind": kind}
        for scene, kind, value in (("a", ALIKE, 0.5), ("b", ALIKE, 0.7), ("c", UNLIKE, 0.9))
        for number in range(3)
    ]
    metrics = disentangle_metrics(rows)
    assert metrics["sim_d.alike"] == pytest.approx(0.6) and metrics["sim_d.unlike"] == pytest.approx(0.9)
    assert metrics["sim_d"] == pytest.approx(0.7) and metrics["sim_d.alike.lo"] == pytest.approx(0.5)


def test_area_outside_of_the_boxes():
    mask = torch.zeros(8, 8)
    mask[:, 2:6] = 1
    seen = [Detection("dog", (0.25, 0, 0.75, 1), 1.0, mask)]
    assert share_outside(seen, [(0, 0, 0.5, 1)]) == pytest.approx(0.5)
    assert share_outside(seen, [(0, 0, 0.5, 1), (0.25, 0, 1, 1)]) == pytest.approx(0)
    assert share_outside([], [(0, 0, 1, 1)]) is None
    rest = np.asarray(without_boxes(Image.new("RGB", (8, 8), "red"), [(0, 0, 0.5, 1)]))
    assert (rest[:, :4] == 128).all() and (rest[:, 4:] == (255, 0, 0)).all()


# ---- the scorer


@pytest.fixture(scope="module")
def scorer():
    return DisentangleScorer.of_toybox("cpu")


def composed(case, prompt, order, side=64):
    """A picture whose boxes hold the references, in an order."""
    picture = Image.new("RGB", (side, side), (170, 200, 160))
    for number, (x0, y0, x1, y1) in zip(order, prompt.boxes, strict=True):
        reference = case.references[number]
        shown = reference.crop(reference.getbbox())
        shown = shown.resize((round((x1 - x0) * side), round((y1 - y0) * side)))
        picture.paste(shown, (round(x0 * side), round(y0 * side)), shown)
    return picture


@pytest.mark.parametrize("number", [0, 3, 7, 8])
def test_instances_in_their_boxes_are_told_from_exchanged_ones(scorer, number):
    case = toybox_case(toybox_instances(active_preset(), "test")[number])
    prompt = list(editing_prompts(case, TOYBOX_TEMPLATES).values())[2]
    right, wrong = (
        picture_figures(scorer.score(composed(case, prompt, order), case, prompt)) for order in ((0, 1), (1, 0))
    )
    assert right["identity_mixed_up"] == 0 and wrong["identity_mixed_up"] == 1
    assert right["sim_d"] > wrong["sim_d"] + 0.1 and right["nsim_d"] < wrong["nsim_d"] - 0.1
    assert right["identity"] > 0.5 and right.get("leakage", 0.0) < 0.1


def test_captions_of_toybox_are_rendered_scenes(scorer):
    scenes = toybox_instances(active_preset(), "test")
    case, other = toybox_case(scenes[0]), toybox_case(scenes[8])
    prompt = next(iter(editing_prompts(case, TOYBOX_TEMPLATES).values()))
    picture = scenes[0].picture
    theirs = scorer.score(picture, other, next(iter(editing_prompts(other, TOYBOX_TEMPLATES).values())))
    assert scorer.score(picture, case, prompt)["sim_c"] > theirs["sim_c"] + 0.1


# ---- learned instances on a pipeline


def write_learned(folder, width=64, names=("asset0", "asset1"), vectors=1, first_seed=0):
    (folder / "embeddings").mkdir(parents=True)
    for number, name in enumerate(names, start=first_seed):
        vector = torch.randn(vectors, width, generator=torch.Generator().manual_seed(number)) * 0.02
        save_file({f"<{name}>": vector}, folder / "embeddings" / f"{name}.safetensors")
    return folder


def test_instances_are_loaded_by_number_and_checked(tmp_path):
    folder = write_learned(tmp_path / "learned", names=("asset10", "asset2"))
    assert list(learned_names(folder)) == ["<asset2>", "<asset10>"]
    pipeline = load_checkpoint(None, "cpu", "mifo")
    assert load_instances(pipeline, folder) == ["<asset2>", "<asset10>"]
    assert load_instances(pipeline, folder) == ["<asset2>", "<asset10>"]  # what is there stays
    assert "<asset2>" in pipeline.tokenizer.get_vocab()
    with pytest.raises(CheckpointError, match="got none"):
        load_instances(pipeline, tmp_path)
    with pytest.raises(CheckpointError, match="32 numbers a vector"):
        load_instances(pipeline, write_learned(tmp_path / "narrow", 32, ("other",)))
    broken = write_learned(tmp_path / "broken", names=("third",))
    (broken / "embeddings" / "third.safetensors").write_text("nothing")
    with pytest.raises(CheckpointError, match="one embedding"):
        load_instances(pipeline, broken)


@pytest.mark.parametrize("vectors", [1, 3])
def test_two_runs_with_the_same_names_are_told_apart(tmp_path, vectors):
    pipeline = load_checkpoint(None, "cpu", "mifo")
    ours = write_learned(tmp_path / "ours", vectors=vectors)
    load_instances(pipeline, ours)
    before = pipeline.text_encoder.get_input_embeddings().weight.clone()
    theirs = write_learned(tmp_path / "theirs", names=("new", "asset1"), vectors=vectors, first_seed=7)
    with pytest.raises(CheckpointError, match="asset1.*knows from another run"):
        load_instances(pipeline, theirs)
    longer = write_learned(tmp_path / "longer", vectors=vectors + 1)
    with pytest.raises(CheckpointError, match="knows from another run"):
        load_instances(pipeline, longer)
    assert "<new>" not in pipeline.tokenizer.get_vocab()
    pipeline.text_encoder.to(torch.bfloat16)
    assert load_instances(pipeline, ours) == ["<asset0>", "<asset1>"]  # a cast is no other run
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight, before.bfloat16())


def test_layers_are_not_loaded_twice():
    pipeline = load_checkpoint(None, "cpu", "mifo")
    load_instances(pipeline, toybox_path("mifo"))
    adapters = pipeline.get_list_adapters()
    load_instances(pipeline, toybox_path("mifo"))
    assert adapters["unet"] and pipeline.get_list_adapters() == adapters


def test_a_whole_pipeline_of_stage_2_is_not_left_out(tmp_path):
    """Its placeholders on the base would be those of a model that is not there."""
    learned = write_learned(tmp_path / "learned")
    pipeline = load_checkpoint(None, "cpu", "mifo")
    (learned / "weights").mkdir()
    (learned / "weights" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"load it with `MIFOPipeline.from_pretrained\('.*learned/weights'\)`"):
        load_instances(pipeline, learned)
    assert "<asset0>" not in pipeline.tokenizer.get_vocab()
    pipeline.load_textual_inversion(str(learned / "embeddings"), weight_name="asset0.safetensors")
    pipeline.load_textual_inversion(str(learned / "embeddings"), weight_name="asset1.safetensors")
    assert load_instances(pipeline, learned) == ["<asset0>", "<asset1>"]  # as the whole pipeline has them


def test_a_delta_of_stage_2_comes_with_new_placeholders(tmp_path):
    learned = write_learned(tmp_path / "learned")
    pipeline = load_checkpoint(None, "cpu", "mifo")
    name, weight = next((name, one) for name, one in pipeline.unet.named_parameters() if name.endswith("to_k.weight"))
    before, step = {name: weight.detach().clone()}, torch.zeros_like(weight)
    step[0, 0] = 1.0  # of rank 1, so that it would be added twice
    made_for = identify_base(pipeline.unet)
    UNetDelta.between(before, {name: before[name] + step}, made_for, 1).save(learned / "weights" / DELTA_NAME)
    for _ in range(2):
        load_instances(pipeline, learned)
        assert torch.allclose(weight, before[name] + step, atol=1e-3)
    other = load_checkpoint(None, "cpu", "mifo")
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.normal_()
    with pytest.raises(CheckpointError, match="was made for"):
        load_instances(other, learned)
    assert "<asset0>" not in other.tokenizer.get_vocab()


# ---- the command


@pytest.fixture
def evaluate(tmp_path):
    scene = toybox_instances(active_preset(), "dev", [ALIKE])[0]
    (tmp_path / "scene").mkdir()
    scene.save(tmp_path / "scene")
    write_learned(tmp_path / "learned")

    def run(*more, out="out", processes=1):
        common = ["--learned", tmp_path / "learned", "--data", tmp_path / "scene", "--out", tmp_path / out]
        common += ["--device", "cpu", "--max-prompts", 2, "--steps", 2]
        arguments = ["evaluate", "disentangle", *map(str, [*common, *more])]
        if processes == 1:
            return main(arguments)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*launch, "-m", "objectcompose", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        return 0

    return run


def test_the_command_paints_and_scores_and_goes_on(evaluate, tmp_path, capsys):
    words = ["--words", "umbrella", "umbrella"]
    assert evaluate(*words) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"sim_c", "sim_d", "nsim_d", "cs", "identity", "leakage_background"} <= report["metrics"].keys()
    assert report["num_rows"] == 2 and report["scored_with"].keys() == {"clip", "dino", "judge", "judge_identity"}
    painted = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pictures").glob("*.png")}
    assert evaluate(*words, "--only", "score") == 0
    assert painted == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pictures").glob("*.png")}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"] == report["metrics"]
    assert evaluate(*words, "--no-box-control") == 2 and "painted otherwise" in capsys.readouterr().err
    assert evaluate(*words, "--only", "score", "--max-prompts", "1") == 2
    assert "other instances or prompts" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_equal_one(evaluate, tmp_path):
    more = ["--words", "umbrella", "umbrella", "--max-prompts", 5, "--rounds", 2, "--batch-size", 1]
    more += ["--steps", 1]
    assert evaluate(*more, out="one") == evaluate(*more, out="two", processes=2) == 0
    logs = [path.stat().st_size for path in (tmp_path / "two" / "scores").rglob("process-*.jsonl")]
    assert len(logs) == 2 and all(logs)  # both scored something
    one, two = ((tmp_path / name / "rows.jsonl").read_text(encoding="utf-8") for name in ("one", "two"))
    assert one == two and len(one.splitlines()) == 10
    first, second = (json.loads((tmp_path / name / "report.json").read_text())["metrics"] for name in ("one", "two"))
    assert first == second


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--words"),
        (["--words", "umbrella", "lamp"], "lamp"),
        (["--words", "umbrella"], "one entry per mask"),
        (["--words", "umbrella", "umbrella", "--max-prompts", "0"], "max-prompts"),
        (["--words", "umbrella", "umbrella", "--box-control", '{"steps": 3}'], "guided_steps"),
    ],
)
def test_bad_input_is_refused_before_anything_is_painted(evaluate, tmp_path, capsys, more, message):
    assert evaluate(*more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_models_are_scored_by_public_encoders(tmp_path):
    """CLIP with both halves and DINOv2 from folders, here tiny ones."""
    tokenizer = tiny_tokenizer()
    wide = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    words = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    seen = {"image_size": 28, "patch_size": 14}
    clip, dino = tmp_path / "clip", tmp_path / "dino"
    torch.manual_seed(0)
    text, vision = CLIPTextConfig(**wide, **words), CLIPVisionConfig(**wide, **seen)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **seen)).save_pretrained(dino)
    for folder in (clip, dino):
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    scorer = DisentangleScorer.of_public(str(clip), str(dino), "cpu")
    case = toybox_case(toybox_instances(CPU, "dev")[0])
    first, second = list(editing_prompts(case, EDITING_TEMPLATES).values())[:2]
    picture = composed(case, first, (0, 1))
    row = scorer.score(picture, case, first)
    assert "identity" not in row and -1 <= row["sim_c"] <= 1 and np.shape(row["dino"]) == (2, 2)
    with torch.no_grad():
        model = CLIPModel.from_pretrained(clip)
        tokens = tokenizer(second.caption, return_tensors="pt")
        expected = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output[0], dim=-1)
    torch.testing.assert_close(scorer.caption(case, second), expected)
    assert scorer.identity().keys() == {"clip", "dino"}


def test_the_first_dino_is_read_by_its_class_token(tmp_path):
    """A tiny one, beside the processor file that DINO ViT-S/16 is published with."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=56, patch_size=8
    )
    model = ViTModel(config).eval()  # with a pooler, as older files have one
    torch.nn.init.normal_(model.layernorm.weight)
    model.save_pretrained(tmp_path)
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    published = {"feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "size": 56, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**published, "do_normalize": True, **means}))
    encoder = _dino_encoder(str(tmp_path), "cpu")
    assert encoder.side == 56 and encoder.colour == pytest.approx(means["image_mean"])
    pixels = torch.rand(2, 3, 56, 56)
    mean, std = (torch.tensor(means[name])[:, None, None] for name in ("image_mean", "image_std"))
    with torch.no_grad():
        states = model((pixels - mean) / std, output_hidden_states=True).hidden_states[-1]
        found = encoder.embed(pixels)
    torch.testing.assert_close(found, model.layernorm(states)[:, 0])
    assert not torch.allclose(found, states[:, 0], atol=0.1)


def test_other_models_than_dino_are_refused(tmp_path):
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="clip_vision_model"):
        _dino_encoder(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none of them"}))
    with pytest.raises(CheckpointError, match="cannot be loaded as DINO"):
        _dino_encoder(str(tmp_path), "cpu")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        _dino_encoder(str(tmp_path / "nothing"), "cpu")


def test_public_models_are_compared_by_the_first_dino():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(["--learned", "a", "--data", "b", "--out", "c"]).dino == "facebook/dino-vits16"
