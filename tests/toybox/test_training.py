"""Trainers write weights that load, go on exactly where they stopped, and the committed world does what it should."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    CLIPSegForImageSegmentation,
    CLIPVisionModelWithProjection,
    Dinov2Model,
)

from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.errors import CheckpointError
from objectcompose.evaluation import toybox_figures
from objectcompose.evaluation.composition_scorer import CompositionScorer
from objectcompose.files import write_atomically
from objectcompose.toybox.categories import PRESETS
from objectcompose.toybox.judge import Judge
from objectcompose.toybox.models import build_vae
from objectcompose.toybox.scenes import render_references
from objectcompose.toybox.weights import ENVIRONMENT_VARIABLE, toybox_path
from objectcompose.training import train_toybox, train_toybox_base, train_toybox_vae
from objectcompose.training.toybox_data import scene_pool
from objectcompose.training.toybox_loop import fit


CPU = PRESETS["cpu"]
SCRIPTS = ("vae", "base", "image_encoder", "dino", "clipseg", "judge")
WITH_SCENES = ("vae", "base", "clipseg", "judge")


def committed(name: str) -> Path:
    """The folder of a committed model; skips the test where it is not there."""
    try:
        return toybox_path(name)
    except CheckpointError as error:
        pytest.skip(f"no toybox weights: {error}")


def test_seconds_add_up_over_parts(tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_text("".join(json.dumps({"step": n, "seconds": s}) + "\n" for n, s in enumerate([5, 9, 2, 7, 1])))
    assert train_toybox.seconds_trained(log) == 9 + 7 + 1
    assert train_toybox.seconds_trained(tmp_path / "none.jsonl") == 0


@torch.no_grad()
def test_the_autoencoders_latents_are_made_ready_for_diffusion():
    """A channel that the decoder does not miss is silenced, the others are standardised, samples are the means."""
    vae = build_vae(CPU).eval()
    pixels = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae.post_quant_conv.weight[:, 1] *= 1e-4
    for channel in (0, 2, 3):  # fresh weights hardly use any channel
        vae.post_quant_conv.weight[:, channel] *= 50
    before = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    assert train_toybox_vae.silence_channels(vae, pixels, tolerance=1e-4) == [1]
    train_toybox_vae.standardise_latents(vae, pixels)
    train_toybox_vae.narrow_posterior(vae)
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.mode()
    torch.testing.assert_close(vae.decode(latents).sample, before, atol=2e-3, rtol=1e-3)
    assert latents[:, 1].abs().max() < 1e-6
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.tensor([1.0, 0.0, 1.0, 1.0]), atol=1e-3, rtol=0)
    assert (posterior.sample() - latents).abs().max() < 0.05


def test_record_and_card(tmp_path):
    weights, runs = tmp_path / "weights", tmp_path / "runs" / "cpu"
    (weights / "dino").mkdir(parents=True)
    (weights / "dino" / "model.safetensors").write_bytes(b"1")
    (runs / "dino" / "step-00001500").mkdir(parents=True)
    dino = next(run for run in train_toybox.RUNS if run.name == "dino")
    assert train_toybox.is_finished(dino, "cpu", weights, runs)
    assert not train_toybox.is_finished(dino, "gpu", weights, runs)
    train_toybox.write_card("cpu", weights, runs)
    record = json.loads((weights / "toybox.json").read_text())
    assert record["version"] == "toybox-1" and record["preset"] == "cpu" and set(record["models"]) == {"dino"}
    assert record["models"]["dino"]["steps"] == 1500 and record["models"]["dino"]["samples"] == 1500 * 64
    text = (weights / "README.md").read_text()
    assert "**Preset: cpu**" in text and "license: apache-2.0" in text and "CC-BY-4.0" in text and "`dino`" in text
    again = train_toybox.write_record("cpu", weights, tmp_path / "nothing")  # a clone has no runs
    assert again == record
    (weights / "dino" / "model.safetensors").write_bytes(b"2")
    assert train_toybox.write_record("cpu", weights, tmp_path / "nothing")["models"]["dino"]["steps"] == 0


def test_no_time_means_no_part(tmp_path):
    assert not train_toybox.train("cpu", 0.5, tmp_path / "weights", tmp_path / "runs" / "cpu")


def test_parts_run_in_order_until_the_clock_stops_one(tmp_path, monkeypatch):
    """A script's unfinished runs share the time; after a script that did not finish nothing starts."""
    weights, runs, commands = tmp_path / "weights", tmp_path / "runs" / "gpu", []

    def finish(run: train_toybox.Run) -> None:
        (runs / run.name / f"step-{run.steps['gpu']:08d}").mkdir(parents=True)
        (weights / run.folder / ("unet" if run.name == "base" else "")).mkdir(parents=True, exist_ok=True)
        (weights / run.folder / ("unet" if run.name == "base" else "") / "m.safetensors").write_bytes(b"1")

    def fake_run(command: list[str], check: bool) -> None:
        commands.append(command)
        for run in train_toybox.RUNS:
            if command[3].endswith(run.script) and run.name != "dino":
                finish(run)

    monkeypatch.setattr(train_toybox.subprocess, "run", fake_run)
    finish(train_toybox.RUNS[0])
    assert not train_toybox.train("gpu", 9, weights, runs)
    scripts = [command[3].rpartition("_toybox_")[2] for command in commands]
    assert scripts == ["judge", "image_encoder", "dino"]  # the autoencoder was there, DINO did not finish
    minutes = [float(command[command.index("--minutes") + 1]) for command in commands]
    assert minutes == pytest.approx([4.25, 8.5, 8.5], abs=0.02)
    finish(next(run for run in train_toybox.RUNS if run.name == "dino"))
    assert train_toybox.train("gpu", None, weights, runs)
    assert [command[3].rpartition("_toybox_")[2] for command in commands[3:]] == ["clipseg", "base"]
    assert "--minutes" not in commands[-1]


