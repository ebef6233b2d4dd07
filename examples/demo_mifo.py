"""The demo's row of MIFO: one picture with two look-alikes, and both in new boxes, with and without control."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from objectcompose.evaluation.crop_similarity import GREY, MARGIN, crop_of_box
from objectcompose.evaluation.disentangle_cases import boxes_of_prompt, cut_outs
from objectcompose.examples.gallery import GalleryRow
from objectcompose.examples.progress import step_counter
from objectcompose.pipelines.learned_instances import load_instances
from objectcompose.pipelines.pipeline_mifo import MIFOPipeline
from objectcompose.pipelines.plot import draw_layout
from objectcompose.pipelines.reference_images import reference_pixels
from objectcompose.toybox.judge import CROP_SIDE
from objectcompose.toybox.weights import active_preset, toybox_path
from objectcompose.training.mifo_scene import InstanceScene, make_scene, scene_files


#: Each seed is painted with and without control, and `progress` counts both.
DEMO_RUNS = 2
DEMO_GUIDANCE_SCALE = 5.0
_TINTS = ((230, 60, 60), (60, 110, 230), (60, 170, 80), (200, 150, 40))


def mifo_row(
    pipeline: Any, judge: Any, seeds: Sequence[int], steps: int, progress: Any
) -> tuple[GalleryRow, list[dict[str, Any]]]:
    """Paint the committed instances in new boxes, once per seed with box control and once without.

    Args:
        pipeline: the toybox base, as `load_checkpoint` returns it; unchanged afterwards.
        judge: compares what is in a box with the instances.
        seeds: of the pictures; the instances change places from one to the next.
        steps: of denoising.
        progress: its `update` is told of pictures times steps, `DEMO_RUNS` times as many as `steps`.

    Returns:
        The gallery's row, and for each picture an entry of the report: `instances` has the judge's cosines of each
        box's content with its own instance and with the others.

    Raises:
        CheckpointError: the instances are missing, or of another base.
    """
    folder = toybox_path("mifo")
    image, masks = scene_files(folder)
    scene = make_scene(image, masks, active_preset().image_size)
    ours, names = instance_pipeline(pipeline)
    ours.set_progress_bar_config(disable=True)

    prompt = f"a photo of {' and '.join(names)}"
    boxes = [boxes_of_prompt(len(names), number) for number in range(len(seeds))]
    objects = [[{"token": name, "box": box} for name, box in zip(names, row, strict=True)] for row in boxes]
    entries, painted = [], []
    for is_controlled in (True, False):
        started = time.perf_counter()
        output = ours(
            [prompt] * len(seeds),
            objects=objects,
            use_box_control=is_controlled,
            num_inference_steps=steps,
            guidance_scale=DEMO_GUIDANCE_SCALE,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=step_counter(progress, len(seeds)),
        )
        seconds = (time.perf_counter() - started) / len(seeds)
        for seed, picture, row in zip(seeds, output.images, boxes, strict=True):
            similar = box_similarities(judge, picture, row, scene)
            weights = "MIFO" if is_controlled else "MIFO without box control"
            entries.append(_report_entry(prompt, weights, seed, names, similar, seconds))
            enlarged = picture.resize((3 * picture.width, 3 * picture.height))  # so that lines hide little of it
            painted.append(draw_layout(enlarged, [{"box": box} for box in row]))
    pictures = [source_picture(scene), with_masks(scene)]
    gallery_row = GalleryRow(
        "MIFOPipeline: learned from one picture, then in new boxes, with box control and without",
        [pictures[0], *painted],
        ["learned from, and its masks", *(_caption(entry) for entry in entries)],
        [pictures[1:], *([] for _ in painted)],
    )
    return gallery_row, entries


def instance_pipeline(pipeline: Any) -> tuple[MIFOPipeline, list[str]]:
    """The base with the committed instances, on copies of what they change, and the placeholders' names.

    Raises:
        CheckpointError: the instances are missing, or of another base.
    """
    changed = ("tokenizer", "text_encoder", "unet")
    copies = {name: copy.deepcopy(pipeline.components[name]) for name in changed}
    ours = MIFOPipeline(**{**pipeline.components, **copies})
    return ours, load_instances(ours, toybox_path("mifo"))


def source_picture(scene: InstanceScene) -> Image.Image:
    """What was learned from."""
    return Image.fromarray(((scene.pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def with_masks(scene: InstanceScene) -> Image.Image:
    """The same with each instance in a tint of its own."""
    shown = source_picture(scene)
    for number, mask in enumerate(scene.masks):
        tint = Image.new("RGB", shown.size, _TINTS[number % len(_TINTS)])
        shown.paste(tint, mask=Image.fromarray((mask * 150).byte().numpy()))
    return shown


def box_similarities(
    judge: Any, picture: Image.Image, boxes: Sequence[Sequence[float]], scene: InstanceScene
) -> list[list[float]]:
    """The judge's cosine of each box's content with each instance, box by instance."""
    references = cut_outs(source_picture(scene), scene.masks)
    shown = [*(crop_of_box(picture, box) for box in boxes), *references]
    embedded = judge.embed(torch.stack([reference_pixels(one, CROP_SIDE, GREY, MARGIN) for one in shown])).cpu()
    return (embedded[: len(boxes)] @ embedded[len(boxes) :].T).tolist()


def _report_entry(
    prompt: str, weights: str, seed: int, names: Sequence[str], similar: Sequence[Sequence[float]], seconds: float
) -> dict[str, Any]:
    instances = [
        {
            "token": name,
            "own": round(row[number], 4),
            "others": [round(value, 4) for place, value in enumerate(row) if place != number],
        }
        for number, (name, row) in enumerate(zip(names, similar, strict=True))
    ]
    return {"prompt": prompt, "weights": weights, "seed": seed, "instances": instances, "seconds": round(seconds, 3)}


def _caption(entry: dict[str, Any]) -> str:
    control = "with" if entry["weights"] == "MIFO" else "without"
    own = ", ".join(f"{one['own']:.2f} (other {max(one['others']):.2f})" for one in entry["instances"])
    return f"{control} box control, seed {entry['seed']}\njudge: {own}"
