"""The demo's row of LocRef: references, the layout with them in it, and what is painted, twice from the same noise.

The second time the layout is mirrored: objects go where their boxes go, and look as before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.evaluation.crop_similarity import GREY, MARGIN, crop_of_box
from objectcompose.evaluation.detectors import picture_tensor
from objectcompose.evaluation.layout_cases import box_of
from objectcompose.evaluation.layout_metrics import overlaps_of
from objectcompose.examples.gallery import GalleryRow, on_white
from objectcompose.examples.progress import step_counter
from objectcompose.layout import SceneObject
from objectcompose.pipelines.pipeline_locref import LocRefPipeline
from objectcompose.pipelines.plot import draw_layout
from objectcompose.pipelines.reference_images import reference_pixels
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.identities import Identity
from objectcompose.toybox.judge import CROP_SIDE, Detection
from objectcompose.toybox.scenes import list_objects
from objectcompose.toybox.weights import active_preset, toybox_path
from objectcompose.training.box_crops import mirrored_box
from objectcompose.training.reference_samples import reference_views


#: Of each scene's objects: place in the list of categories, so that every preset has it, hue (280 to 340: unseen in
#: training), and box.
LOCREF_SCENES = (
    ((1, 210.0, (0.03, 0.38, 0.50, 0.86)), (4, 310.0, (0.56, 0.06, 0.97, 0.48))),
    ((5, 120.0, (0.04, 0.05, 0.46, 0.52)), (0, 300.0, (0.48, 0.56, 0.97, 0.94))),
)
#: Each layout is painted as it is and mirrored, and `progress` counts both.
DEMO_RUNS = 2
DEMO_GUIDANCE_SCALE = 5.0
_REFERENCE_SEED = 3
_TILE = (192, 192)


def locref_row(
    pipeline: Any, judge: Any, seeds: Sequence[int], steps: int, progress: Any
) -> tuple[GalleryRow, list[dict[str, Any]]]:
    """Paint a layout per seed, and the same mirrored.

    Args:
        pipeline: the toybox base, as `load_checkpoint` returns it; unchanged afterwards.
        judge: looks where the objects are, and compares them with their references.
        seeds: of the pictures; the scenes take turns.
        steps: of denoising.
        progress: its `update` is told of pictures times steps, `DEMO_RUNS` times as many as `steps`.

    Returns:
        The gallery's row, and for each picture an entry of the report: `objects` has each box, how much the judge's
        best detection overlaps it, and the cosine of its content with the reference.

    Raises:
        CheckpointError: a model is missing, or the adapter was made for another base.
    """
    ours = locref_pipeline(pipeline)
    ours.set_progress_bar_config(disable=True)
    scenes = [demo_objects(active_preset(), number % len(LOCREF_SCENES)) for number in range(len(seeds))]
    prompts = [f"a photo of {list_objects([item.phrase or '' for item in row])}" for row in scenes]

    images, captions, beside, entries = [], [], [], []
    for is_mirrored in (False, True):
        rows = [[mirrored(item) for item in row] for row in scenes] if is_mirrored else scenes
        started = time.perf_counter()
        output = ours(
            prompts,
            objects=rows,
            num_inference_steps=steps,
            guidance_scale=DEMO_GUIDANCE_SCALE,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            return_composite=True,
            callback_on_step_end=step_counter(progress, len(seeds)),
        )
        seconds = (time.perf_counter() - started) / len(seeds)
        found = judge.detect(picture_tensor(output.images))
        for prompt, seed, row, picture, composite, detections in zip(
            prompts, seeds, rows, output.images, output.composite, found, strict=True
        ):
            entries.append(_report_entry(judge, prompt, seed, row, picture, detections, seconds))
            captions.append(_caption(entries[-1], is_mirrored))
            # the first run shows the references, too, which the second one shares
            shown = [] if is_mirrored else [on_white(item.image) for item in row]
            pictures = [*shown, draw_layout(composite.resize(_TILE), row), draw_layout(picture.resize(_TILE), row)]
            images.append(pictures[0])
            beside.append(pictures[1:])
    title = "LocRefPipeline: references, the layout with them in it, the picture; then the layout mirrored"
    return GalleryRow(title, images, captions, beside), entries


def locref_pipeline(pipeline: Any) -> LocRefPipeline:
    """The base with the committed adapter and what reads references.

    Raises:
        CheckpointError: a model is missing, or the adapter was made for another base.
    """
    encoder, device = toybox_path("image_encoder"), pipeline.unet.device
    components = {
        **pipeline.components,
        "image_encoder": CLIPVisionModelWithProjection.from_pretrained(encoder, dtype=torch.float32).to(device),
        "feature_extractor": CLIPImageProcessor.from_pretrained(encoder),
        "adapter": LocRefAdapter.from_pretrained(toybox_path("locref")).to(device).eval(),
    }
    return LocRefPipeline(**components, requires_safety_checker=False)


def demo_objects(preset: Preset, number: int) -> list[SceneObject]:
    """A scene's objects with cut-outs as references, in other poses than any scene has them."""
    described = LOCREF_SCENES[number]
    identities = [Identity(preset.categories[place], preset.styles[0], hue) for place, hue, _ in described]
    views = reference_views(preset, identities, np.random.default_rng(_REFERENCE_SEED), background_share=0.0)
    return [
        SceneObject(phrase=identity.category, image=view, box=box)
        for identity, view, (_, _, box) in zip(identities, views, described, strict=True)
    ]


def mirrored(item: SceneObject) -> SceneObject:
    """The object with its box mirrored left to right; the reference stays as it is."""
    return dataclasses.replace(item, box=mirrored_box(box_of(item)))


def _report_entry(
    judge: Any,
    prompt: str,
    seed: int,
    objects: Sequence[SceneObject],
    picture: Image.Image,
    detections: Sequence[Detection],
    seconds: float,
) -> dict[str, Any]:
    shown = [*(crop_of_box(picture, box_of(item)) for item in objects), *(item.image for item in objects)]
    embedded = judge.embed(torch.stack([reference_pixels(one, CROP_SIDE, GREY, MARGIN) for one in shown])).cpu()
    similar = (embedded[: len(objects)] * embedded[len(objects) :]).sum(-1).tolist()
    measured = []
    for item, cosine in zip(objects, similar, strict=True):
        own = [one.box for one in detections if one.category == item.phrase]
        overlap = float(overlaps_of(own, [box_of(item)]).max(initial=0.0))
        measured.append(
            {
                "phrase": item.phrase,
                "box": [round(edge, 4) for edge in box_of(item)],
                "overlap": round(overlap, 4),
                "similarity": round(cosine, 4),
            }
        )
    return {"prompt": prompt, "weights": "LocRef", "seed": seed, "objects": measured, "seconds": round(seconds, 3)}


def _caption(entry: dict[str, Any], is_mirrored: bool) -> str:
    verdicts = ", ".join(
        f"{one['phrase']}: overlap {one['overlap']:.2f}, likeness {one['similarity']:.2f}" for one in entry["objects"]
    )
    return f"{'mirrored, the same noise' if is_mirrored else entry['prompt']}, seed {entry['seed']}\njudge: {verdicts}"
