"""What toybox can do: is the judge to be trusted, how sharp is the autoencoder, how often does the base obey?

Every row says how it is made again (scene, trial, or prompt and seed), so `regenerate_rows` needs nothing else. Scenes
are of the "test" split, which nothing was trained on; prompts are drawn from a fixed seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics
from objectcompose.grounding.toybox_truth import scene_picture
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.identities import Identity, sample_identity
from objectcompose.toybox.judge import MIN_AREA, Judge
from objectcompose.toybox.scenes import SceneBatch, list_objects, render_scenes, sample_scene
from objectcompose.toybox.weights import active_preset, toybox_path
from objectcompose.training.toybox_contrastive import render_views
from objectcompose.training.toybox_data import SPLIT_SEEDS


Row = dict[str, Any]

LOOK_ALIKES = 20
PROMPT_SEED = 5_2025
STEPS = 20
GUIDANCE = 5.0
BATCH = 8  # pictures painted at once
TIMINGS = 5
PROTOCOL = (
    "Judge: generated scenes of the test split; a category is present when at least"
    f" {MIN_AREA:.1%} of the picture shows it; accuracy over categories per scene, recall and precision beside it,"
    " since most categories are absent; mask IoU of each present object with all that the judge finds of its category"
    f" (0 when missed); identity: {LOOK_ALIKES} different identities of one category, nearest embedding of another"
    " pose. VAE: PSNR of decoded latent means. Base: prompts in the captions' own wording, fixed list,"
    f" {STEPS} DDIM steps, guidance {GUIDANCE:g}; all named objects found by the judge, for 1 and 2 named;"
    " mg2 to mg5: at least that many found of 5 named. Seconds: one picture alone, after a first one. Intervals: 95 %"
    " bootstrap over scenes, trials or pictures."
)


def held_out_scenes(preset: Preset, numbers: Sequence[int]) -> SceneBatch:
    """Scenes of the test split."""
    return render_scenes(preset, [sample_scene(preset, (SPLIT_SEEDS["test"], number)) for number in numbers])


def judge_scene_rows(judge: Judge, numbers: Sequence[int]) -> list[Row]:
    """What is in each scene, what the judge finds, and how well the masks fit."""
    rows = []
    for start in range(0, len(numbers), 32):
        part = numbers[start : start + 32]
        scenes = held_out_scenes(judge.preset, part)
        for row, (number, detections) in enumerate(zip(part, judge.detect(scenes.pixels), strict=True)):
            ious = {}
            for place, identity in enumerate(scenes.specs[row].identities):
                visible = scenes.visible[row, place]
                if visible.mean() >= MIN_AREA:
                    found = torch.zeros_like(visible)
                    for detection in detections:
                        if detection.category == identity.category:
                            found = torch.maximum(found, detection.mask)
                    union = torch.maximum(visible, found).sum()
                    ious[identity.category] = float((visible * found).sum() / union)
            found_names = sorted({detection.category for detection in detections})
            rows.append(
                {
                    "case": "scene",
                    "scene": number,
                    "num_categories": len(judge.preset.categories),
                    "present": sorted(ious),
                    "found": found_names,
                    "iou": [round(ious[name], 4) for name in sorted(ious)],
                }
            )
    return rows


def look_alikes(preset: Preset, trial: int) -> list[Identity]:
    """`LOOK_ALIKES` different identities of one category."""
    rng = np.random.default_rng((SPLIT_SEEDS["test"], trial, LOOK_ALIKES))
    category = str(rng.choice(preset.categories))
    chosen: dict[Identity, None] = {}  # in the order drawn; most drawings with natural colours are one identity
    while len(chosen) < LOOK_ALIKES:
        chosen[sample_identity(preset, category, rng)] = None
    return list(chosen)


def identity_rows(judge: Judge, trials: Sequence[int]) -> list[Row]:
    """How many of the look-alikes each find themselves in another pose."""
    rows = []
    for trial in trials:
        identities = look_alikes(judge.preset, trial)
        first, second = (
            judge.embed(render_views(judge.preset, identities, (SPLIT_SEEDS["test"], trial, number)))
            for number in (1, 2)
        )
        nearest = (first @ second.T).argmax(1).tolist()
        correct = sum(place == found for place, found in enumerate(nearest))
        rows.append({"case": "identity", "trial": trial, "category": identities[0].category, "correct": correct})
    return rows


@torch.no_grad()
def vae_rows(vae: AutoencoderKL, preset: Preset, numbers: Sequence[int]) -> list[Row]:
    """PSNR in dB of each scene's reconstruction, both in [0, 1]."""
    rows = []
    for start in range(0, len(numbers), 16):
        part = numbers[start : start + 16]
        pixels = held_out_scenes(preset, part).pixels.to(vae.device)
        decoded = vae.decode(vae.encode(pixels * 2 - 1).latent_dist.mode()).sample
        errors = ((decoded / 2 + 0.5).clamp(0, 1) - pixels).square().mean((1, 2, 3)).tolist()
        rows += [
            {"case": "vae", "scene": number, "psnr": round(-10 * math.log10(error), 4)}
            for number, error in zip(part, errors, strict=True)
        ]
    return rows


