"""How well toybox's CLIPSeg finds what is there, and what each grounding backend costs: `results/grounding.json`.

    python -m benchmarks.grounding                    # about 2 minutes on 2 cores
    python -m benchmarks.grounding --device cuda

Accuracy is measured on real weights against true masks of scenes that nothing was trained on. Times are those of the
sizes that the tests run on: SwinT at 224 pixels for `groundingdino-py`, toybox's CLIPSeg, and tiny random models
(`tests/grounding/helpers.py`) for the others, whose full weights are too large to come with a repository.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from objectcompose.evaluation.results import write_result
from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics
from objectcompose.grounding.clipseg import ClipSegDetector
from objectcompose.grounding.detection import merge_detections
from objectcompose.grounding.grounder import Grounder, load_grounder
from objectcompose.grounding.grounding_dino import GroundingDinoDetector
from objectcompose.grounding.original_grounding_dino import OriginalGroundingDino, build_original_grounding_dino
from objectcompose.grounding.original_sam import OriginalSam
from objectcompose.grounding.owlv2 import Owlv2Detector
from objectcompose.grounding.sam import SamSegmenter
from objectcompose.grounding.toybox_truth import ToyboxTruth
from objectcompose.toybox.scenes import with_article
from objectcompose.toybox.weights import active_preset, toybox_path, weights_hash
from tests.grounding import helpers


Row = dict[str, Any]

#: First number of a scene's seed: the split "test" of `objectcompose.training.toybox_data.SPLIT_SEEDS`.
SCENE_SPLIT = 2
FIRST_SCENE = 20_000  # the tests and the judge's figures take scenes from 0 and from 10,000 on
SCENES = 256
#: An object counts as present when at least this share of the picture shows it, as for the judge.
MIN_VISIBLE = 0.008
TIMINGS = 7
MASK_BOXES = ((0.1, 0.2, 0.6, 0.7), (0.3, 0.3, 1.0, 1.0))
PROTOCOL = (
    "clipseg: toybox's weights, default thresholds, on generated scenes of the test split from number"
    f" {FIRST_SCENE} on; every category is asked for, as 'a dog'. presence_accuracy: over categories per scene, where"
    f" an object is present when at least {MIN_VISIBLE:.1%} of the picture shows it (most are absent, so recall and"
    " precision stand beside it); mask_iou: of each present object with all that was found for its phrase, 0 when"
    " missed. Intervals: 95 % bootstrap over scenes. Seconds per picture, alone, two phrases (detectors), two boxes"
    " (segmenters; .boxes), or all parts from a 4 x 4 grid (.parts), after one warm-up: clipseg with toybox's weights,"
    " groundingdino-py SwinT at 224 pixels, the others tiny random models on 48 pixels."
)


def clipseg_rows(numbers: Sequence[int], device: str = "cpu") -> list[Row]:
    """What each scene shows, what CLIPSeg finds, and how well the masks fit."""
    preset = active_preset()
    phrases = [with_article(name) for name in preset.categories]
    grounder = load_grounder("clipseg", toybox_path("clipseg"), device=device, batch_size=16)
    rows: list[Row] = []
    for start in range(0, len(numbers), 32):
        part = numbers[start : start + 32]
        truth = ToyboxTruth(preset, [(SCENE_SPLIT, number) for number in part])
        asked = [phrases] * len(part)
        wanted = Grounder(truth).ground_batch(truth.pictures, asked, "skip")
        found = grounder.ground_batch(truth.pictures, asked, "skip")
        for number, there, seen in zip(part, wanted, found, strict=True):
            masks = {one.phrase: one.mask for one in there if one.mask is not None and one.mask.mean() >= MIN_VISIBLE}
            guesses = {one.phrase: one.mask for one in merge_detections(seen)}
            rows.append(
                {
                    "case": "scene",
                    "scene": number,
                    "num_phrases": len(phrases),
                    "present": sorted(str(phrase) for phrase in masks),
                    "found": sorted(str(phrase) for phrase in guesses),
                    "iou": [
                        round(_overlap(masks[phrase], guesses.get(phrase)), 4) for phrase in sorted(masks, key=str)
                    ],
                }
            )
    return rows


def _overlap(mask: torch.Tensor, guess: torch.Tensor | None) -> float:
    if guess is None:
        return 0.0
    return float((mask * guess).sum() / torch.maximum(mask, guess).sum())


def timed_backends(device: str) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; each call handles one picture."""
    picture, phrases = helpers.picture(), [["a dog", "a cup"]]
    scene = ToyboxTruth(active_preset(), [(SCENE_SPLIT, FIRST_SCENE)]).pictures[0]
    clipseg: Any = load_grounder("clipseg", toybox_path("clipseg"), device=device).detector
    with tempfile.TemporaryDirectory() as folder:
        swin_t = build_original_grounding_dino("swint", helpers.bert_folder(Path(folder))).to(device)
    detectors: dict[str, tuple[Any, Image.Image]] = {
        "clipseg": (clipseg, scene),
        "groundingdino-py": (OriginalGroundingDino(swin_t, short_side=224), picture),
        "tiny.clipseg": (ClipSegDetector(*_moved(helpers.clipseg(), device)), picture),
        "tiny.grounding-dino": (GroundingDinoDetector(*_moved(helpers.grounding_dino(), device)), picture),
        "tiny.owlv2": (Owlv2Detector(*_moved(helpers.owlv2(), device)), picture),
    }
    calls: dict[str, Callable[[], Any]] = {
        name: lambda one=one, seen=seen: one.detect([seen], phrases) for name, (one, seen) in detectors.items()
    }
    segmenters: dict[str, Any] = {
        "tiny.sam": SamSegmenter(*_moved(helpers.sam(), device), points_per_side=4),
        "tiny.sam2": SamSegmenter(*_moved(helpers.sam2(), device), points_per_side=4),
        "tiny.sam-hq": SamSegmenter(*_moved(helpers.sam_hq(), device), points_per_side=4),
        "tiny.segment-anything": OriginalSam(helpers.original_sam().to(device), points_per_side=4),
    }
    for name, segmenter in segmenters.items():
        calls[f"{name}.boxes"] = lambda one=segmenter: one.masks_in_boxes([picture], [MASK_BOXES])
        calls[f"{name}.parts"] = lambda one=segmenter: one.segment([picture])
    return calls


