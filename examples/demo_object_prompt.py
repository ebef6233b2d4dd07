"""The demo's row of ObjectPrompt: object pictures, the first picture, what was matched in it, and the guided one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessor, CLIPVisionModelWithProjection, Dinov2Model

from objectcompose.adapters.object_prompt_adapter import ObjectPromptAdapter
from objectcompose.evaluation.detectors import picture_tensor
from objectcompose.evaluation.toybox_object_sets import reference_picture
from objectcompose.examples.gallery import GalleryRow, on_white
from objectcompose.grounding.clipseg import load_clipseg
from objectcompose.grounding.grounder import Grounder
from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline
from objectcompose.pipelines.pipeline_output import PlacedObject
from objectcompose.pipelines.plot import draw_layout
from objectcompose.toybox.identities import Identity
from objectcompose.toybox.judge import Detection
from objectcompose.toybox.scenes import list_objects
from objectcompose.toybox.weights import active_preset, toybox_path


#: What is prompted: places in the list of categories, so that every preset has them, and hues; and the poses of the
#: object pictures. A pair that is found again in the first picture, which not every pair is: this row shows how
#: guidance works, `objectcompose evaluate composition` how often.
PROMPTED = ((3, 200.0), (5, 340.0))
PROMPT_POSE = 5
#: A guided picture is sampled twice, and `progress` counts both.
DEMO_RUNS = 2
DEMO_GUIDANCE_SCALE = 5.0


class WatchedSegmenter:
    """A grounder that keeps the pictures it was shown: those of the first run.

    Args:
        grounder: that finds phrases.
    """

    def __init__(self, grounder: Grounder) -> None:
        self._grounder = grounder
        self.pictures: list[Image.Image] = []

    def ground(self, picture: Image.Image, phrases: Sequence[str], on_missing: str = "skip") -> Any:
        """See `Grounder.ground`."""
        self.pictures.append(picture)
        return self._grounder.ground(picture, phrases, on_missing=on_missing)  # type: ignore[arg-type]


def object_prompt_row(
    pipeline: Any, judge: Any, seeds: Sequence[int], steps: int, progress: Any
) -> tuple[GalleryRow, list[dict[str, Any]]]:
    """Paint two object pictures into one scene, under guidance, once per seed.

    Args:
        pipeline: the toybox base, as `load_checkpoint` returns it.
        judge: looks at the final pictures.
        seeds: of the pictures.
        steps: of each run.
        progress: its `update` is told of pictures times steps, `DEMO_RUNS` times as many as `steps`.

    Returns:
        The gallery's row, and for each picture an entry of the report.

    Raises:
        CheckpointError: a model is missing, or the adapter was made for another base.
    """
    preset, device = active_preset(), pipeline.unet.device
    identities = [Identity(preset.categories[place], preset.styles[0], hue) for place, hue in PROMPTED]
    names = [identity.category for identity in identities]
    pictures = [reference_picture(preset, identity, PROMPT_POSE) for identity in identities]
    ours = object_prompt_pipeline(pipeline)
    ours.set_progress_bar_config(disable=True)
    segmenter = WatchedSegmenter(Grounder(load_clipseg(toybox_path("clipseg"), device=device, dtype=torch.float32)))

    left = DEMO_RUNS * steps * len(seeds)

    def count_step(_pipeline: Any, _step: int, _timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal left
        left -= len(seeds)
        progress.update(len(seeds))
        return tensors

    prompt = f"a photo of {list_objects(names)}"
    started = time.perf_counter()
    output = ours(
        prompt,
        num_inference_steps=steps,
        guidance_scale=DEMO_GUIDANCE_SCALE,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        objects=[{"phrase": name, "image": picture} for name, picture in zip(names, pictures, strict=True)],
        compositional_guidance=True,
        segmenter=segmenter,
        callback_on_step_end=count_step,
    )
    progress.update(left)  # where nothing matches there is no second run
    seconds = (time.perf_counter() - started) / len(seeds)
    found = judge.detect(picture_tensor(output.images))
    entries = [
        _report_entry(prompt, seed, placed, detections, seconds)
        for seed, placed, detections in zip(seeds, output.objects, found, strict=True)
    ]
    shown = [on_white(picture) for picture in pictures]
    beside = [
        [*shown[1:], first, _with_matches(first, placed), final]
        for first, placed, final in zip(segmenter.pictures, output.objects, output.images, strict=True)
    ]
    title = "ObjectPromptPipeline: object pictures, first picture, matched segments, guided picture"
    return GalleryRow(title, [shown[0]] * len(entries), [_caption(entry) for entry in entries], beside), entries


def object_prompt_pipeline(pipeline: Any) -> ObjectPromptPipeline:
    """The base with the committed adapter, and what reads and compares object pictures.

    Raises:
        CheckpointError: a model is missing, or the adapter was made for another base.
    """
    encoder, dino, device = toybox_path("image_encoder"), toybox_path("dino"), pipeline.unet.device
    components = {
        **pipeline.components,
        "image_encoder": CLIPVisionModelWithProjection.from_pretrained(encoder, dtype=torch.float32).to(device),
        "feature_extractor": CLIPImageProcessor.from_pretrained(encoder),
        "adapter": ObjectPromptAdapter.from_pretrained(toybox_path("object_prompt")).to(device).eval(),
        "dino": Dinov2Model.from_pretrained(dino, dtype=torch.float32).to(device).eval(),
        "dino_processor": BitImageProcessorPil.from_pretrained(dino),
    }
    return ObjectPromptPipeline(**components, requires_safety_checker=False)


def _with_matches(picture: Image.Image, placed: Sequence[PlacedObject]) -> Image.Image:
    """The segments that were matched, with the objects' names, large enough to read them."""
    matched = [{"phrase": one.phrase, "box": one.box, "mask": one.region} for one in placed if one.matched]
    enlarged = picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.BILINEAR)
    return draw_layout(enlarged, matched) if matched else enlarged


def _report_entry(
    prompt: str, seed: int, placed: Sequence[PlacedObject], detections: Sequence[Detection], seconds: float
) -> dict[str, Any]:
    """What the report says of a picture: the judge's findings, and the cosines of what was matched before."""
    seen = {one.category for one in detections}
    found = [
        {
            "category": one.category,
            "score": round(float(one.score), 4),
            "box": [round(float(corner), 4) for corner in one.box],
        }
        for one in detections
    ]
    return {
        "prompt": prompt,
        "weights": "ObjectPrompt",
        "seed": seed,
        "found": found,
        "present": {item.label: item.phrase in seen for item in placed},
        "matched": {item.label: round(item.similarity or 0.0, 4) if item.matched else None for item in placed},
        "seconds": round(seconds, 3),
    }


def _caption(entry: dict[str, Any]) -> str:
    verdicts = ", ".join(
        f"{name}: {'found' if is_found else 'missing'}" for name, is_found in entry["present"].items()
    )
    matches = ", ".join(
        f"{name}: {'no match' if cosine is None else f'{cosine:.2f}'}" for name, cosine in entry["matched"].items()
    )
    return f"{entry['prompt']}, seed {entry['seed']}\nmatched: {matches}; judge: {verdicts}"
