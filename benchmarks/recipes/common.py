"""What the recipes share: arms that are trained once, tuned on the dev split by equal budgets, and compared in pairs.

A recipe keeps everything under one folder, `<out>/<arm>/`, and every part of it knows when it is done: a run that was
broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.evaluation.results import RESULTS_FOLDER, measured_checkout, write_result
from objectcompose.evaluation.statistics import interval_metrics, paired_difference
from objectcompose.files import write_atomically
from objectcompose.pipelines.checkpoints import load_checkpoint, load_unet
from objectcompose.toybox.weights import toybox_path


Row = dict[str, Any]
Options = Mapping[str, str | int | float | Sequence[str]]
PRESET_NAMES = ("smoke", "cpu", "gpu")
#: Steps and guidance with which the toybox is sampled everywhere.
STEPS, GUIDANCE = 20, 5.0


@dataclass(frozen=True)
class Arm:
    """One side of a comparison that is trained.

    Attributes:
        name: of the arm.
        train: `main` of a training script.
        options: of that script, all but steps, output and those of the candidates.
        candidates: what the dev split chooses from; as many for every arm of a recipe.
    """

    name: str
    train: Callable[[Sequence[str]], int]
    options: Options
    candidates: tuple[Options, ...]


def recipe_parser(description: str, name: str, presets: Sequence[str] = PRESET_NAMES) -> argparse.ArgumentParser:
    """Parser with the options that every recipe has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=presets, default="smoke", help="how large it is (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=None, help=f"folder of all that it makes; default: outputs/reproduce/{name}-PRESET"
    )
    parser.add_argument("--arms", nargs="+", default=None, metavar="ARM", help="only these; default: the preset's")
    parser.add_argument("--record", action="store_true", help="write the result file too, not only the report")
    return parser


