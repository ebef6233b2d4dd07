"""`objectcompose evaluate` on a tiny model with a tiny detector; on toybox, killed, and by two processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time

import psutil
import pytest
import torch
from PIL import Image

from objectcompose.__main__ import main
from objectcompose.adapters.base_identity import identify_base
from objectcompose.adapters.unet_delta import UNetDelta
from objectcompose.evaluation.multigen import multigen_metrics
from objectcompose.evaluation.report import table_of_metrics
from objectcompose.toybox.weights import ENVIRONMENT_VARIABLE
from tests.evaluation.test_prompts import official_entry
from tests.grounding import helpers
from tests.pipelines.helpers import compose_pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    compose_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owlv2")
    for part in helpers.owlv2():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(
        json.dumps([official_entry(0, "dog", "cup"), official_entry(1, "dog", "wine glass", "teddy bear")])
    )
    return path


@pytest.fixture
def evaluate(checkpoint, detector, tmp_path):
    """Runs a metric on the tiny model into `out`; further arguments as given."""

    def run(metric, *arguments, out=tmp_path / "out", looks=True):
        common = ["--model", str(checkpoint), "--steps", "2", "--device", "cpu", "--out", str(out)]
        scoring = ["--detector", "owlv2", "--detector-model", str(detector)] if looks else []
        return main(["evaluate", metric, *common, *scoring, *map(str, arguments)])

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def report_of(out):
    return json.loads((out / "report.json").read_text())


def test_multigen_in_one_go_and_in_two_steps(evaluate, prompts, tmp_path, capsys):
    arguments = ["--prompts", prompts, "--rounds", 2]
    assert evaluate("multigen", *arguments) == 0
    report = report_of(tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert report["metrics"] == multigen_metrics(rows) and report["num_rows"] == len(rows) == 4
    assert {"mg2", "mg3", "mg2.std"} <= set(report["metrics"]) and "mg4" not in report["metrics"]
    assert report["painted_with"]["settings"]["num_inference_steps"] == 2
    assert report["detector"].startswith("owlv2:") and "2 prompts, 2 pictures each" in report["protocol"]
    assert "mg2 " in capsys.readouterr().out
    steps = tmp_path / "steps"
    assert evaluate("multigen", *arguments, "--only", "generate", out=steps) == 0
    assert not (steps / "report.json").exists() and "4 pictures" in capsys.readouterr().out
    assert evaluate("multigen", *arguments, "--only", "score", out=steps) == 0
    assert contents(steps / "pictures") == contents(tmp_path / "out" / "pictures")
    assert report_of(steps)["metrics"] == report["metrics"]


def test_other_thresholds_read_what_was_seen(evaluate, prompts, tmp_path):
    arguments = ["--prompts", prompts, "--rounds", 1]
    assert evaluate("multigen", *arguments) == 0
    [log] = (tmp_path / "out" / "sightings").rglob("*.jsonl")
    before = log.read_bytes()
    values = {}
    for threshold in ("0.01", "0.9999999"):
        assert evaluate("multigen", *arguments, "--only", "score", "--threshold", threshold) == 0
        values[threshold] = report_of(tmp_path / "out")["metrics"]["mg2"]
    assert log.read_bytes() == before and values["0.9999999"] < values["0.01"]


@pytest.mark.parametrize(("metric", "figure"), [("visor", "object_accuracy"), ("pairs", "both")])
def test_two_objects(evaluate, tmp_path, metric, figure):
    assert evaluate(metric, "--rounds", 1, "--max-prompts", 3) == 0
    assert figure in report_of(tmp_path / "out")["metrics"]
    assert sorted(contents(tmp_path / "out" / "pictures")) == ["0_0.png", "1_0.png", "2_0.png"]


def test_compbench_leaves_what_its_scorers_read(evaluate, tmp_path):
    path = tmp_path / "color_val.txt"
    path.write_text("a red dog and a blue cup\na blue dog and a red cup\n")
    assert evaluate("compbench", "--prompts", path, "--rounds", 2, looks=False) == 0
    names = list(contents(tmp_path / "out" / "pictures"))
    assert names == [
        "a blue dog and a red cup_000001.png",
        "a blue dog and a red cup_000003.png",
        "a red dog and a blue cup_000000.png",
        "a red dog and a blue cup_000002.png",
    ]


def test_pictures_of_others_are_scored(evaluate, prompts, tmp_path):
    folder = tmp_path / "out" / "pictures"
    folder.mkdir(parents=True)
    for number in range(2):
        helpers.picture(number).save(folder / f"{number}_0.png")
    assert evaluate("multigen", "--prompts", prompts, "--rounds", 1, "--only", "score") == 0
    assert report_of(tmp_path / "out")["painted_with"] is None
    assert evaluate("multigen", "--prompts", prompts, "--rounds", 1) == 2  # nothing is painted among them


def test_fine_tuned_parts_change_the_pictures(evaluate, checkpoint, prompts, tmp_path, capsys):
    pipeline = compose_pipeline()
    made_for = identify_base(pipeline.unet)
    before = {name: value.detach().clone() for name, value in pipeline.unet.named_parameters()}
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(1.5)
    pipeline.unet.save_pretrained(tmp_path / "weights" / "unet")
    delta = UNetDelta.between(before, dict(pipeline.unet.named_parameters()), made_for, dtype=torch.float32)
    delta.save(tmp_path / "unet_delta.safetensors")
    arguments = ["--prompts", prompts, "--rounds", 1, "--only", "generate", "--max-prompts", 1]
    made = {}
    for name, extra in {
        "base": [],
        "unet": ["--unet", tmp_path / "weights"],
        "delta": ["--delta", tmp_path / "unet_delta.safetensors"],
    }.items():
        assert evaluate("multigen", *arguments, *extra, out=tmp_path / name) == 0
        made[name] = contents(tmp_path / name / "pictures")
    assert made["unet"] == made["delta"] != made["base"]
    capsys.readouterr()
    assert evaluate("multigen", *arguments, out=tmp_path / "unet") == 2
    assert "model.unet is" in capsys.readouterr().err


def test_a_lora_changes_the_pictures(evaluate, checkpoint, prompts, tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = compose_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), "default")
    layers = get_peft_model_state_dict(unet, adapter_name="default")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, weight_name="lora.safetensors")
    arguments = ["--prompts", prompts, "--rounds", 1, "--only", "generate", "--max-prompts", 1]
    assert evaluate("multigen", *arguments, out=tmp_path / "base") == 0
    assert evaluate("multigen", *arguments, "--lora", tmp_path / "lora.safetensors", out=tmp_path / "lora") == 0
    assert contents(tmp_path / "lora" / "pictures") != contents(tmp_path / "base" / "pictures")


BROKEN = {"broken.json": "[{]", "empty.json": "[]", "empty.txt": "\n"}


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        ("multigen", [], "`--prompts` must be a JSON file or one of coco"),
        ("multigen", ["--prompts", "none.json"], "none.json"),
        ("multigen", ["--prompts", "broken.json"], "line 1"),
        ("multigen", ["--prompts", "empty.json"], "at least one entry"),
        ("multigen", ["--prompts", "toybox-dev", "--only", "score"], "480 of 480 are missing"),
        ("multigen", ["--prompts", "toybox-dev", "--max-prompts", "0"], "--max-prompts"),
        ("multigen", ["--prompts", "toybox-dev", "--threshold", "2"], "--threshold"),
        ("visor", ["--rounds", "0"], "`rounds`"),
        ("visor", ["--device", "abacus"], "abacus"),
        ("pairs", ["--only", "generate", "--unet", "nowhere"], "--unet"),
        ("pairs", ["--only", "generate", "--delta", "nowhere"], "nowhere"),
        ("pairs", ["--only", "generate", "--lora", "nowhere.safetensors"], "nowhere"),
        ("pairs", ["--only", "generate", "--delta", "a", "--unet", "b"], "must not both"),
        ("pairs", ["--only", "generate", "--batch-size", "0"], "batch_size"),
        ("compbench", ["--prompts", "empty.txt"], "at least one line"),
        ("fd", ["--scenes", "1"], "--scenes"),
        ("fd", ["--prompts", "empty.txt"], "needs `--real`"),
        ("fd", ["--real", "more"], "either `--prompts`"),
        ("fd", ["--features", "inception"], "weights are not downloaded"),
        ("fd", ["--pictures", "nowhere"], "at least 2 pictures"),
        ("fd", ["--pictures", "more", "--only", "score"], "must not both"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(evaluate, tmp_path, monkeypatch, capsys, metric, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, text in BROKEN.items():
        (tmp_path / name).write_text(text)
    for number in range(2):
        (tmp_path / "more").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "more" / f"{number}.png")
    assert evaluate(metric, *arguments, looks=metric in ("multigen", "visor", "pairs")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"objectcompose evaluate {metric}: ") and message in error
    assert not (tmp_path / "out" / "report.json").exists()


def test_unknown_metric_and_detector_are_usage_errors(capsys):
    for arguments in (["evaluate"], ["evaluate", "taste"], ["evaluate", "visor", "--out", "x", "--detector", "yolo"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert "yolo" in capsys.readouterr().err


def test_without_model_toybox_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    assert main(["evaluate", "multigen", "--out", str(tmp_path / "out")]) == 2
    assert "toybox.json" in capsys.readouterr().err


def test_table():
    table = table_of_metrics({"mg2": 75.0, "mg2.lo": 50.0, "mg2.hi": 100.0, "mg2.std": 25.0, "threshold": 0.35})
    assert table.splitlines() == ["mg2               75  [50, 100]  std 25", "threshold       0.35"]


TOYBOX = ["--rounds", "1", "--steps", "4", "--batch-size", "2", "--device", "cpu"]


@pytest.mark.slow
def test_prompts_that_the_judge_does_not_know(tmp_path, prompts, capsys):
    prompts.write_text(json.dumps([official_entry(0, "dog", "lion")]))
    assert main(["evaluate", "multigen", "--prompts", str(prompts), *TOYBOX, "--out", str(tmp_path / "out")]) == 2
    assert "got lion" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out" / "pictures").exists()


def started(program, pictures, count):
    """A run that has painted so many pictures, and is still running."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(pictures.glob("*.png"))) < count and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_killed_and_shared_runs_equal_a_whole_one(tmp_path):
    """One run in one go; one killed, gone on with by two processes of which one is killed, and then by two."""
    arguments = ["evaluate", "multigen", "--max-prompts", "20", *TOYBOX]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    whole, pictures = contents(tmp_path / "whole" / "pictures"), tmp_path / "broken" / "pictures"
    command = ["-m", "objectcompose", *arguments, "--out", str(tmp_path / "broken")]
    shared = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    alone = started([sys.executable, "-P", *command], pictures, 3)
    alone.kill()
    alone.wait()
    left = contents(pictures)
    assert 3 <= len(left) < 20 and left.items() <= whole.items()
    both = started(shared, pictures, len(left) + 3)
    workers = psutil.Process(both.pid).children()
    assert len(workers) == 2
    random.choice(workers).kill()
    assert both.wait(120) != 0  # the launcher ends the other one
    assert len(left) + 3 <= len(contents(pictures)) < 20 and contents(pictures).items() <= whole.items()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(shared, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-8000:]
    assert contents(pictures) == whole
    assert report_of(tmp_path / "broken")["metrics"] == report_of(tmp_path / "whole")["metrics"]
    assert done.stdout.count("report.json") == 1  # two processes report as one
    logs = sorted(path.name for path in (tmp_path / "broken" / "sightings").rglob("*.jsonl"))
    assert logs == ["process-0.jsonl", "process-1.jsonl"]


