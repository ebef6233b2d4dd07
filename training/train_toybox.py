"""Train all of toybox, model after model, in resumable parts; then write its record and its card.

    python -m objectcompose.training.train_toybox --preset cpu                # hours on two cores
    python -m objectcompose.training.train_toybox --preset gpu --minutes 9    # run again until it says "finished"
    python -m objectcompose.training.train_toybox --preset gpu --card_only    # only the record and the card

Each part is one of the `train_toybox_*` scripts in a process of its own; a run whose newest checkpoint has reached its
steps is skipped. `toybox.json` beside the weights says how each model was made, and its hash; `README.md` is the card.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from objectcompose.adapters.model_card import CardFigure, ModelCardFacts, figures_from_result, write_model_card
from objectcompose.command_help import script_parser
from objectcompose.files import write_atomically
from objectcompose.toybox.categories import PRESETS
from objectcompose.toybox.weights import weights_hash
from objectcompose.training import (
    train_toybox_base,
    train_toybox_clipseg,
    train_toybox_dino,
    train_toybox_image_encoder,
    train_toybox_judge,
    train_toybox_vae,
)
from objectcompose.training.common import Checkpointer, current_commit, read_log


VERSION = "toybox-1"
RESULT = Path("benchmarks/results/toybox.json")
CARD_FIGURES = (
    "judge.presence_accuracy", "judge.mask_iou", "judge.identity_accuracy", "vae.psnr", "base.one_object",
    "base.two_objects", "base.mg3", "base.seconds_per_image",
)  # fmt: skip
START_MINUTES = 0.5  # of a part, before its first step: imports, scenes
EXTRAS = {"train_toybox_base": ("--compile",)}  # where there is a compiler


@dataclass(frozen=True)
class Run:
    """One loop of one training script.

    Attributes:
        name: of its checkpoints, log and record.
        folder: of its weights, relative to toybox's folder.
        script: the module in `objectcompose.training`.
        steps: of each preset.
        samples: in a step.
        what: for the card.
    """

    name: str
    folder: str
    script: str
    steps: dict[str, int]
    samples: int
    what: str


def _run(name: str, folder: str, trainer: Any, what: str, per_item: int = 1) -> Run:
    script = trainer.__name__.rpartition(".")[2]
    return Run(name, folder, script, trainer.STEPS, trainer.BATCH_SIZE * per_item, what)


#: In this order, since the base needs the autoencoder; the quick ones come before the long one.
RUNS = (
    _run("vae", "base/vae", train_toybox_vae, "AutoencoderKL"),
    _run("judge_segmenter", "judge/segmenter", train_toybox_judge, "SegFormer, evaluation only"),
    _run("judge_identity", "judge/identity", train_toybox_judge, "ConvNeXt, evaluation only", per_item=4),
    _run("image_encoder", "image_encoder", train_toybox_image_encoder, "CLIP image encoder", per_item=2),
    _run("dino", "dino", train_toybox_dino, "DINOv2", per_item=2),
    _run("clipseg", "clipseg", train_toybox_clipseg, "CLIPSeg"),
    _run("base", "base", train_toybox_base, "text encoder and UNet"),
)


def steps_done(run: Run, runs: Path) -> int:
    """Steps of a run's newest checkpoint; 0 when it has none."""
    return max(Checkpointer(runs / run.name).steps(), default=0)


def has_weights(run: Run, weights: Path) -> bool:
    """Whether a run's model has been written."""
    needed = weights / run.folder / ("unet" if run.name == "base" else "")
    return any(needed.glob("*.safetensors"))


def is_finished(run: Run, preset: str, weights: Path, runs: Path) -> bool:
    """Whether a run has reached its steps and its model has been written."""
    return steps_done(run, runs) >= run.steps[preset] and has_weights(run, weights)


def seconds_trained(log: Path) -> float:
    """Seconds of a log over all its parts: each part counts from zero."""
    seconds = [float(line["seconds"]) for line in read_log(log)]
    return sum(now for now, after in itertools.pairwise([*seconds, 0.0]) if after < now)


