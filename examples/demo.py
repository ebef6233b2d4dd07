"""`make demo`: pictures of one, two and three objects from the small model that comes with the repository.

    python -m objectcompose.examples.demo

Writes `outputs/demo/gallery.png` (the pictures, where each phrase was looked at, and which objects an independent
judge finds; the same prompts and noise after TokenCompose's fine-tuning; then a row for each of the other methods),
`outputs/demo/overview.png` (a row per method) and `outputs/demo/report.json` (prompts, seeds, the judge's findings,
seconds). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.errors import ObjectComposeError
from objectcompose.examples import demo_locref, demo_mifo, demo_object_prompt
from objectcompose.examples.gallery import GalleryRow, save_gallery
from objectcompose.examples.progress import step_counter
from objectcompose.files import write_atomically
from objectcompose.layout import SceneObject
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.pipelines.pipeline_output import ComposeOutput
from objectcompose.pipelines.plot import overlay_output
from objectcompose.toybox.judge import Judge
from objectcompose.toybox.scenes import list_objects
from objectcompose.toybox.weights import active_categories, toybox_path


# positions in the list of categories that the model was trained on, so that every preset has these scenes
DEMO_SCENES = ((0,), (1,), (2,), (3, 4), (5, 6), (7, 1), (2, 5, 0), (4, 6, 3))
DEMO_SEEDS = (11, 12)
TUNED_SCENES = (3, 4)  # of `DEMO_SCENES`, painted again after TokenCompose's fine-tuning
DEMO_STEPS, DEMO_GUIDANCE = 20, 5.0
_COUNT_WORDS = {1: "One object", 2: "Two objects", 3: "Three objects"}


@dataclass(frozen=True)
class MethodRow:
    """A row of a method with weights of its own.

    Attributes:
        paint: from pipeline, judge, seeds, steps and progress to the row and its entries of the report.
        runs: how often each picture is sampled; `progress` counts them all.
    """

    paint: Callable[[Any, Any, Sequence[int], int, Any], tuple[GalleryRow, list[dict[str, Any]]]]
    runs: int


METHOD_ROWS = (
    MethodRow(demo_locref.locref_row, demo_locref.DEMO_RUNS),
    MethodRow(demo_object_prompt.object_prompt_row, demo_object_prompt.DEMO_RUNS),
    MethodRow(demo_mifo.mifo_row, demo_mifo.DEMO_RUNS),
)


@dataclass(frozen=True)
class DemoScene:
    """A prompt and the categories that it names."""

    prompt: str
    categories: tuple[str, ...]


def demo_scenes(categories: Sequence[str]) -> list[DemoScene]:
    """The demo's fixed scenes, written with the names of a preset's categories (at least eight)."""
    chosen = [tuple(categories[index] for index in indices) for indices in DEMO_SCENES]
    return [DemoScene(f"a photo of {list_objects(names)}", names) for names in chosen]


def pictures_to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures of one size as `(B, 3, H, W)`, values in [0, 1]."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def paint_scene(pipeline: Any, scene: DemoScene, progress: Any, steps: int = DEMO_STEPS) -> ComposeOutput:
    """One picture per seed with the attention of each object's phrase; `progress` counts pictures times steps."""

    return pipeline(
        scene.prompt,
        num_inference_steps=steps,
        guidance_scale=DEMO_GUIDANCE,
        num_images_per_prompt=len(DEMO_SEEDS),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in DEMO_SEEDS],
        objects=[SceneObject(phrase=name) for name in scene.categories],
        return_attention=True,
        callback_on_step_end=step_counter(progress, len(DEMO_SEEDS)),
    )


def judge_scene(
    judge: Any, scene: DemoScene, images: Sequence[Image.Image], seconds: float, weights: str = "base"
) -> list[dict[str, Any]]:
    """The report's entries: per picture what the judge finds and which of the named objects are among it."""
    entries = []
    for seed, detections in zip(DEMO_SEEDS, judge.detect(pictures_to_tensor(images)), strict=True):
        found = [
            {
                "category": detection.category,
                "score": round(float(detection.score), 4),
                "box": [round(float(corner), 4) for corner in detection.box],
            }
            for detection in detections
        ]
        seen = {detection["category"] for detection in found}
        entries.append(
            {
                "prompt": scene.prompt,
                "weights": weights,
                "seed": seed,
                "found": found,
                "present": {name: name in seen for name in scene.categories},
                "seconds": round(seconds / len(DEMO_SEEDS), 3),
            }
        )
    return entries


def demo_caption(entry: dict[str, Any]) -> str:
    """What stands under a picture: the prompt, and which objects the judge finds."""
    verdicts = ", ".join(f"{name}: {'found' if seen else 'missing'}" for name, seen in entry["present"].items())
    return f"{entry['prompt']}, seed {entry['seed']}\njudge: {verdicts}"


def gallery_rows(
    scenes: Sequence[DemoScene], outputs: Sequence[ComposeOutput], entries: Sequence[Sequence[dict[str, Any]]]
) -> list[GalleryRow]:
    """One row per number of objects: each picture with its attention overlays."""
    rows = []
    for count in sorted({len(scene.categories) for scene in scenes}):
        images: list[Image.Image] = []
        captions: list[str] = []
        overlays: list[list[Image.Image]] = []
        for scene, output, found in zip(scenes, outputs, entries, strict=True):
            if len(scene.categories) == count:
                images += output.images
                captions += [demo_caption(entry) for entry in found]
                overlays += [list(by_label.values()) for by_label in overlay_output(output)]
        title = f"TokenComposePipeline: {_COUNT_WORDS.get(count, f'{count} objects').lower()}"
        rows.append(GalleryRow(f"{title}, and where each phrase was looked at", images, captions, overlays))
    return rows


