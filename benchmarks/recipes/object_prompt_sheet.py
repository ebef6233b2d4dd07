"""Pictures of the ObjectPrompt recipe: identity beside diversity as a plot, and a sheet of what the arms paint."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.recipes.common import GUIDANCE, STEPS, Row
from benchmarks.recipes.object_prompt_metrics import GUIDANCE_ARMS, STREAM_ARMS
from objectcompose.errors import MissingPackageError
from objectcompose.evaluation.composition import prompts_of_set
from objectcompose.evaluation.composition_maps import paint_with_key_maps
from objectcompose.evaluation.composition_metrics import with_gain
from objectcompose.evaluation.generation import picture_seed
from objectcompose.evaluation.toybox_object_sets import ObjectSet, toybox_object_sets
from objectcompose.examples.gallery import GalleryRow, on_white, save_gallery
from objectcompose.files import write_atomically
from objectcompose.pipelines.plot import overlay_map
from objectcompose.toybox.weights import active_preset


SHEET_COLUMNS = 4


def save_scatter(metrics: Mapping[str, Any], path: Path) -> Path:
    """Identity above its floor beside diversity, a point with 95 % bars for each kind of adapter.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(f'the plot needs matplotlib: pip install "objectcompose[dev]" ({error}).') from error
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for arm in STREAM_ARMS:
        names = (f"diversity.{arm}", f"identity.{arm}")
        if not all(name in metrics for name in names):
            continue
        x, y = (float(metrics[name]) for name in names)
        bars = [
            [[value - float(metrics.get(f"{name}.lo", value))], [float(metrics.get(f"{name}.hi", value)) - value]]
            for name, value in zip(names, (x, y), strict=True)
        ]
        axes.errorbar([x], [y], xerr=bars[0], yerr=bars[1], marker="o", capsize=3)
        axes.annotate(arm, (x, y), textcoords="offset points", xytext=(6, 6))
    axes.set_xlabel("diversity of layouts and poses (1: the world's own)")
    axes.set_ylabel("identity above the same-category floor")
    axes.set_title("Keys and values from the narrow or the wide stream", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())
    return path


def save_sheet(recipe: Any, pipeline: Any, rows: Sequence[Row]) -> Path:
    """Object pictures, what each arm paints of them from the same noise, and where each object's keys were looked at.

    Args:
        recipe: that has painted.
        pipeline: the one that guidance is compared with.
        rows: of all arms.
    """
    galleries = []
    for names, sets in ((STREAM_ARMS, recipe.size.streams), (GUIDANCE_ARMS, recipe.size.guidance)):
        shown = [name for name in names if name in recipe.arm_names]
        if not shown:
            continue
        chosen = toybox_object_sets(active_preset(), "test", sets.counts, sets.kinds, sets.per_count)[:SHEET_COLUMNS]
        galleries.append(_prompt_row(chosen))
        for name in shown:
            own = [row for row in rows if row.get("arm") == name and row["case"] in ("streams", "guidance")]
            galleries.append(_arm_row(name, chosen, own, recipe.folder(name) / "pictures"))
        if names is GUIDANCE_ARMS:
            galleries.append(_map_row(pipeline, chosen))
    path = recipe.out / "sheet.png"
    save_gallery(
        galleries, path, headline="ObjectPrompt on the toybox: the same object pictures and noise for all arms"
    )
    return path


def _prompt_row(sets: Sequence[ObjectSet]) -> GalleryRow:
    shown = [
        [on_white(one.reference(active_preset(), number)) for number in range(len(one.identities))] for one in sets
    ]
    captions = [f"{one.record.kind}: {one.record.text}" for one in sets]
    return GalleryRow("object pictures", [row[0] for row in shown], captions, [row[1:] for row in shown])


def _arm_row(name: str, sets: Sequence[ObjectSet], rows: Sequence[Row], folder: Path) -> GalleryRow:
    images, captions = [], []
    for one in sets:
        own = [with_gain(row) for row in rows if row["set"] == one.record.id and row["round"] == 0]
        gain = sum(row["identity_gain"] for row in own) / len(own)
        images.append(Image.open(folder / f"{one.record.id}_0.png"))
        captions.append(f"identity above floor {gain:+.2f}")
    return GalleryRow(name, images, captions)


def _map_row(pipeline: Any, sets: Sequence[ObjectSet]) -> GalleryRow:
    """The unguided pictures of the first round, and heat where an object's keys get more than an equal share."""
    images, overlays, captions = [], [], []
    for one in sets:
        image, maps = paint_with_key_maps(
            pipeline,
            one.record.text,
            prompts_of_set(active_preset(), one, 1.0),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(picture_seed(one.record.id, 0)),
        )
        images.append(image)
        overlays.append([overlay_map(image, (share - 1 / len(maps)).clamp(min=0)) for share in maps])
        captions.append(" | ".join(identity.category for identity in one.identities))
    return GalleryRow(
        "unguided, and where each object's keys are looked at more than the others'", images, captions, overlays
    )