def train(preset: str, minutes: float | None, weights: Path, runs: Path) -> bool:
    """Train what is not finished, for so long.

    Args:
        preset: "cpu" or "gpu".
        minutes: for all parts together; None for no limit.
        weights: where finished models lie.
        runs: the runs of this preset.

    Returns:
        Whether everything is finished now.

    Raises:
        subprocess.CalledProcessError: a part failed.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for script in dict.fromkeys(run.script for run in RUNS):
        left = [run for run in RUNS if run.script == script and not is_finished(run, preset, weights, runs)]
        if not left:
            continue
        command = [sys.executable, "-P", "-m", f"objectcompose.training.{script}", "--preset", preset]
        command += ["--weights", str(weights), "--runs", str(runs.parent)]
        if shutil.which("g++"):
            command += EXTRAS.get(script, ())
        if end is not None:
            # a script gives its minutes to each of its runs
            share = ((end - time.monotonic()) / 60 - START_MINUTES) / len(left)
            if share < START_MINUTES:
                return False
            command += ["--minutes", f"{share:.2f}"]
        print(" ".join(command[2:]), flush=True)
        subprocess.run(command, check=True)
        if not all(is_finished(run, preset, weights, runs) for run in left):
            return False  # out of time: what comes next may need what is not finished
    return True


def write_record(preset: str, weights: Path, runs: Path) -> dict[str, Any]:
    """Write `toybox.json`: version, preset, and for each model that exists its training and its hash.

    A model whose weights are those of the record that is already there keeps its entry: its commit, and its figures in
    a clone that has no runs.
    """
    path = weights / "toybox.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = old.get("models", {}) if old.get("preset") == preset else {}
    models: dict[str, Any] = {}
    weights_hash.cache_clear()  # a long-lived process may have seen other weights here
    for run in RUNS:
        if not has_weights(run, weights):
            continue
        digest = weights_hash(weights / run.folder)
        if known.get(run.name, {}).get("hash") == digest:
            models[run.name] = known[run.name]
            continue
        steps = steps_done(run, runs)
        models[run.name] = {
            "folder": run.folder,
            "steps": steps,
            "samples": steps * run.samples,
            "seconds": round(seconds_trained(runs / f"{run.name}.jsonl")),
            "commit": current_commit(),
            "hash": digest,
        }
    record = {"version": VERSION, "preset": preset, "models": models}
    weights.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    return record


def card_facts(record: dict[str, Any], result: Path = RESULT) -> ModelCardFacts:
    """What the card says, from the record and, where it was measured, the result file."""
    preset, models = PRESETS[record["preset"]], record["models"]
    rows = [
        "| model | what | steps | samples | minutes | commit | hash |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in RUNS:
        if run.name in models:
            one = models[run.name]
            rows.append(
                f"| `{one['folder']}` | {run.what} | {one['steps']} | {one['samples']} | {one['seconds'] / 60:.0f} "
                f"| {one['commit'][:10]}{'+' * one['commit'].endswith('+')} | {one['hash']} |"
            )
    smaller = "" if preset.name == "gpu" else " This is the smaller world: the bars for the GPU preset do not apply."
    summary = (
        f"**Preset: {preset.name}**, {len(preset.categories)} categories in {len(preset.styles)} drawing style(s), "
        f"{preset.image_size}x{preset.image_size} pixels.{smaller}\n\n"
        "The small world that objectcompose is shown and tested on: a text-to-image latent diffusion model in Stable "
        "Diffusion's layout, three encoders, and a judge that only evaluation uses. It knows nothing but toybox's "
        f"categories ({', '.join(preset.categories)}) and is of no use for anything else.\n\n" + "\n".join(rows)
    )
    figures: list[CardFigure] = []
    if result.is_file():
        measured = json.loads(result.read_text(encoding="utf-8"))
        if bool(measured["metrics"].get("preset_gpu")) == (preset.name == "gpu"):
            figures = figures_from_result(measured, [name for name in CARD_FIGURES if name in measured["metrics"]])
    commits = sorted({one["commit"] for one in models.values()})
    return ModelCardFacts(
        title=f"{record['version']}: a small world for composing objects",
        summary=summary,
        base_model="trained from scratch",
        base_license="none",
        code_license="Apache-2.0",
        weights_license="apache-2.0",
        data="scenes composed from three emoji sets by `objectcompose.toybox.scenes`, rendered from seeds",
        data_license="Fluent Emoji MIT, Noto Emoji Apache-2.0, Twemoji CC-BY-4.0; toybox/pictures/LICENSES.md",
        command=f"python -m objectcompose.training.train_toybox --preset {preset.name}",
        commit=", ".join(commits) or "unknown",
        figures=figures,
    )


def write_card(preset: str, weights: Path, runs: Path) -> None:
    """Write `toybox.json` and `README.md` for what exists now."""
    write_model_card(weights, card_facts(write_record(preset, weights, runs)))


def main() -> None:
    """Command line."""
    parser = script_parser(__doc__, shows_defaults=False)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="size of the world")
    parser.add_argument("--minutes", type=float, default=None, help="for all parts together; run again to go on")
    parser.add_argument("--weights", type=Path, default=Path("examples/toybox"), help="where finished models lie")
    parser.add_argument("--runs", type=Path, default=Path("runs/toybox"), help="checkpoints, logs and caches")
    parser.add_argument("--card_only", action="store_true", help="train nothing: only toybox.json and README.md")
    args = parser.parse_args()
    finished = args.card_only or train(args.preset, args.minutes, args.weights, args.runs / args.preset)
    write_card(args.preset, args.weights, args.runs / args.preset)
    if not args.card_only:
        print("finished" if finished else "stopped by the clock; run again to go on")


if __name__ == "__main__":
    main()