def comparison_row(
    base: Sequence[ComposeOutput],
    tuned: Sequence[ComposeOutput],
    base_entries: Sequence[Sequence[dict[str, Any]]],
    tuned_entries: Sequence[Sequence[dict[str, Any]]],
) -> GalleryRow:
    """The first picture of each scene before and after fine-tuning, side by side, with their attention overlays."""
    images, captions, overlays = [], [], []
    for pair in zip(zip(base, base_entries, strict=True), zip(tuned, tuned_entries, strict=True), strict=True):
        for output, entries in pair:
            images.append(output.images[0])
            captions.append(f"{entries[0]['weights']}: {demo_caption(entries[0])}")
            overlays.append(list(overlay_output(output)[0].values()))
    return GalleryRow("The same noise before and after TokenCompose's fine-tuning", images, captions, overlays)


def write_report(path: Path, entries: Sequence[dict[str, Any]], steps: int, seconds: float) -> dict[str, Any]:
    """Write `report.json` (all of it or nothing); returns what it holds."""
    by_count: dict[str, list[float]] = {}
    for entry in (entry for entry in entries if entry["weights"] == "base"):
        by_count.setdefault(str(len(entry["present"])), []).append(float(all(entry["present"].values())))
    report = {
        "pipeline": "TokenComposePipeline",
        "steps": steps,
        "guidance_scale": DEMO_GUIDANCE,
        "all_objects_found": {count: sum(hits) / len(hits) for count, hits in sorted(by_count.items())},
        "seconds": round(seconds, 2),
        "pictures": list(entries),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    return report


def run_demo(
    pipeline: Any,
    judge: Any,
    tuning: UNetDelta,
    scenes: Sequence[DemoScene],
    out: Path,
    steps: int = DEMO_STEPS,
    tuned_scenes: Sequence[int] = TUNED_SCENES,
    methods: Sequence[MethodRow] = METHOD_ROWS,
) -> dict[str, Any]:
    """Paint, judge and write everything; returns the report.

    Args:
        pipeline: the base.
        judge: looks at the pictures.
        tuning: what TokenCompose's fine-tuning changed; the pipeline has it no more afterwards.
        scenes: of `demo_scenes`.
        out: folder of gallery and report.
        steps: of denoising.
        tuned_scenes: numbers of the scenes that are painted again with the tuning.
        methods: rows that follow.
    """
    started = time.perf_counter()
    pipeline.set_progress_bar_config(disable=True)  # one bar for the whole demo instead
    outputs, entries, tuned_outputs, tuned_entries = [], [], [], []
    chosen = [scenes[number] for number in tuned_scenes]
    runs = len(scenes) + len(chosen) + sum(method.runs for method in methods)
    method_rows, method_entries = [], []
    with tqdm(total=runs * len(DEMO_SEEDS) * steps, desc="painting", unit="step") as progress:
        for scene in scenes:
            output, found = paint_and_judge(pipeline, judge, scene, progress, steps, "base")
            outputs.append(output)
            entries.append(found)
        tuning.attach(pipeline.unet)
        for scene in chosen:
            output, found = paint_and_judge(pipeline, judge, scene, progress, steps, "TokenCompose")
            tuned_outputs.append(output)
            tuned_entries.append(found)
        tuning.detach(pipeline.unet)
        for method in methods:
            row, found = method.paint(pipeline, judge, DEMO_SEEDS, steps, progress)
            method_rows.append(row)
            method_entries.append(found)
    rows = gallery_rows(scenes, outputs, entries)
    before, before_entries = [outputs[number] for number in tuned_scenes], [entries[number] for number in tuned_scenes]
    overview = [comparison_row(before, tuned_outputs, before_entries, tuned_entries), *method_rows]
    save_gallery([*rows, *overview], out / "gallery.png", headline="objectcompose: several objects in one picture")
    save_gallery(overview, out / "overview.png")
    flat = [entry for found in [*entries, *tuned_entries, *method_entries] for entry in found]
    return write_report(out / "report.json", flat, steps, time.perf_counter() - started)


def paint_and_judge(
    pipeline: Any, judge: Any, scene: DemoScene, progress: Any, steps: int, weights: str
) -> tuple[ComposeOutput, list[dict[str, Any]]]:
    """A scene's pictures and the report's entries."""
    started = time.perf_counter()
    output = paint_scene(pipeline, scene, progress, steps)
    return output, judge_scene(judge, scene, output.images, time.perf_counter() - started, weights)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code (2: something that it needs is missing)."""
    parser = argparse.ArgumentParser(description="Paint the demo pictures with the embedded model.")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=DEMO_STEPS, help="denoising steps (%(default)s)")
    args = parser.parse_args(argv)
    try:
        pipeline, judge = load_checkpoint(), Judge.load()
        tuning = UNetDelta.load(toybox_path("tokencompose") / DELTA_NAME)
        report = run_demo(pipeline, judge, tuning, demo_scenes(active_categories()), args.out, args.steps)
    except ObjectComposeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    for count, share in report["all_objects_found"].items():
        print(f"{_COUNT_WORDS.get(int(count), count)}: the judge finds all of them in {share:.0%} of the pictures")
    print(f"{len(report['pictures'])} pictures in {report['seconds']:.0f} s")
    print(f"pictures: {(args.out / 'gallery.png').resolve()}")
    print(f"report:   {(args.out / 'report.json').resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