def parse_recipe(parser: argparse.ArgumentParser, name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a recipe, whose folder `out` is there then."""
    args = parser.parse_args(argv)
    if args.record and args.arms:
        raise SystemExit("`--record` needs all arms of the preset: leave `--arms` out.")
    if args.record and args.preset == "smoke":
        raise SystemExit("`--record` needs another preset: smoke shows that a recipe runs, and measures nothing.")
    args.recipe, args.checkout = name, measured_checkout()
    args.out = args.out or Path("outputs") / "reproduce" / f"{name}-{args.preset}"
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def record_outcome(
    args: argparse.Namespace,
    metrics: Mapping[str, float | bool],
    rows: Sequence[Row],
    protocol: str,
    sheet: Path,
    name: str | None = None,
    **more: Any,
) -> None:
    """Write the recipe's result file, and its contact sheet beside it.

    Args:
        args: of `parse_recipe`.
        metrics, rows, protocol: see `write_result`.
        sheet: PNG of the run.
        name: of the file; None: the recipe's and `_toybox`.
        more: further arguments of `write_result`.
    """
    module = args.recipe.replace("-", "_")
    name = name or f"{module}_toybox"
    write_result(
        name,
        metrics,
        rows,
        command=f"make reproduce-{args.recipe} PRESET={args.preset} ARGS=--record",
        protocol=protocol,
        recompute=f"benchmarks.recipes.{module}_metrics:metrics_of_rows",
        checkout=args.checkout,
        **more,
    )
    write_atomically(RESULTS_FOLDER / f"{name}_sheet.png", sheet.read_bytes())


def model_file(folder: Path) -> Path:
    """The one file of weights in a folder that training wrote: what result files hold the hash of."""
    [path] = [folder / name for name in (DELTA_NAME, SAFETENSORS_WEIGHTS_NAME) if (folder / name).is_file()]
    return path


def measured_weights(arms: Sequence[str], weights: Callable[[str], Path | None]) -> dict[str, Path]:
    """What a result file holds hashes of: the base, and the file of each arm that `weights` has some of."""
    folders = {name: weights(name) for name in arms}
    return {"base": toybox_path("base"), **{name: model_file(one) for name, one in folders.items() if one is not None}}


def left_out(arms: Sequence[str], known: Sequence[str]) -> str:
    """What a protocol says of arms that a preset has no time for."""
    missing = [name for name in known if name not in arms]
    return f" Left out for time in this preset: {', '.join(missing)}." if missing else ""


def choices(out: Path, arms: Sequence[str]) -> str:
    """What a protocol says of trials: the score of each candidate on the dev split, the chosen one first."""
    lines = []
    for name in arms:
        if (path := out / name / "choice.json").is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            ordered = sorted(record["trials"], key=lambda trial: -trial["score"])
            found = "; ".join(f"{_listed(trial['options'])}: {trial['score']:.3f}" for trial in ordered)
            lines.append(f" Trials of {name}, {record['steps']} steps each, the chosen one first: {found}.")
    return "".join(lines)


def _listed(options: Options) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()
    )


def check_arms(names: Sequence[str], known: Sequence[str]) -> None:
    """End the program where an arm is not known."""
    unknown = set(names) - set(known)
    if unknown:
        raise SystemExit(f"`--arms` must be some of {', '.join(known)}, got {', '.join(sorted(unknown))}.")


def metrics_of_arm(metrics: Mapping[str, float], arm: str) -> dict[str, float]:
    """`mg3.lo` becomes `mg3.<arm>.lo`."""
    named = {}
    for key, value in metrics.items():
        figure, dot, rest = key.partition(".")
        named[f"{figure}.{arm}{dot}{rest}"] = value
    return named


def command_line(options: Options) -> list[str]:
    """Options as arguments of a script; a list stands behind its option."""
    arguments = []
    for name, value in options.items():
        values = [value] if isinstance(value, str | int | float) else value
        arguments += [f"--{name}", *map(str, values)]
    return arguments


def keep_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Write down what all in a folder follows from, so that nothing there is taken for that of another plan.

    Raises:
        SystemExit: the folder holds another plan.
    """
    path, planned = folder / "plan.json", json.dumps(plan, indent=2) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != planned:
        raise SystemExit(f"{folder} belongs to a run with other options or steps: name another `--out`, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, planned.encode())


def train_once(arm: Arm, options: Options, steps: int, out: Path) -> Path:
    """Train an arm, or go on with a run that was broken off, or do nothing when it is done.

    Args:
        arm: the arm.
        options: in addition to the arm's own, such as the chosen candidate.
        steps: optimizer steps.
        out: folder of the run.

    Returns:
        Folder of the weights.

    Raises:
        SystemExit: the folder holds weights of other options.
    """
    weights = out / "weights"
    given = {**arm.options, **options, "max_train_steps": steps}
    keep_plan(out, given)
    if not weights.is_dir():
        print(f"== {arm.name}: {steps} steps, {dict(options)}")
        code = arm.train(command_line({**given, "output_dir": str(out)}))
        assert code == 0 and weights.is_dir(), f"training {arm.name} failed"
    return weights


def load_arm(weights: Path | None, device: str) -> Any:
    """The toybox base with an arm's weights on it, silent, in float32; None is the base itself."""
    pipeline = load_checkpoint(None, device)
    if weights is not None and (weights / DELTA_NAME).is_file():
        UNetDelta.load(weights / DELTA_NAME).attach(pipeline.unet)
    elif weights is not None:
        pipeline.register_modules(unet=load_unet(weights).to(device))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def choose_candidate(arm: Arm, steps: int, out: Path, score: Callable[[Path], float]) -> Options:
    """The candidate with the highest score on the dev split, each trained for `steps`; kept in `choice.json`.

    Args:
        arm: with one candidate or more; a single one is taken as it is.
        steps: of each trial.
        out: the arm's folder.
        score: of trained weights.

    Raises:
        SystemExit: the folder holds a choice from other candidates or steps.
    """
    if len(arm.candidates) == 1:
        return arm.candidates[0]
    keep_plan(out / "trials", {**arm.options, "candidates": arm.candidates, "steps": steps})
    path = out / "choice.json"
    if not path.is_file():
        trials = []
        for number, candidate in enumerate(arm.candidates):
            weights = train_once(arm, candidate, steps, out / f"trial-{number}")
            trials.append({"options": dict(candidate), "score": score(weights)})
            print(f"== {arm.name}: {trials[-1]}")
        best = max(trials, key=lambda trial: trial["score"])
        record = {"steps": steps, "trials": trials, "chosen": best["options"]}
        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    return json.loads(path.read_text(encoding="utf-8"))["chosen"]


def paired_metrics(
    name: str,
    ours: Sequence[Row],
    theirs: Sequence[Row],
    value: Callable[[Row], float],
    pair: Sequence[str],
    group: str,
) -> dict[str, float]:
    """Mean difference of two arms with its bounds, over rows of the same prompts and noise.

    Args:
        name: of the metric.
        ours, theirs: rows of the two arms.
        value: of a row.
        pair: fields that pair a row of one arm with one of the other.
        group: field whose rows are drawn together.
    """
    other = {tuple(row[field] for field in pair): value(row) for row in theirs}
    keys = [tuple(row[field] for field in pair) for row in ours]
    assert set(keys) == set(other) and len(keys) == len(other), f"{name}: the arms have other rows"
    difference = paired_difference(
        [value(row) for row in ours], [other[key] for key in keys], groups=[row[group] for row in ours]
    )
    return interval_metrics(name, difference)


def trained_share(weights: Path) -> float:
    """Numbers that a delta holds over the parameters of the base's UNet."""
    unet = load_checkpoint(None, "cpu").unet
    names = {name.partition(":")[0] for name in UNetDelta.load(weights / DELTA_NAME).tensors}
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    return sum(sizes[name] for name in names) / sum(sizes.values())


def best_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