@pytest.mark.slow
def test_distance_and_maps_of_toybox(tmp_path):
    """The other metrics on the embedded model, two pictures or scenes each."""
    steps = ["--steps", "2", "--device", "cpu"]
    assert main(["evaluate", "fd", "--scenes", "4", *steps, "--out", str(tmp_path / "fd")]) == 0
    assert report_of(tmp_path / "fd")["metrics"]["fd_judge"] > 0
    assert (tmp_path / "fd" / "features.safetensors").is_file()
    again = ["--pictures", str(tmp_path / "fd" / "pictures"), "--scenes", "4", "--out", str(tmp_path / "again")]
    assert main(["evaluate", "fd", "--device", "cpu", *again]) == 0
    assert report_of(tmp_path / "again")["metrics"] == report_of(tmp_path / "fd")["metrics"]
    assert report_of(tmp_path / "again")["painted_with"] == report_of(tmp_path / "fd")["painted_with"] is not None
    maps = ["--scenes", "4", "--dev-scenes", "3", "--timesteps", "400", "--device", "cpu"]
    assert main(["evaluate", "map-iou", *maps, "--out", str(tmp_path / "maps")]) == 0
    metrics = report_of(tmp_path / "maps")["metrics"]
    assert 0 < metrics["map_iou"] < 1 and 0 < metrics["map_inside"] < 1
    pairs = ["--rounds", "1", "--max-prompts", "2", *steps]
    assert main(["evaluate", "pairs", *pairs, "--out", str(tmp_path / "pairs")]) == 0
    assert set(report_of(tmp_path / "pairs")["metrics"]) >= {"both", "both.held_out"}