def base_prompts(preset: Preset, count: int) -> list[Row]:
    """Prompts that name 1, 2 and 5 objects, `count` of each, with their seeds: always the same for a preset."""
    rng = np.random.default_rng(PROMPT_SEED)
    rows = []
    for objects in (1, 2, 5):
        for number in range(count):
            if objects == 1:  # every category in turn
                named = [preset.categories[number % len(preset.categories)]]
            else:
                named = [str(name) for name in rng.choice(preset.categories, size=objects, replace=False)]
            rows.append(
                {
                    "case": "base",
                    "objects": objects,
                    "prompt": f"a photo of {list_objects(named)}",
                    "seed": 1000 * objects + number,
                    "named": named,
                }
            )
    return rows


def paint(pipeline: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1]; each has its own seed, so the batch does not matter."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        list(prompts),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=generators,
        output_type="pt",
    ).images.cpu()


def base_rows(
    pipeline: StableDiffusionPipeline,
    judge: Judge,
    prompts: Sequence[Row],
    keep: Callable[[Row, Image.Image], None] | None = None,
) -> list[Row]:
    """Which of the named objects the judge finds in each painted picture.

    Args:
        pipeline: the base.
        judge: looks at the pictures.
        prompts: of `base_prompts`.
        keep: called with each finished row and its picture.
    """
    rows = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        images = paint(pipeline, [row["prompt"] for row in part], [row["seed"] for row in part])
        for row, image, detections in zip(part, images, judge.detect(images), strict=True):
            seen = {detection.category for detection in detections}
            rows.append({**row, "found": [name for name in row["named"] if name in seen]})
            if keep is not None:
                keep(rows[-1], scene_picture(image))
    return rows


def timing_rows(pipeline: StableDiffusionPipeline, preset: Preset, count: int = TIMINGS) -> list[Row]:
    """Seconds for one picture alone; the first one is not counted."""
    prompt = f"a photo of {list_objects(preset.categories[:2])}"
    rows = []
    for number in range(-1, count):
        began = time.perf_counter()
        paint(pipeline, [prompt], [0])
        if number >= 0:
            rows.append({"case": "seconds", "number": number, "seconds": time.perf_counter() - began})
    return rows


def load_base(device: str | torch.device = "cpu") -> StableDiffusionPipeline:
    """The committed base in fp32, silent."""
    pipeline = StableDiffusionPipeline.from_pretrained(toybox_path("base"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def metrics_of_rows(rows: Sequence[Row]) -> dict[str, float]:
    """All figures of the result file that follow from its rows."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    scenes, base = cases["scene"], cases["base"]
    by_count = {objects: [row for row in base if row["objects"] == objects] for objects in (1, 2, 5)}
    hits = [(row["scene"], name in row["found"]) for row in scenes for name in row["present"]]
    claims = [(row["scene"], name in row["present"]) for row in scenes for name in row["found"]]
    ious = [(row["scene"], iou) for row in scenes for iou in row["iou"]]
    # values with what they are grouped by: objects of one scene are not independent
    estimates: dict[str, tuple[list[float], list[int] | None]] = {
        "judge.presence_accuracy": (
            [1 - len(set(row["present"]) ^ set(row["found"])) / row["num_categories"] for row in scenes],
            None,
        ),
        "judge.recall": ([float(hit) for _, hit in hits], [scene for scene, _ in hits]),
        "judge.precision": ([float(right) for _, right in claims], [scene for scene, _ in claims]),
        "judge.mask_iou": ([iou for _, iou in ious], [scene for scene, _ in ious]),
        "judge.identity_accuracy": ([row["correct"] / LOOK_ALIKES for row in cases["identity"]], None),
        "vae.psnr": ([row["psnr"] for row in cases["vae"]], None),
        "base.one_object": ([float(len(row["found"]) == 1) for row in by_count[1]], None),
        "base.two_objects": ([float(len(row["found"]) == 2) for row in by_count[2]], None),
        **{
            f"base.mg{least}": ([float(len(row["found"]) >= least) for row in by_count[5]], None)
            for least in (2, 3, 4, 5)
        },
        "base.seconds_per_image": ([row["seconds"] for row in cases["seconds"]], None),
    }
    metrics: dict[str, float] = {}
    for name, (values, groups) in estimates.items():
        if name == "judge.precision" and len(set(groups or ())) < 2:
            continue  # a judge that finds nothing has none
        metrics |= interval_metrics(name, bootstrap_mean(values, groups=groups))
    return metrics


def regenerate_rows(rows: Sequence[Row]) -> list[Row]:
    """The same rows made anew from the committed weights, in the same order."""
    preset = active_preset()
    judge = Judge.load()
    made: dict[int, Row] = {}

    def fill(case: str, make: Callable[[list[Row]], list[Row]]) -> None:
        places = [place for place, row in enumerate(rows) if row["case"] == case]
        if places:
            made.update(zip(places, make([rows[place] for place in places]), strict=True))

    fill("scene", lambda part: judge_scene_rows(judge, [row["scene"] for row in part]))
    fill("identity", lambda part: identity_rows(judge, [row["trial"] for row in part]))
    fill("vae", lambda part: vae_rows(load_base().vae, preset, [row["scene"] for row in part]))
    prompt_keys = ("case", "objects", "prompt", "seed", "named")
    fill("base", lambda part: base_rows(load_base(), judge, [{key: row[key] for key in prompt_keys} for row in part]))
    fill("seconds", lambda part: [dict(row) for row in part])  # seconds are a timing field: never compared
    return [made[place] for place in range(len(rows))]
