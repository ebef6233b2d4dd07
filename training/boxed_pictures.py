"""Pictures with boxes and captions, in COCO's and OpenImages' formats, as samples with references.

An object's reference is its crop from the picture itself, in the file's own resolution. Crowds, groups, depictions and
objects that are hidden or cut off are left out, and boxes of less than 2 % or more than 70 % of the square that is
trained on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, MissingPackageError, ObjectComposeError
from objectcompose.layout import SceneObject, layout_from_coco
from objectcompose.layout_fields import check_box, check_picture, check_text
from objectcompose.training.box_crops import (
    Box,
    boxes_in_square,
    central_square,
    mirrored_box,
    random_square,
)
from objectcompose.training.reference_samples import ReferenceSample
from objectcompose.training.runs import digest_of


logger = logging.getLogger(__name__)
#: References of a sample, at most.
MAX_REFERENCES = 8
_CROP_TRIES = 8
_OPENIMAGES_FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction")


@dataclass(frozen=True)
class BoxedPicture:
    """One picture.

    Attributes:
        path: the file.
        size: width and height in pixels.
        boxes: of its objects, xyxy fractions.
        captions: at least one.
        outlines: COCO's `segmentation` of each box; empty where there is none.
    """

    path: Path
    size: tuple[int, int]
    boxes: tuple[Box, ...]
    captions: tuple[str, ...]
    outlines: tuple[Any, ...] = ()


class BoxedPictures:
    """A data set of those pictures that have between 1 and 8 usable boxes in their central square.

    Args:
        pictures: of `read_coco` or `read_openimages`.
        resolution: sides of the samples, in pixels.
        flip: probability of a mirrored picture, in [0, 1]; boxes are mirrored with it.
        cut_outs: share of references that show the object alone, in [0, 1]; needs outlines and pycocotools.

    Raises:
        ObjectComposeError: a number is out of range.
        LayoutError: no picture can be used, or there are no outlines to cut out by.
        MissingPackageError: pycocotools is needed and not installed.
    """

    def __init__(
        self, pictures: Iterable[BoxedPicture], resolution: int, flip: float = 0.5, cut_outs: float = 0.0
    ) -> None:
        for name, share in (("scene_flip", flip), ("cut_outs", cut_outs)):
            if not 0 <= share <= 1:
                raise ObjectComposeError(f"`{name}` must lie in [0, 1], got {share}.")
        if resolution < 8:
            raise ObjectComposeError(f"`resolution` must be at least 8 pixels, got {resolution}.")
        self.resolution, self.flip, self.cut_outs = resolution, flip, cut_outs
        self.pictures = [one for one in pictures if 1 <= len(_kept(one, central_square(one.size))) <= MAX_REFERENCES]
        if not self.pictures:
            raise LayoutError(
                f"`images` must hold a picture with 1 to {MAX_REFERENCES} objects of 2 % to 70 % of it, got none."
            )
        if cut_outs:
            if not all(one.outlines for one in self.pictures):
                raise LayoutError(f"`cut_outs` {cut_outs} needs outlines (`segmentation`), which this data lacks.")
            _coco_masks()

    def __len__(self) -> int:
        return len(self.pictures)

    def sample(self, index: int, rng: np.random.Generator) -> ReferenceSample:
        """A random square of a picture, with one of its captions.

        Raises:
            ImageInputError: the file is missing, damaged, or of another size than the annotations say.
        """
        picture = self.pictures[index]
        image = check_picture(picture.path, str(picture.path)).convert("RGB")
        if image.size != picture.size:
            raise ImageInputError(f"`{picture.path}` must have the size {picture.size}, got {image.size}.")
        square, boxes = self._draw_square(picture, rng)
        is_flipped, caption = rng.random() < self.flip, picture.captions[int(rng.integers(len(picture.captions)))]
        left, top, right, bottom = (edge * side for edge, side in zip(square, image.size * 2, strict=True))
        scene = image.resize((self.resolution,) * 2, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
        objects = []
        for number, box in boxes:
            reference = self._reference(picture, image, number, _outer_box(box, square), rng.random() < self.cut_outs)
            objects.append(SceneObject(image=reference, box=mirrored_box(box) if is_flipped else box))
        if is_flipped:
            scene = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(scene)).permute(2, 0, 1).float() / 127.5 - 1
        return ReferenceSample(pixels, caption, tuple(objects))

    def key(self, index: int) -> str:
        """Digest of the file, its annotations and the settings."""
        picture = self.pictures[index]
        notes = [picture.size, picture.boxes, picture.captions, picture.outlines]
        digest = hashlib.sha256(json.dumps([*notes, self.resolution, self.flip, self.cut_outs]).encode())
        try:
            digest.update(picture.path.read_bytes())
        except OSError as error:
            raise ImageInputError(f"`{picture.path}` cannot be read: {error}.") from error
        return digest.hexdigest()

    def digest(self) -> str:
        """See `ReferenceDataset`; outlines count where something is cut out by them."""
        notes = [[one.boxes, one.captions, one.outlines if self.cut_outs else ()] for one in self.pictures]
        return digest_of([json.dumps(notes).encode()], [one.path for one in self.pictures])

    def _draw_square(self, picture: BoxedPicture, rng: np.random.Generator) -> tuple[Box, list[tuple[int, Box]]]:
        """A square of the picture and the boxes in it, by number; the central one after some fruitless draws."""
        for _ in range(_CROP_TRIES):
            square = random_square(picture.size, rng)
            boxes = _kept(picture, square)
            if 1 <= len(boxes) <= MAX_REFERENCES:
                return square, boxes
        square = central_square(picture.size)
        return square, _kept(picture, square)

    def _reference(
        self, picture: BoxedPicture, image: Image.Image, number: int, box: Box, is_cut_out: bool
    ) -> Image.Image:
        """The crop of a box (fractions of the whole picture), RGBA where the object is cut out."""
        x0, y0, x1, y1 = (round(edge * side) for edge, side in zip(box, image.size * 2, strict=True))
        frame = (min(x0, image.width - 1), min(y0, image.height - 1), max(x1, x0 + 1), max(y1, y0 + 1))
        crop = image.crop(frame)
        if is_cut_out:
            alpha = _outline_mask(picture.outlines[number], image.size, picture.path).crop(frame)
            if alpha.getbbox() is not None:
                crop.putalpha(alpha)
        return crop


def _kept(picture: BoxedPicture, square: Box) -> list[tuple[int, Box]]:
    return boxes_in_square(picture.boxes, square)


def _outer_box(box: Box, square: Box) -> Box:
    """A box of the square as fractions of the whole picture."""
    left, top, width, height = square[0], square[1], square[2] - square[0], square[3] - square[1]
    return left + box[0] * width, top + box[1] * height, left + box[2] * width, top + box[3] * height


def read_coco(instances: Path, captions: Path, images: Path) -> list[BoxedPicture]:
    """Pictures of COCO-format files that have boxes and captions, in the order of the file.

    Boxes of no width or height, of which COCO 2017 has two, are left out, with a warning.

    Args:
        instances: `images`, `annotations` with `bbox`, `categories`.
        captions: `annotations` with `image_id` and `caption`.
        images: folder of the files.

    Raises:
        LayoutError: a file is missing, no JSON, or broken; or a box lies outside its picture.
        ImageInputError: a picture is missing.
    """
    boxes, texts = _read_json(instances), _read_json(captions)
    by_image, captions_of = _grouped(boxes, instances), _captions_by_image(texts, captions)
    pictures, flat = [], 0
    for image in _entries(boxes, "images", instances):
        try:
            found = [one for one in by_image.get(image["id"], []) if not one.get("iscrowd", 0)]
            whole = [one for one in found if _has_area(one["bbox"])]
            found, flat = whole, flat + len(found) - len(whole)
            named = captions_of.get(image["id"])
            if not found or not named:
                continue
            only = {"images": [image], "annotations": found, "categories": boxes["categories"]}
            objects = layout_from_coco(only, image["id"]).objects
            path, size = images / image["file_name"], (int(image["width"]), int(image["height"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise LayoutError(f"`{instances}` must be a COCO instances file; missing or wrong: {error}.") from error
        except LayoutError as error:
            raise LayoutError(f"`{instances}`, image {image['id']}: {error}") from error
        outlines = tuple(one.get("segmentation") for one in found)
        corners = tuple(item.box for item in objects if item.box is not None)
        pictures.append(BoxedPicture(_existing(path), size, corners, tuple(named), outlines if all(outlines) else ()))
    if flat:
        logger.warning(f"`{instances}`: {flat} boxes have no width or height and are left out.")
    return pictures


def _has_area(bbox: Any) -> bool:
    """Whether neither side of COCO's [x, y, width, height] is 0; what else may be wrong with it is seen later."""
    return not isinstance(bbox, list) or 0 not in bbox[2:]


