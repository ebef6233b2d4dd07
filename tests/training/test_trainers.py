"""The training scripts end to end on tiny models: kill and resume, processes, exports that load."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from objectcompose.adapters.unet_delta import UNetDelta
from objectcompose.errors import CheckpointError, LayoutError, ObjectComposeError, PromptTooLongError
from objectcompose.training import train_separate_enhance, train_token_compose
from objectcompose.training.common import Checkpointer, read_log
from tests.tiny import tiny_components
from tests.training.captions_data import write_records


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_captions(tmp_path_factory.mktemp("data"))


def write_captions(folder: Path, end: str = "") -> Path:
    """Grounded captions of four small pictures."""
    folder.mkdir(exist_ok=True)
    rng, samples = np.random.default_rng(0), []
    for number, noun in enumerate(("dog", "cup", "corgi", "apple")):
        picture = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(picture)
        mask = torch.zeros(32, 32)
        mask[8 * (number % 2) :, 8:] = 1
        samples.append(
            (f"{number:03d}", picture, f"a {noun} on a table {end}".strip(), [(noun, mask), ("table", None)])
        )
    write_records(folder / "set", samples)
    return folder / "set"


def token_compose(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    arguments = ["--pretrained_model", str(base), "--data", str(data), "--output_dir", str(out), "--resolution", "32"]
    arguments += ["--max_train_steps", "6", "--gradient_accumulation_steps", "2", "--checkpointing_steps", "2"]
    return [*arguments, "--learning_rate", "1e-3", "--token_weight", "0.1", "--pixel_weight", "0.1", *more]


def state(out: Path) -> dict[str, torch.Tensor]:
    return Checkpointer(out / "checkpoints").latest()[1]["weights"]


def test_token_compose_whole_unet(base, data, tmp_path):
    arguments = token_compose(
        base, data, tmp_path, "--cache_dir", str(tmp_path / "cache"), "--validation_prompts", "a dog", "a cup",
        "--validation_steps", "3", "--report_to", "tensorboard", "--ema_decay", "0.9", "--gradient_checkpointing",
    )  # fmt: skip
    assert train_token_compose.main(arguments) == 0
    lines = read_log(tmp_path / "log.jsonl")
    assert len(lines) == 6 and {"loss", "ldm", "token", "pixel", "grad_norm"} <= lines[0].keys()
    assert {"empty_masks_16x16", "empty_masks_8x8", "empty_masks_4x4"} <= lines[0].keys()
    assert lines[0]["loss"] == pytest.approx(
        lines[0]["ldm"] + 0.1 * lines[0]["token"] + 0.1 * lines[0]["pixel"], rel=1e-4
    )
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["step-000003.png", "step-000006.png"]
    assert list((tmp_path / "tensorboard").iterdir()) and (tmp_path / "weights" / "README.md").is_file()
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "weights", subfolder="unet")
    pipeline = StableDiffusionPipeline.from_pretrained(base, unet=unet)
    assert pipeline("a dog", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 32, 32)


def test_a_folder_of_another_run_is_refused(base, data, tmp_path):
    """Else Separate-and-Enhance would go on from TokenCompose's checkpoint, whose parameters have the same names."""
    few = ("--train_modules", "to_k", "--max_train_steps", "1", "--checkpointing_steps", "1")
    arguments = token_compose(base, data, tmp_path, *few)
    assert train_token_compose.main(arguments) == 0
    card = (tmp_path / "weights" / "README.md").read_text()
    assert f"objectcompose.training.train_token_compose {shlex.join(arguments)}" in card  # not the running pytest
    assert train_token_compose.main([*arguments, "--validation_steps", "7"]) == 0
    with pytest.raises(CheckpointError, match="token_weight is 0.1 there and 0.2 here"):
        train_token_compose.main([*arguments, "--token_weight", "0.2"])
    with pytest.raises(CheckpointError, match="script is 'train_token_compose' there"):
        train_separate_enhance.main(
            ["--pretrained_model", str(base), "--concepts", "dog", "cup", "--output_dir", str(tmp_path)]
        )


def test_caching_changes_nothing(base, data, tmp_path):
    train_token_compose.main(token_compose(base, data, tmp_path / "plain"))
    for _ in range(2):  # written, then read
        out = tmp_path / "cached"
        train_token_compose.main(token_compose(base, data, out, "--cache_dir", str(tmp_path / "cache")))
        first, second = state(tmp_path / "plain"), state(out)
        assert all(torch.equal(first[name], second[name]) for name in first)
        subprocess.run(["rm", "-r", str(out)], check=True)


