"""`make demo`: pictures of one, two and three objects from the small model that comes with the repository.

    python -m objectcompose.examples.demo

Writes `outputs/demo/gallery.png` (the pictures, where each phrase was looked at, and which objects an independent
judge finds) and `outputs/demo/report.json` (prompts, seeds, the judge's findings, seconds). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from objectcompose.errors import ObjectComposeError
from objectcompose.examples.gallery import GalleryRow, save_gallery
from objectcompose.files import write_atomically
from objectcompose.layout import SceneObject
from objectcompose.pipelines.generate import load_checkpoint
from objectcompose.pipelines.pipeline_output import ComposeOutput
from objectcompose.pipelines.plot import overlay_output
from objectcompose.toybox.judge import Judge
from objectcompose.toybox.scenes import list_objects
from objectcompose.toybox.weights import active_categories


# positions in the list of categories that the model was trained on, so that every preset has these scenes
DEMO_SCENES = ((0,), (1,), (2,), (3, 4), (5, 6), (7, 1), (2, 5, 0), (4, 6, 3))
DEMO_SEEDS = (11, 12)
DEMO_STEPS, DEMO_GUIDANCE = 20, 5.0
_COUNT_WORDS = {1: "One object", 2: "Two objects", 3: "Three objects"}


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

    def count_step(_pipeline: Any, _step: int, _timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        progress.update(len(DEMO_SEEDS))
        return tensors

    return pipeline(
        scene.prompt,
        num_inference_steps=steps,
        guidance_scale=DEMO_GUIDANCE,
        num_images_per_prompt=len(DEMO_SEEDS),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in DEMO_SEEDS],
        objects=[SceneObject(phrase=name) for name in scene.categories],
        return_attention=True,
        callback_on_step_end=count_step,
    )


def judge_scene(judge: Any, scene: DemoScene, images: Sequence[Image.Image], seconds: float) -> list[dict[str, Any]]:
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


def write_report(path: Path, entries: Sequence[dict[str, Any]], steps: int, seconds: float) -> dict[str, Any]:
    """Write `report.json` (all of it or nothing); returns what it holds."""
    by_count: dict[str, list[float]] = {}
    for entry in entries:
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


def run_demo(pipeline: Any, judge: Any, scenes: Sequence[DemoScene], out: Path, steps: int = DEMO_STEPS) -> dict:
    """Paint, judge and write everything; returns the report."""
    started = time.perf_counter()
    pipeline.set_progress_bar_config(disable=True)  # one bar for the whole demo instead
    outputs, entries = [], []
    with tqdm(total=len(scenes) * len(DEMO_SEEDS) * steps, desc="painting", unit="step") as progress:
        for scene in scenes:
            scene_started = time.perf_counter()
            output = paint_scene(pipeline, scene, progress, steps)
            outputs.append(output)
            entries.append(judge_scene(judge, scene, output.images, time.perf_counter() - scene_started))
    rows = gallery_rows(scenes, outputs, entries)
    save_gallery(rows, out / "gallery.png", headline="objectcompose: several objects in one picture")
    flat = [entry for found in entries for entry in found]
    return write_report(out / "report.json", flat, steps, time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code (2: something that it needs is missing)."""
    parser = argparse.ArgumentParser(description="Paint the demo pictures with the embedded model.")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=DEMO_STEPS, help="denoising steps (%(default)s)")
    args = parser.parse_args(argv)
    try:
        pipeline, judge = load_checkpoint(), Judge.load()
        report = run_demo(pipeline, judge, demo_scenes(active_categories()), args.out, args.steps)
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