def read_openimages(boxes: Path, captions: Path, images: Path) -> list[BoxedPicture]:
    """Pictures of an OpenImages-format table that have boxes and captions, in the order of the table.

    Args:
        boxes: CSV with `ImageID`, `XMin`, `XMax`, `YMin`, `YMax` and the flags `IsOccluded` and so on.
        captions: JSON Lines with `image_id` and `caption`, as Localized Narratives has them; OpenImages itself has no
            captions.
        images: folder of `<ImageID>.jpg`.

    Raises:
        LayoutError: a file is missing or broken, or a box lies outside its picture.
        ImageInputError: a picture is missing or damaged.
    """
    named: dict[str, list[str]] = {}
    for number, line in enumerate(_read_text(captions).split("\n"), start=1):
        if line.strip():
            entry = _parsed(line, f"{captions} line {number}")
            if not isinstance(entry, dict) or not {"image_id", "caption"} <= set(entry):
                raise LayoutError(f"`{captions}` line {number} must have `image_id` and `caption`.")
            named.setdefault(str(entry["image_id"]), []).append(check_text(entry["caption"], "caption"))
    corners: dict[str, list[Box]] = {}
    rows = csv.DictReader(_read_text(boxes).splitlines())
    wanted = ("ImageID", "XMin", "YMin", "XMax", "YMax", *_OPENIMAGES_FLAGS)
    if missing := [name for name in wanted if name not in (rows.fieldnames or ())]:
        raise LayoutError(f"`{boxes}` must be a table with the columns {', '.join(wanted)}; it lacks {missing}.")
    for row in rows:
        box = _openimages_box(row, f"{boxes} line {rows.line_num}")
        if not any(row[flag] == "1" for flag in _OPENIMAGES_FLAGS):  # -1: not known
            corners.setdefault(row["ImageID"], []).append(box)
    pictures = []
    for name, found in corners.items():
        if name in named:
            path = _existing(images / f"{name}.jpg")
            pictures.append(BoxedPicture(path, _size_of(path), tuple(found), tuple(named[name])))
    return pictures


