"""Grounded captions: pictures whose captions' nouns have masks, in the layout that TokenCompose published.

    root/coco_gsam_img/train/<picture>.jpg and metadata.jsonl
    root/coco_gsam_seg/<id>/mask_<id>_<noun>.png

`metadata.jsonl` has one object per line: `file_name`, `text`, and `attn_list`, a list of `[noun, path or null]`, where
null is a noun that no mask was found for. The folder `train` is an "imagefolder" that `datasets` reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, RegionError
from objectcompose.files import write_atomically, write_png
from objectcompose.grounding.inputs import opaque_picture
from objectcompose.layout_fields import check_picture
from objectcompose.toybox.categories import Preset
from objectcompose.training.runs import digest_of
from objectcompose.training.toybox_data import scene_pool


IMAGE_FOLDER = Path("coco_gsam_img") / "train"
MASK_FOLDER = Path("coco_gsam_seg")
METADATA = "metadata.jsonl"
#: Of a noun in a file's name, which file systems limit to 255 bytes.
_NOUN_BYTES = 100


@dataclass(frozen=True)
class CaptionRecord:
    """One line of the metadata.

    Attributes:
        image: the picture.
        caption: in its own case.
        nouns: noun phrases, each with its mask or None. A noun without a mask is neither trained on nor against.
    """

    image: Path
    caption: str
    nouns: tuple[tuple[str, Path | None], ...]


@dataclass(frozen=True)
class CaptionSample:
    """What is trained on.

    Attributes:
        pixels: (3, H, W) in [-1, 1].
        caption: the prompt.
        phrases: N nouns that have a mask.
        masks: (N, H, W) in [0, 1].
    """

    pixels: torch.Tensor
    caption: str
    phrases: tuple[str, ...]
    masks: torch.Tensor


class CaptionDataset(Protocol):
    """Samples by number, each with a key that changes whenever its content does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CaptionSample: ...

    def key(self, index: int) -> str:
        """Hex digest of the sample's content."""
        ...

    def digest(self) -> str:
        """Names all samples; quickly, so pictures and masks in files by their sizes in bytes alone."""
        ...