def test_prompts_and_look_alikes_are_fixed():
    prompts = toybox_figures.base_prompts(CPU, 10)
    assert prompts == toybox_figures.base_prompts(CPU, 10)
    assert (
        [len(row["named"]) for row in prompts] == [row["objects"] for row in prompts] == [1] * 10 + [2] * 10 + [5] * 10
    )
    assert len({row["seed"] for row in prompts}) == 30
    assert all(name in row["prompt"] for row in prompts for name in row["named"])
    identities = toybox_figures.look_alikes(CPU, 0)
    assert len(set(identities)) == 20 and len({one.category for one in identities}) == 1


def test_metrics_of_hand_made_rows():
    rows: list[dict] = []
    for scene, found in enumerate((["dog"], ["car", "dog"])):
        rows.append(
            {"case": "scene", "scene": scene, "num_categories": 8, "present": ["dog"], "found": found, "iou": [0.8]}
        )
        rows.append({"case": "identity", "trial": scene, "category": "dog", "correct": 10 + 10 * scene})
        rows.append({"case": "vae", "scene": scene, "psnr": 25.0 + 2 * scene})
        rows.append({"case": "seconds", "number": scene, "seconds": 1.5})
        for objects in (1, 2, 5):
            named = ["dog", "car", "cup", "bed", "tv"][:objects]
            found_of_named = named[: objects - scene * (objects > 1)]
            rows.append(
                {"case": "base", "objects": objects, "prompt": "", "seed": 0, "named": named, "found": found_of_named}
            )
    metrics = toybox_figures.metrics_of_rows(rows)
    expected = {
        "judge.presence_accuracy": (1 + 7 / 8) / 2, "judge.recall": 1.0, "judge.precision": 2 / 3,
        "judge.mask_iou": 0.8, "judge.identity_accuracy": 0.75, "vae.psnr": 26.0, "base.one_object": 1.0,
        "base.two_objects": 0.5, "base.mg3": 1.0, "base.mg4": 1.0, "base.mg5": 0.5, "base.seconds_per_image": 1.5,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert all(metrics[f"{name}.lo"] <= metrics[name] <= metrics[f"{name}.hi"] for name in expected)


def test_scenes_are_kept_whole_and_apart(tmp_path):
    """Files that cannot be read are made again; another world under the same name has its own."""
    first = scene_pool(CPU, "train", 3, tmp_path, workers=1)
    [path] = tmp_path.iterdir()  # captions and all
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], save({"pixels": first.pixels}, {"captions": "[]"}), b""):
        write_atomically(path, broken)  # tensors that were read may still map the file
        again = scene_pool(CPU, "train", 3, tmp_path, workers=1)
        assert torch.equal(again.pixels, first.pixels) and again.captions == first.captions
    written = path.stat().st_mtime_ns
    assert scene_pool(CPU, "train", 3, tmp_path, workers=1).captions == first.captions
    assert path.stat().st_mtime_ns == written
    fewer = replace(CPU, categories=CPU.categories[:3])
    assert set(scene_pool(fewer, "train", 3, tmp_path, workers=1).categories.unique().tolist()) <= {-1, 0, 1, 2}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_resumed_fit_equals_unbroken(tmp_path):
    pool = scene_pool(CPU, "train", 8, tmp_path / "pools", workers=1)

    def train(folder: Path, stop_at: int | None) -> AutoencoderKL:
        torch.manual_seed(0)
        vae = build_vae(CPU)

        def loss_of_step(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            pixels = pool.images(torch.arange(2) + step) * 2 - 1
            decoded = vae.decode(vae.encode(pixels).latent_dist.sample()).sample  # noise: the generators count too
            return (decoded - pixels).square().mean()

        args = argparse.Namespace(runs=folder, steps=4, minutes=None)
        return fit("vae", vae, loss_of_step, args, lr=1e-3, every=2)[0]

    unbroken = train(tmp_path / "unbroken", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", 2)
    torch.manual_seed(1)
    resumed = train(tmp_path / "broken", None)
    for (name, first), second in zip(unbroken.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_checkpoints_of_other_options_are_refused(tmp_path):
    def train(**changes):
        model = torch.nn.Linear(2, 1)
        options = {"runs": tmp_path, "steps": 2, "minutes": None, "seed": 0, "batch_size": 3, "compile": False}
        args = argparse.Namespace(**options | changes)
        return fit("line", model, lambda step: model(torch.ones(3, 2)).square().mean(), args, lr=1e-3)[1]

    assert train() == 2
    assert train(minutes=1.0, compile=True) == 2
    for name, value in {"steps": 3, "seed": 1, "batch_size": 4}.items():
        with pytest.raises(CheckpointError, match=f"line has checkpoints of another run: {name} is"):
            train(**{name: value})
    (tmp_path / "line" / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"no `run\.json`"):
        train()


@pytest.fixture(scope="module")
def trained_world(tmp_path_factory):
    """Every trainer's two steps, one world."""
    folder = tmp_path_factory.mktemp("toybox")
    patch = pytest.MonkeyPatch()
    for script in SCRIPTS:
        arguments = ["--steps", "2", "--batch_size", "2"] + ["--scenes", "256"] * (script in WITH_SCENES)
        arguments += ["--weights", str(folder / "weights"), "--runs", str(folder / "runs")]
        patch.setattr(sys, "argv", [script, *arguments])
        import_module(f"objectcompose.training.train_toybox_{script}").main()
    patch.undo()
    train_toybox.write_card("cpu", folder / "weights", folder / "runs" / "cpu")
    return folder / "weights"


@pytest.fixture
def tiny_world(trained_world, monkeypatch):
    """The trained world in place of the committed one."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(trained_world))
    return trained_world


@pytest.mark.slow
def test_trainers_write_loadable_weights(tiny_world):
    record = json.loads((tiny_world / "toybox.json").read_text())
    assert set(record["models"]) == {run.name for run in train_toybox.RUNS}
    assert all(model["steps"] == 2 for model in record["models"].values())
    picture = [(render_references(CPU, [toybox_figures.look_alikes(CPU, 0)[0]], [0])[0, :3] * 255).byte().numpy()]
    for name, kind, limit in (("image_encoder", CLIPVisionModelWithProjection, 3), ("dino", Dinov2Model, 3)):
        model = kind.from_pretrained(tiny_world / name, dtype=torch.float32)
        seen = AutoImageProcessor.from_pretrained(tiny_world / name)(picture, return_tensors="pt")
        assert seen.pixel_values.shape == (1, 3, 64, 64) and seen.pixel_values.min() >= -1
        assert model(**seen)[0].isfinite().all()
        assert (tiny_world / name / "model.safetensors").stat().st_size < limit * 2**20
    clipseg = CLIPSegForImageSegmentation.from_pretrained(tiny_world / "clipseg", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tiny_world / "clipseg")
    inputs = processor(text=["a dog"], images=picture, padding=True, return_tensors="pt")
    assert clipseg(**inputs).logits.shape == (1, 64, 64)


@pytest.mark.slow
def test_a_clone_goes_on_from_the_written_base(trained_world, tmp_path, monkeypatch):
    """Without runs, `--continue_weights` takes up weights, step and minutes where the record left them."""
    weights, runs = tmp_path / "weights", tmp_path / "runs"
    shutil.copytree(trained_world, weights)
    record = json.loads((weights / "toybox.json").read_text())
    record["models"]["base"]["seconds"] = 600
    (weights / "toybox.json").write_text(json.dumps(record))
    arguments = ["--batch_size", "2", "--scenes", "256", "--weights", str(weights), "--runs", str(runs)]
    monkeypatch.setattr(sys, "argv", ["base", "--continue_weights", "--steps", "3", *arguments])
    before = StableDiffusionPipeline.from_pretrained(weights / "base").unet.state_dict()
    train_toybox_base.main()
    after = StableDiffusionPipeline.from_pretrained(weights / "base").unet.state_dict()
    assert 0 < max((before[name].float() - after[name].float()).abs().max() for name in before) < 0.01
    entry = train_toybox.write_record("cpu", weights, runs / "cpu")["models"]["base"]
    assert entry["steps"] == 3 and entry["seconds"] >= 600
    monkeypatch.setattr(sys, "argv", ["base", "--continue_weights", "--preset", "gpu", *arguments])
    with pytest.raises(CheckpointError, match="continue_weights.*'gpu'"):
        train_toybox_base.main()


@pytest.mark.slow
def test_figures_of_a_world(tiny_world, monkeypatch):
    """Rows that were measured are made again, equal, in any order."""
    monkeypatch.setattr(toybox_figures, "STEPS", 2)
    judge, base = Judge.load(), toybox_figures.load_base()
    rows = toybox_figures.judge_scene_rows(judge, range(4)) + toybox_figures.identity_rows(judge, range(2))
    rows += toybox_figures.vae_rows(base.vae, CPU, range(4)) + toybox_figures.timing_rows(base, CPU, 2)
    pictures = []
    rows += toybox_figures.base_rows(
        base, judge, toybox_figures.base_prompts(CPU, 2), lambda row, image: pictures.append(image)
    )
    assert len(pictures) == 6 and pictures[0].size == (64, 64)
    rows = json.loads(json.dumps(rows))
    chosen = [rows[n] for n in (-1, 0, 5, 7, -3)]
    for old, new in zip(chosen, toybox_figures.regenerate_rows(chosen), strict=True):
        assert {**new, "psnr": 0} == {**old, "psnr": 0}
        assert new.get("psnr") == pytest.approx(old.get("psnr"), abs=1e-3)


@pytest.mark.slow
def test_committed_judge_finds_what_is_there():
    committed("judge")
    rows = toybox_figures.judge_scene_rows(Judge.load(), range(64))
    agreement = [1 - len({*row["present"]} ^ {*row["found"]}) / row["num_categories"] for row in rows]
    assert sum(agreement) / len(rows) > 0.9
    found = [name in row["found"] for row in rows for name in row["present"]]
    assert sum(found) / len(found) > 0.75  # accuracy alone is flattered by all that is absent


@pytest.mark.parametrize("name", ["judge/segmenter", "judge/identity", "dino", "image_encoder"])
def test_scorers_open_no_pickles(tmp_path, monkeypatch, name):
    shutil.copytree(committed(name.partition("/")[0]).parent, tmp_path / "world")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "world"))
    weights = tmp_path / "world" / name / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        CompositionScorer.of_toybox("cpu")


@pytest.mark.slow
def test_committed_base_paints():
    pipeline = StableDiffusionPipeline.from_pretrained(committed("base"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = toybox_figures.paint(pipeline, ["a photo of a dog", "a photo of a car"], [0, 1])
    assert images.isfinite().all() and images.shape[:2] == (2, 3) and images.std() > 0.02


def test_the_committed_tuning_fits_the_committed_base():
    unet = UNet2DConditionModel.from_pretrained(committed("base"), subfolder="unet", dtype=torch.float32)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    tuning = UNetDelta.load(committed("tokencompose") / DELTA_NAME)
    tuning.attach(unet)
    assert any(not torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    tuning.detach(unet)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
