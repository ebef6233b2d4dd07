"""Data sets in the formats that `train_locref` reads, a few small pictures each, and a base to train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from objectcompose.pipelines.pipeline_locref import LocRefPipeline
from tests.tiny import tiny_components, tiny_image_encoder


SIZE = (48, 32)
#: Per picture, boxes in pixels (x, y, width, height); all have a large share in the central square (8 to 40).
BOXES = ([[10, 4, 14, 20], [22, 8, 16, 20]], [[12, 2, 20, 24]], [[9, 1, 10, 12], [20, 2, 10, 12], [12, 16, 16, 14]])
CAPTIONS = (["a dog and a cup", "a red dog"], ["a corgi"], ["two dogs and a teddy bear"])


def write_base(folder: Path) -> Path:
    """A base with an image encoder, as a folder."""
    components = {**tiny_components(), "image_encoder": tiny_image_encoder()}
    LocRefPipeline(**components, requires_safety_checker=False).save_pretrained(folder)
    return folder


def write_pictures(folder: Path, suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(len(BOXES)):
        pixels = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return folder


def coco_instances() -> dict:
    """An instances file: every object with a rectangle as its outline, and a crowd that does not count."""
    annotations = [
        {"image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0, "segmentation": [_corners(box)]}
        for number, boxes in enumerate(BOXES)
        for box in boxes
    ]
    annotations.append({"image_id": 1, "category_id": 1, "bbox": [0, 0, 30, 30], "iscrowd": 1, "segmentation": []})
    images = [
        {"id": number, "file_name": f"{number}.png", "width": SIZE[0], "height": SIZE[1]}
        for number in range(len(BOXES))
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dog"}]}


def _corners(box: list[int]) -> list[int]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def write_coco(folder: Path, instances: dict | None = None) -> list[str]:
    """The files, and the arguments that name them."""
    write_pictures(folder / "images")
    (folder / "instances.json").write_text(json.dumps(instances or coco_instances()), encoding="utf-8")
    captions = [{"image_id": number, "caption": text} for number, texts in enumerate(CAPTIONS) for text in texts]
    (folder / "captions.json").write_text(json.dumps({"annotations": captions}), encoding="utf-8")
    return [
        "--coco_instances", str(folder / "instances.json"), "--coco_captions", str(folder / "captions.json"),
        "--images", str(folder / "images"),
    ]  # fmt: skip


OPENIMAGES_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction"
)


def write_openimages(folder: Path, *more_rows: str) -> list[str]:
    write_pictures(folder / "images", "jpg")
    rows = [OPENIMAGES_HEADER]
    for number, boxes in enumerate(BOXES):
        for x, y, width, height in boxes:
            edges = (x / SIZE[0], (x + width) / SIZE[0], y / SIZE[1], (y + height) / SIZE[1])
            rows.append(f"{number},xclick,/m/01,1,{','.join(map(str, edges))},0,0,0,0")
    (folder / "boxes.csv").write_text("\n".join([*rows, *more_rows]) + "\n", encoding="utf-8")
    lines = [json.dumps({"image_id": str(number), "caption": texts[0]}) for number, texts in enumerate(CAPTIONS)]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [
        "--openimages_boxes", str(folder / "boxes.csv"), "--openimages_captions", str(folder / "captions.jsonl"),
        "--images", str(folder / "images"),
    ]  # fmt: skip