def _moved(parts: tuple[Any, Any], device: str) -> tuple[Any, Any]:
    return parts[0].to(device), parts[1]


def timing_rows(device: str = "cpu", count: int = TIMINGS) -> list[Row]:
    """Seconds of single pictures; the first one of each backend is not counted."""
    rows = []
    for name, call in timed_backends(device).items():
        for number in range(-1, count):
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                rows.append(
                    {"case": "seconds", "name": name, "number": number, "seconds": time.perf_counter() - began}
                )
    return rows


def metrics_of_rows(rows: Sequence[Row]) -> dict[str, float]:
    """All figures of the result file that follow from its rows."""
    scenes = [row for row in rows if row["case"] == "scene"]
    hits = [(row["scene"], phrase in row["found"]) for row in scenes for phrase in row["present"]]
    claims = [(row["scene"], phrase in row["present"]) for row in scenes for phrase in row["found"]]
    overlaps = [(row["scene"], iou) for row in scenes for iou in row["iou"]]
    accuracies = [1 - len(set(row["present"]) ^ set(row["found"])) / row["num_phrases"] for row in scenes]
    metrics = interval_metrics("clipseg.presence_accuracy", bootstrap_mean(accuracies))
    for name, pairs in (("mask_iou", overlaps), ("recall", hits), ("precision", claims)):
        interval = bootstrap_mean([float(value) for _, value in pairs], groups=[scene for scene, _ in pairs])
        metrics |= interval_metrics(f"clipseg.{name}", interval)
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["case"] == "seconds":
            times.setdefault(row["name"], []).append(row["seconds"])
    for name, seconds in times.items():
        metrics |= interval_metrics(f"{name}.seconds", bootstrap_mean(seconds))
    return metrics


def regenerate_rows(rows: Sequence[Row]) -> list[Row]:
    """The same rows made anew from the committed weights; seconds differ from run to run and are handed back."""
    made = {row["scene"]: row for row in clipseg_rows([row["scene"] for row in rows if row["case"] == "scene"])}
    return [made[row["scene"]] if row["case"] == "scene" else dict(row) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=SCENES, help="scenes that CLIPSeg is measured on (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of all models")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="where the result goes")
    args = parser.parse_args(argv)
    rows = clipseg_rows(range(FIRST_SCENE, FIRST_SCENE + args.scenes), args.device) + timing_rows(args.device)
    stated = {"toybox.preset": active_preset().name, "clipseg.weights": weights_hash(toybox_path("clipseg"))}
    metrics = {**metrics_of_rows(rows), **stated}
    command = "python -m benchmarks.grounding" + (f" --scenes {args.scenes}" if args.scenes != SCENES else "")
    path = write_result(
        "grounding",
        metrics,
        rows,
        command=command,
        seeds=[SCENE_SPLIT, FIRST_SCENE],
        protocol=PROTOCOL,
        recompute="benchmarks.grounding:metrics_of_rows",
        regenerate="benchmarks.grounding:regenerate_rows",
        weights={"clipseg": toybox_path("clipseg")},
        stated=tuple(stated),
        timing_fields=("seconds",),
        folder=args.folder,
    )
    for name, value in metrics.items():
        print(f"{name}: {value if isinstance(value, str) else round(value, 4)}")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