def read_records(root: str | Path) -> list[CaptionRecord]:
    """The metadata below `root`, with the heads of all files read, so that training does not stop at one of them.

    Args:
        root: the data set's folder, its `coco_gsam_img`, or the folder of `metadata.jsonl` itself.

    Raises:
        LayoutError: no metadata, a broken line, or no record.
        ImageInputError: a picture or mask is missing or is none; names the line.
        RegionError: a mask has another size than its picture.
    """
    root = Path(root)
    folders = [root / IMAGE_FOLDER, root / "train", root]
    folder = next((one for one in folders if (one / METADATA).is_file()), None)
    if folder is None:
        raise LayoutError(f"`{root}` must hold {IMAGE_FOLDER / METADATA} or {METADATA}, and has neither.")
    records = []
    try:
        lines = (folder / METADATA).read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(f"`{folder / METADATA}` must be a readable file in UTF-8: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            records.append(_read_line(folder, line, f"{folder / METADATA} line {number}"))
    if not records:
        raise LayoutError(f"`{folder / METADATA}` must have at least one line, got none.")
    return records


def _read_line(folder: Path, line: str, where: str) -> CaptionRecord:
    try:
        entry = json.loads(line)
        name, caption, nouns = entry["file_name"], entry["text"], entry["attn_list"]
        pairs = [(noun, path) for noun, path in nouns]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise LayoutError(
            f"{where} must be JSON with `file_name`, `text` and `attn_list` of pairs: {error}"
        ) from error
    texts = [name, caption, *(noun for noun, _ in pairs), *(path for _, path in pairs if path is not None)]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise LayoutError(f"{where} must have text in `file_name`, `text` and every pair of `attn_list`.")
    if not (folder / name).is_file():
        raise ImageInputError(f"{where} names the picture {name!r}, which is not in {folder}.")
    found = tuple((noun, None if path is None else _find_mask(folder, path, where)) for noun, path in pairs)
    size = _size_in_head(folder / name, where)
    for noun, path in found:
        # turned or not: what a camera noted about that is applied when the picture is read
        if path is not None and sorted(_size_in_head(path, where)) != sorted(size):
            raise RegionError(
                f"{where}: the mask of {noun!r} must have the size of its picture {name}, {size}, got"
                f" {_size_in_head(path, where)} in {path.name}."
            )
    return CaptionRecord(folder / name, caption, found)


def _size_in_head(path: Path, where: str) -> tuple[int, int]:
    """(width, height) as the file says, whose pixels are not read."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except Exception as error:  # damaged files make the decoders raise almost anything
        raise ImageInputError(f"{where} names {path}, which cannot be read as a picture: {error}.") from error


def _find_mask(folder: Path, path: str, where: str) -> Path:
    """A mask's path as it is, beside the metadata, or in the masks' own folder in place of a leading `seg`."""
    parts = Path(path).parts
    below = Path(*parts[1:]) if len(parts) > 1 and parts[0] == "seg" else Path(path)
    candidates = [Path(path), folder / path, folder.parent.parent / MASK_FOLDER / below, folder / below]
    found = next((one for one in candidates if one.is_file()), None)
    if found is None:
        raise ImageInputError(
            f"{where} names the mask {path!r}, which was not found, also not in {candidates[2].parent}."
        )
    return found


def write_record(
    root: str | Path,
    identifier: str,
    picture: Path,
    caption: str,
    nouns: Sequence[tuple[str, torch.Tensor | None]],
) -> dict[str, Any]:
    """Write one picture and its masks; masks of an earlier record of that id are removed.

    An opaque picture is copied byte for byte, a transparent one becomes a PNG on white, as grounding sees it.

    Args:
        root: the data set's folder; made when missing.
        identifier: names the files; no other picture of the data set has it.
        picture: the file.
        caption: in its own case.
        nouns: each with its mask (H, W), 1 where the noun is seen, or None where nothing was found.

    Returns:
        The metadata's line of this picture, for `write_metadata`.

    Raises:
        RegionError: a mask has another size than its picture.
        ImageInputError: the picture cannot be read.
    """
    root = Path(root)
    shown = check_picture(picture, str(picture))
    width, height = shown.size
    for noun, mask in nouns:
        if mask is not None and tuple(mask.shape) != (height, width):
            raise RegionError(
                f"the mask of {noun!r} must have the shape of {picture.name}, {(height, width)},"
                f" got {tuple(mask.shape)}."
            )
    (root / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    if shown.mode == "RGBA":
        target = root / IMAGE_FOLDER / f"{identifier}.png"
        write_png(target, opaque_picture(shown))
    else:
        target = root / IMAGE_FOLDER / f"{identifier}{picture.suffix.lower()}"
        write_atomically(target, picture.read_bytes())
    names = _mask_names(identifier, [noun for noun, mask in nouns if mask is not None])
    for stale in (root / MASK_FOLDER / identifier).glob("*"):
        if stale.name not in names:
            stale.unlink()
    waiting = iter(names)
    entries = [
        [noun, None if mask is None else _write_mask(root, identifier, next(waiting), mask)] for noun, mask in nouns
    ]
    return {"file_name": target.name, "text": caption, "attn_list": entries}


def write_metadata(root: str | Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """Write the metadata, in the order of the lines that `write_record` gave; a folder without it is unfinished.

    Returns:
        Its path.
    """
    path = Path(root) / IMAGE_FOLDER / METADATA
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    return path


def _mask_names(identifier: str, nouns: Sequence[str]) -> list[str]:
    """One file name per noun, no two the same, also where case plays no part and for "a/b" beside "a_b"."""
    names: list[str] = []
    taken: set[str] = set()
    for noun in nouns:
        words = re.sub(r'[\s/\\:*?"<>|]', "_", noun).encode()[:_NOUN_BYTES].decode(errors="ignore")
        stem, number = f"mask_{identifier}_{words}", 2
        name = stem
        while name.casefold() in taken:  # some file systems ignore case
            name, number = f"{stem}_{number}", number + 1
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


def _write_mask(root: Path, identifier: str, name: str, mask: torch.Tensor) -> str:
    """8-bit grey, 0 and 255: a mask that is true everywhere stays white."""
    folder = root / MASK_FOLDER / identifier
    folder.mkdir(parents=True, exist_ok=True)
    write_png(folder / name, Image.fromarray((mask > 0).mul(255).byte().cpu().numpy()))
    return f"seg/{identifier}/{name}"


class GroundedCaptions:
    """The pictures and masks of records: short side resized to the resolution, centre crop, no augmentation.

    Args:
        records: of `read_records`.
        resolution: side of the square samples in pixels.
    """

    def __init__(self, records: Sequence[CaptionRecord], resolution: int) -> None:
        self.records = list(records)
        self.resolution = resolution
        self._keys: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> CaptionSample:
        """One sample.

        Raises:
            ImageInputError: a file cannot be read as a picture.
            RegionError: a mask has another size than its picture.
        """
        record = self.records[index]
        picture = _open_picture(record.image)
        named = [(noun, path) for noun, path in record.nouns if path is not None]
        masks = []
        for noun, path in named:
            mask = _read_mask(path)
            if mask.size != picture.size:
                raise RegionError(
                    f"the mask of {noun!r} must have the size of its picture {record.image.name}, {picture.size}, got"
                    f" {mask.size} in {path.name}."
                )
            mask_values = self._crop(mask)[0]
            masks.append(mask_values / mask_values.max().clamp_min(1e-6))
        pixels = self._crop(picture) * 2 - 1
        shape = (0, self.resolution, self.resolution)
        return CaptionSample(
            pixels,
            record.caption,
            tuple(noun for noun, _ in named),
            torch.stack(masks) if masks else torch.zeros(shape),
        )

    def key(self, index: int) -> str:
        """Digest of picture, masks, caption and resolution."""
        if index not in self._keys:
            record = self.records[index]
            digest = hashlib.sha256(json.dumps([record.caption, self.resolution]).encode())
            digest.update(record.image.read_bytes())
            for noun, path in record.nouns:
                digest.update(json.dumps(noun).encode() + (b"" if path is None else path.read_bytes()))
            self._keys[index] = digest.hexdigest()
        return self._keys[index]

    def digest(self) -> str:
        """See `CaptionDataset`."""
        notes = [[record.caption, [noun for noun, _ in record.nouns]] for record in self.records]
        masks = [path for record in self.records for _, path in record.nouns if path is not None]
        return digest_of([json.dumps(notes).encode()], [*(record.image for record in self.records), *masks])

    def _crop(self, picture: Image.Image) -> torch.Tensor:
        """(C, R, R) in [0, 1]."""
        width, height = picture.size
        short = min(width, height)
        # whole sizes as torchvision's `Resize` has them: the long side is cut off, not rounded
        size = self.resolution * width // short, self.resolution * height // short
        resized = picture.resize(size, Image.Resampling.BILINEAR)
        left, top = (round((side - self.resolution) / 2) for side in size)
        cropped = resized.crop((left, top, left + self.resolution, top + self.resolution))
        array = np.asarray(cropped, dtype=np.float32) / 255
        return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


class ToyboxCaptions:
    """Scenes of the toybox with their true masks: every category in the caption is a noun.

    Args:
        preset: the world.
        count: number of scenes.
        cache: folder for the rendered scenes.
        split: of `training.toybox_data.SPLIT_SEEDS`.
    """

    def __init__(self, preset: Preset, count: int, cache: Path, split: str = "train") -> None:
        self.preset, self.split = preset, split
        self.pool = scene_pool(preset, split, count, cache)

    def __len__(self) -> int:
        return len(self.pool.captions)

    def __getitem__(self, index: int) -> CaptionSample:
        """One scene; a category of which nothing is seen is left out."""
        classes = self.pool.category_maps(torch.tensor([index]))[0]
        seen = [int(number) for number in classes.unique() if number > 0]
        return CaptionSample(
            self.pool.images(torch.tensor([index]))[0] * 2 - 1,
            self.pool.captions[index],
            tuple(self.preset.categories[number - 1] for number in seen),
            torch.stack([(classes == number).float() for number in seen]) if seen else torch.zeros(0, *classes.shape),
        )

    def key(self, index: int) -> str:
        """Digest of the scene's pixels, owners and caption."""
        digest = hashlib.sha256(self.pool.captions[index].encode())
        digest.update(self.pool.pixels[index].numpy().tobytes())
        digest.update(self.pool.owner[index].numpy().tobytes())
        return digest.hexdigest()

    def digest(self) -> str:
        """See `CaptionDataset`."""
        pictures = [self.pool.pixels.numpy().data, self.pool.owner.numpy().data]
        return digest_of([json.dumps(self.pool.captions).encode(), *pictures])


def _open_picture(path: Path) -> Image.Image:
    return check_picture(path, str(path)).convert("RGB")


def _read_mask(path: Path) -> Image.Image:
    """First channel of a mask of any mode, as 8-bit grey."""
    try:
        mask: Image.Image = Image.open(path)
        mask.load()
    except Exception as error:  # damaged files make the decoders raise almost anything
        raise ImageInputError(f"`{path}` cannot be read as a mask: {error}") from error
    if mask.mode in ("RGB", "RGBA", "LA"):
        mask = mask.getchannel(0)
    elif mask.mode in ("1", "P"):
        mask = mask.convert("L")
    array = np.asarray(mask)
    if array.dtype != np.uint8:
        array = (array.astype(np.float64) * (255 / max(float(array.max()), 1.0))).astype(np.uint8)
    return Image.fromarray(array)