def _openimages_box(row: Mapping[str, Any], where: str) -> Box:
    try:
        return check_box([float(row[name]) for name in ("XMin", "YMin", "XMax", "YMax")])
    except (TypeError, ValueError) as error:
        raise LayoutError(f"`{where}`: {error}") from error


def _size_of(path: Path) -> tuple[int, int]:
    """Width and height from the file's head; the orientation that a camera noted is applied."""
    try:
        with Image.open(path) as image:
            is_turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if is_turned else image.size
    except Exception as error:  # damaged files make the decoders raise almost anything
        raise ImageInputError(f"`{path}` must be a readable picture: {error}.") from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ImageInputError(f"`{path}` is missing.")
    return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(f"`{path}` cannot be read: {error}.") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LayoutError(f"`{where}` must be JSON: line {error.lineno}: {error.msg}.") from error


def _read_json(path: Path) -> Any:
    return _parsed(_read_text(path), str(path))


def _entries(data: Any, name: str, path: Path) -> Sequence[Any]:
    entries = data.get(name) if isinstance(data, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise LayoutError(f"`{path}` must have a list of objects `{name}`.")
    return entries


def _grouped(data: Any, path: Path) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for entry in _entries(data, "annotations", path):
        groups.setdefault(entry.get("image_id"), []).append(entry)
    return groups


def _captions_by_image(data: Any, path: Path) -> dict[Any, list[str]]:
    return {
        image: [check_text(entry.get("caption"), f"caption of image {image} in {path}") for entry in entries]
        for image, entries in _grouped(data, path).items()
    }


def _coco_masks() -> Any:
    try:
        from pycocotools import mask  # an extra: only who cuts out needs it
    except ImportError as error:
        raise MissingPackageError('`cut_outs` needs pycocotools: pip install "objectcompose[eval]".') from error
    return mask


def _outline_mask(outline: Any, size: tuple[int, int], path: Path) -> Image.Image:
    """COCO's polygons or run lengths as a grey picture, 255 on the object."""
    masks, (width, height) = _coco_masks(), size
    try:
        if isinstance(outline, list):
            encoded = masks.merge(masks.frPyObjects(outline, height, width))
        else:
            is_plain = isinstance(outline["counts"], list)
            encoded = masks.frPyObjects(outline, height, width) if is_plain else outline
        return Image.fromarray(masks.decode(encoded) * np.uint8(255))
    except Exception as error:  # the C code raises almost anything
        raise LayoutError(f"the `segmentation` of an object in `{path}` cannot be read: {error}.") from error