def run_until_step(
    command: list[str], out: Path, step: int, environment: dict[str, str], only_one_worker: bool = False
) -> None:
    """Start a run and kill it, or one of its processes, as soon as its log has reached a step."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(6000):
            if (out / "log.jsonl").is_file() and len(read_log(out / "log.jsonl")) >= step:
                break
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.05)
        if only_one_worker:
            workers = psutil.Process(process.pid).children()
            assert len(workers) == 2
            random.choice(workers).kill()
            assert process.wait(120) != 0  # the launcher ends the other one
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_killed_and_resumed_equals_unbroken(base, data, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-P", "-m", "objectcompose.training.train_token_compose"]
    more = ["--max_train_steps", "20", "--ema_decay", "0.9"]
    for out in ("unbroken", "killed"):
        command = [*script, *token_compose(base, data, tmp_path / out, *more)]
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
        load_file(tmp_path / out / "weights/unet/diffusion_pytorch_model.safetensors")
        for out in ("unbroken", "killed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("modules", ["attn2", "to_k"])
def test_delta_goes_onto_the_base_and_off_again(base, data, tmp_path, modules):
    train_token_compose.main(token_compose(base, data, tmp_path, "--train_modules", modules))
    delta = UNetDelta.load(tmp_path / "weights" / "unet_delta.safetensors")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    plain = {name: value.clone() for name, value in unet.state_dict().items()}
    delta.attach(unet)
    trained = state(tmp_path)
    for name, value in unet.state_dict().items():
        if name in trained:
            torch.testing.assert_close(value, trained[name], rtol=1e-3, atol=1e-4)  # half precision in the file
        else:
            assert torch.equal(value, plain[name])
    with pytest.raises(CheckpointError, match="already"):
        delta.attach(unet)
    delta.detach(unet)
    assert all(torch.equal(value, plain[name]) for name, value in unet.state_dict().items())


def test_low_rank_delta_of_the_whole_unet(base, data, tmp_path):
    train_token_compose.main(token_compose(base, data, tmp_path, "--delta_rank", "4"))
    delta = UNetDelta.load(tmp_path / "weights" / "unet_delta.safetensors")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    plain = {name: value.clone() for name, value in unet.state_dict().items()}
    delta.attach(unet)
    trained = state(tmp_path)
    left = sum(float((value - trained[name]).square().sum()) for name, value in unet.state_dict().items())
    change = sum(float((plain[name] - trained[name]).square().sum()) for name in trained)
    assert left < 0.8 * change


@pytest.mark.parametrize("modules", ["unet", "to_k", "lora"])
def test_the_last_line_loads_what_is_left(base, data, tmp_path, capsys, modules):
    few = ["--max_train_steps", "1", "--gradient_accumulation_steps", "1", "--train_modules", modules]
    train_token_compose.main(token_compose(base, data, tmp_path, *few))
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("to load them: ")
    pipe = StableDiffusionPipeline.from_pretrained(base)
    before = pipe.unet
    plain = {name: value.clone() for name, value in before.state_dict().items()}
    unet = eval(line) or pipe.unet  # the two other kinds change the pipeline's own
    changed = any(not torch.equal(value, plain.get(name, value)) for name, value in unet.state_dict().items())
    assert changed or (modules == "lora" and pipe.get_active_adapters())


def test_lora_loads_into_stable_diffusion(base, data, tmp_path):
    train_token_compose.main(token_compose(base, data, tmp_path, "--train_modules", "lora", "--lora_rank", "2"))
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)

    def paint() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a dog", num_inference_steps=2, output_type="pt", generator=generator).images

    before = paint()
    pipeline.load_lora_weights(tmp_path / "weights")
    assert not torch.equal(paint(), before)


def test_separate_enhance_trains_keys_only(base, tmp_path):
    arguments = ["--pretrained_model", str(base), "--concepts", "dog", "cup", "--output_dir", str(tmp_path)]
    arguments += ["--max_train_steps", "5", "--learning_rate", "1e-2", "--attention_grid", "8", "8"]
    assert train_separate_enhance.main([*arguments, "--norm_weight", "0.5"]) == 0
    delta = UNetDelta.load(tmp_path / "weights" / "unet_delta.safetensors")
    assert delta.tensors and all(name.endswith("attn2.to_k.weight:value") for name in delta.tensors)
    lines = read_log(tmp_path / "log.jsonl")
    assert {"separate", "enhance", "norm"} <= lines[0].keys() and lines[0]["norm"] == 0 < lines[-1]["norm"]


def test_bad_input_before_any_step(base, data, tmp_path):
    with pytest.raises(LayoutError, match=r"metadata\.jsonl"):
        train_token_compose.main(token_compose(base, tmp_path, tmp_path / "out"))
    with pytest.raises(CheckpointError):
        train_token_compose.main(token_compose(tmp_path / "none", data, tmp_path / "out"))
    with pytest.raises(LayoutError, match="toybox_scenes"):
        train_token_compose.main(["--toybox_scenes", "0", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ObjectComposeError, match="delta_rank.*got 0"):
        train_token_compose.main(token_compose(base, data, tmp_path / "out", "--delta_rank", "0"))
    with pytest.raises(ObjectComposeError, match="lora_rank"):
        train_token_compose.main(
            token_compose(base, data, tmp_path / "out", "--delta_rank", "2", "--train_modules", "lora")
        )
    longer = write_captions(tmp_path / "longer", "a " * 80)
    with pytest.raises(PromptTooLongError, match="4 of 4 captions"):
        train_token_compose.main(token_compose(base, longer, tmp_path / "out"))
    assert not (tmp_path / "out" / "checkpoints").exists()  # all of it before any step
    with pytest.raises(LayoutError, match="different"):
        train_separate_enhance.main(["--pretrained_model", str(base), "--concepts", "dog", "dog"])
    with pytest.raises(LayoutError, match="concepts_file"):
        train_separate_enhance.main(["--pretrained_model", str(base), "--concepts_file", str(tmp_path / "none.txt")])
    with pytest.raises(LayoutError):
        train_separate_enhance.main(["--pretrained_model", str(base), "--concepts", "dog", " "])
