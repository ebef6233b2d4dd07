"""Pictures with captions in the forms that people have them in.

- `metadata.jsonl`, an "imagefolder" of `datasets`: one object per line with `file_name` and `text`, a caption or a
  list of captions; lines that name one picture add up;
- COCO's captions, one JSON file: `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`;
- a text file beside each picture, `a.txt` for `a.jpg`, with one caption per line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from objectcompose.errors import ImageInputError, LayoutError
from objectcompose.grounding.command import PICTURE_SUFFIXES, find_pictures
from objectcompose.layout_fields import check_text
from objectcompose.training.grounded_captions import METADATA


@dataclass(frozen=True)
class CaptionedPicture:
    """One picture.

    Attributes:
        name: its path below the folder, with "/".
        path: the file, which need not be readable as a picture.
        captions: at least one; none blank, none twice.
    """

    name: str
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CaptionedFolder:
    """What a folder holds.

    Attributes:
        pictures: sorted by name, at least one.
        without_caption: names of pictures that nothing is said of.
        without_picture: names that captions were given for, but that are not in the folder.
    """

    pictures: tuple[CaptionedPicture, ...]
    without_caption: tuple[str, ...]
    without_picture: tuple[str, ...]


def read_captioned_folder(folder: Path, captions: Path | None, out: Path) -> CaptionedFolder:
    """Find a folder's pictures and their captions.

    Args:
        folder: searched through for pictures; `file_name`s are below it.
        captions: `.jsonl` or COCO's `.json`; None: `metadata.jsonl` in the folder, else text files beside pictures.
        out: where the data set goes; pictures in there are no input.

    Raises:
        ImageInputError: no folder, or no picture in it.
        LayoutError: no captions, or captions that break their form; names the place.
    """
    if not folder.is_dir():
        raise ImageInputError(f"`pictures` must be a folder, got {str(folder)!r}.")
    found = {path.relative_to(folder).as_posix(): path for path in find_pictures(folder, out)}
    if not found:
        kinds = ", ".join(PICTURE_SUFFIXES)
        raise ImageInputError(f"`pictures` must hold files of type {kinds} outside of `--out`, got {str(folder)!r}.")
    if captions is None and (folder / METADATA).is_file():
        captions = folder / METADATA
    spoken: dict[str, list[str]] = {}
    for name, caption in _text_files(found) if captions is None else _caption_file(captions):
        of_picture = spoken.setdefault(name, [])
        if caption.strip() and caption.strip() not in of_picture:
            of_picture.append(caption.strip())
    pictures = tuple(CaptionedPicture(name, found[name], tuple(spoken[name])) for name in found if spoken.get(name))
    if not pictures:
        raise LayoutError(
            f"`pictures` must have captions: {METADATA} in the folder, a .txt beside each picture, or a file named by "
            f"`--captions`; none of {len(found)} pictures in {str(folder)!r} has one."
        )
    return CaptionedFolder(
        pictures,
        tuple(name for name in found if not spoken.get(name)),
        tuple(sorted(name for name in spoken if name not in found)),
    )


def _text_files(found: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    for name, path in found.items():
        beside = path.with_suffix(".txt")
        if beside.is_file():
            for number, line in enumerate(_read_text(beside).split("\n"), start=1):
                yield name, check_text(line, f"{beside.name} line {number}", may_be_empty=True)


def _caption_file(path: Path) -> Iterator[tuple[str, str]]:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {".jsonl": _metadata, ".json": _coco}
    if path.suffix.lower() not in readers:
        raise LayoutError(f"`--captions` must be a .jsonl or a .json file, got {str(path)!r}.")
    return readers[path.suffix.lower()](path)


def _metadata(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path.name} line {number}"
            entry = _parsed(line, where)
            name, texts = _field(entry, "file_name", str, where), _field(entry, "text", (str, list), where)
            for text in [texts] if isinstance(texts, str) else texts:
                yield _plain_name(name), check_text(text, f"text of {where}", may_be_empty=True)


def _coco(path: Path) -> Iterator[tuple[str, str]]:
    content = _parsed(_read_text(path), path.name)
    names: dict[Any, str] = {}
    for number, image in enumerate(_field(content, "images", list, path.name)):
        where = f"images[{number}] of {path.name}"
        names[_field(image, "id", (int, str), where)] = _plain_name(_field(image, "file_name", str, where))
    for number, annotation in enumerate(_field(content, "annotations", list, path.name)):
        where = f"annotations[{number}] of {path.name}"
        image = _field(annotation, "image_id", (int, str), where)
        if image not in names:
            raise LayoutError(f"`image_id` in {where} must be the id of one of `images`, got {image!r}.")
        yield names[image], check_text(_field(annotation, "caption", str, where), f"caption of {where}", True)


def _field(entry: Any, name: str, kind: Any, where: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
        kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise LayoutError(f"{where} must be an object with `{name}` ({kinds}).")
    return entry[name]


def _plain_name(name: str) -> str:
    """`file_name` as a path below the folder is written: "./a.png" is "a.png"."""
    return PurePosixPath(name).as_posix()


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise LayoutError(f"{where} must be JSON: {error}.") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(f"captions must be a readable file in UTF-8, got {str(path)!r}: {error}.") from error
