"""What the user gives every method: objects with a phrase, a picture and a place, and the JSON they travel in.

A layout file is JSON with a schema version, a prompt and a list of objects. Pictures and masks lie beside it as PNG
and are named by a path relative to it, so the folder can be moved. Writing is atomic, and a layout that was written,
read and written again is the same byte for byte. Nothing is unpickled; everything that breaks a rule raises one of
the errors of `objectcompose.errors`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, MissingFieldError, ObjectComposeError, RegionError
from objectcompose.files import write_atomically, write_png
from objectcompose.layout_fields import (
    check_box,
    check_mask,
    check_order,
    check_picture,
    check_scale,
    check_text,
    finite_number,
    shown_value,
)


SCHEMA_VERSION = 1

# COCO boxes are rounded to hundredths of a pixel or to whole pixels and may stick out by that much.
_COCO_SLACK_PIXELS = 1.0


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One object of a scene. Every field is optional; a method says which ones it needs.

    Args:
        phrase: the words of the prompt that name the object, for example "a corgi".
        image: a reference picture, as a PIL image or a path; held as a PIL image in mode RGB, or RGBA where the alpha
            channel is the cut-out of the object.
        mask: where the object is on the canvas, `(H, W)`, values {0, 1}, 1 = object; also accepted as a numpy array, a
            nested list, a PIL image of mode "1" or "L" or the path of such a PNG, there with 255 for 1 too. Held as a
            float32 tensor on the CPU. Where both are given, a method that can use either takes the mask.
        box: where the object is: (x0, y0, x1, y1), fractions in [0, 1] of width and height, origin top left.
        token: a learned placeholder that stands for the object, for example "<asset0>".
        scale: strength, at least 0.
        order: who is in front where regions overlap; the higher is, ties: the smaller one.

    Raises:
        LayoutError: a field breaks its rule.
        RegionError: the mask is empty, not `(H, W)` or not binary.
        ImageInputError: the picture or the mask's file cannot be read, or has nothing in it.
    """

    phrase: str | None = None
    image: Any = None
    mask: Any = None
    box: tuple[float, float, float, float] | None = None
    token: str | None = None
    scale: float = 1.0
    order: int = 0

    def __post_init__(self) -> None:
        checked = {
            "phrase": None if self.phrase is None else check_text(self.phrase, "phrase"),
            "image": None if self.image is None else check_picture(self.image, "image"),
            "mask": None if self.mask is None else check_mask(self.mask, "mask"),
            "box": None if self.box is None else check_box(self.box, "box"),
            "token": None if self.token is None else check_text(self.token, "token", one_word=True),
            "scale": check_scale(self.scale),
            "order": check_order(self.order),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SceneObject):
            return NotImplemented
        return _plain_fields(self) == _plain_fields(other) and all(
            _picture_bytes(mine) == _picture_bytes(theirs)
            for mine, theirs in ((self.image, other.image), (self.mask, other.mask))
        )

    def __hash__(self) -> int:
        return hash(_plain_fields(self))


OBJECT_FIELDS = tuple(field.name for field in fields(SceneObject))
_OBJECT_DEFAULTS = {field.name: field.default for field in fields(SceneObject)}


@dataclass(frozen=True)
class Layout:
    """A prompt and its objects.

    Args:
        prompt: the text of the whole picture.
        objects: `SceneObject`s, or dicts with their fields; held as a tuple.

    Raises:
        LayoutError: the prompt is not text, or an object breaks a rule.
        RegionError: the masks do not all have the same size.
    """

    prompt: str
    objects: tuple[SceneObject, ...] = ()

    def __post_init__(self) -> None:
        check_text(self.prompt, "prompt", may_be_empty=True)
        if isinstance(self.objects, (str, bytes, Mapping)) or not isinstance(self.objects, Iterable):
            raise LayoutError(f"`objects` must be a list of objects, got {shown_value(self.objects)}.")
        object.__setattr__(self, "objects", tuple(_one_prompts_objects(list(self.objects), "objects")))


def as_scene_objects(objects: Any, batch_size: int) -> list[list[SceneObject]]:
    """The objects of each prompt, from whatever form the user gave them in.

    Args:
        objects: None, one list for all prompts, or one list per prompt; each entry a `SceneObject` or a dict with its
            fields (`image` and `mask` as values or paths).
        batch_size: number of prompts, at least 1.

    Returns:
        One list per prompt, `batch_size` of them.

    Raises:
        LayoutError: another form, an unknown field, or another number of lists than prompts.
        RegionError: masks of one prompt differ in size.
    """
    if objects is None:
        return [[] for _ in range(batch_size)]
    if isinstance(objects, Layout) or (hasattr(objects, "prompt") and hasattr(objects, "objects")):
        objects = objects.objects
    if not isinstance(objects, (list, tuple)):
        raise LayoutError(f"`objects` must be a list of objects, or one list per prompt, got {shown_value(objects)}.")
    nested = [isinstance(entry, (list, tuple)) or entry is None for entry in objects]
    if not any(nested):
        shared = _one_prompts_objects(objects, "objects")
        return [list(shared) for _ in range(batch_size)]
    if not all(nested):
        raise LayoutError("`objects` must hold either objects or one list per prompt, got a mixture of both.")
    if len(objects) != batch_size:
        raise LayoutError(f"`objects` must hold one list per prompt: {batch_size} prompts, got {len(objects)} lists.")
    return [_one_prompts_objects(entry or [], f"objects[{index}]") for index, entry in enumerate(objects)]


def object_fields_used(obj: SceneObject, used: Iterable[str]) -> tuple[str, ...]:
    """The fields that `obj` sets to something other than their default and that are not among `used`.

    A method puts them into `output.objects[picture][i].unused`. Field order of `SceneObject`.
    """
    used = set(used)
    assert used <= set(OBJECT_FIELDS), f"no such fields: {sorted(used - set(OBJECT_FIELDS))}"
    changed = (name for name in OBJECT_FIELDS if not _is_default(name, getattr(obj, name)))
    return tuple(name for name in changed if name not in used)


def require_object_fields(
    objects: Sequence[SceneObject], needed: Iterable[str | tuple[str, ...]], method: str, where: str | None = None
) -> None:
    """Check that each object has the fields that a method needs.

    Args:
        objects: the objects of one prompt.
        needed: field names; a tuple of names means that one of them is enough, as in `("mask", "box")`.
        method: the name of the method, for the message.
        where: only objects that have this field; None: all.

    Raises:
        MissingFieldError: names the object, the field and the method.
    """
    which = "every object" if where is None else f"every object with `{where}`"
    for index, obj in enumerate(objects):
        if where is not None and getattr(obj, where) is None:
            continue
        for names in needed:
            names = (names,) if isinstance(names, str) else tuple(names)
            if all(getattr(obj, name) is None for name in names):
                wanted = " or ".join(f"`{name}`" for name in names)
                raise MissingFieldError(
                    f"{method} needs {wanted} of {which}; objects[{index}] has none: {shown_value(obj)}."
                )


def check_canvas(objects: Sequence[SceneObject], height: int, width: int) -> None:
    """Check that the masks of the objects have the shape of the canvas, at any resolution.

    Args:
        objects: the objects of one prompt.
        height, width: size of the picture in pixels.

    Raises:
        RegionError: a mask's sides are in another proportion than the canvas' (one mask pixel off or more).
    """
    for index, obj in enumerate(objects):
        if obj.mask is None:
            continue
        rows, columns = obj.mask.shape
        if abs(rows * width - columns * height) >= max(height, width):
            raise RegionError(
                f"`mask` must have the proportions of the canvas ({height}, {width}); "
                f"objects[{index}] has a mask of shape ({rows}, {columns})."
            )


def layout_from_dict(data: Any, folder: str | os.PathLike | None = None) -> Layout:
    """A layout from its JSON form.

    Args:
        data: `{"schema_version": 1, "prompt": ..., "objects": [...]}`.
        folder: where relative paths start, and which they may not leave; None: paths are used as they are.

    Raises:
        LayoutError: wrong version, unknown or missing field, a path that leaves the folder, or a broken object.
    """
    if not isinstance(data, Mapping):
        raise LayoutError(f"`layout` must be a JSON object, got {shown_value(data)}.")
    _refuse_unknown(data, ("schema_version", "prompt", "objects"), "layout")
    version = data.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise LayoutError(f"`schema_version` must be {SCHEMA_VERSION}, got {shown_value(version)}.")
    if "prompt" not in data:
        raise LayoutError("`prompt` must be in the layout, got none.")
    entries = data.get("objects", [])
    if not isinstance(entries, (list, tuple)):
        raise LayoutError(f"`objects` must be a list, got {shown_value(entries)}.")
    if folder is not None:
        entries = [_with_found_files(entry, Path(folder), index) for index, entry in enumerate(entries)]
    return Layout(prompt=data["prompt"], objects=tuple(entries))


def load_layout(path: str | os.PathLike) -> Layout:
    """The layout in a JSON file; its pictures and masks are looked for beside the file.

    Raises:
        LayoutError: the file is missing, is no valid JSON (NaN and repeated keys are not), or breaks the schema.
        ImageInputError, RegionError: a picture or a mask is missing or unusable.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeats)
    except ObjectComposeError as error:
        raise LayoutError(f"`path` must hold a layout, but {shown_value(path)} does not: {error}") from None
    except OSError as error:
        raise LayoutError(f"`path` must be a readable file, got {shown_value(path)}: {error.strerror}.") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise LayoutError(f"`path` must hold valid JSON, but {shown_value(path)} does not: {error}.") from None
    return layout_from_dict(data, folder=Path(path).parent)


def save_layout(layout: Layout, path: str | os.PathLike) -> None:
    """Write a layout as JSON, and its pictures and masks as PNG into the folder `<name of path>_pictures` beside it.

    Files are named by their content, each is written aside and moved into place, and the JSON comes last, so a reader
    never meets half a layout. Pictures of an older layout of that name stay.

    Raises:
        LayoutError: a file cannot be written.
    """
    try:
        target = Path(path)
        pictures = target.with_name(f"{target.stem}_pictures")
        target.parent.mkdir(parents=True, exist_ok=True)
        entries = [_object_to_json(obj, pictures) for obj in layout.objects]
        data = {"schema_version": SCHEMA_VERSION, "prompt": layout.prompt, "objects": entries}
        write_atomically(target, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
    except (OSError, ValueError, TypeError) as error:
        raise LayoutError(f"`path` must be a file that can be written, got {shown_value(path)}: {error}.") from error


def layout_from_coco(
    annotations: Mapping[str, Any], image_id: int, prompt: str | None = None, include_crowds: bool = False
) -> Layout:
    """The boxes of one image of a COCO instances file, as a layout.

    Args:
        annotations: the parsed file: `images` (`id`, `width`, `height`), `annotations` (`image_id`, `category_id`,
            `bbox` as [x, y, width, height] in pixels) and `categories` (`id`, `name`).
        image_id: which image.
        prompt: the caption; None: "a photo of a dog, a cup and a dog", from the category names in file order.
        include_crowds: also take the boxes around crowds (`iscrowd`).

    Returns:
        One object per box, with the category name as its phrase. Boxes that stick out of the image by at most one
        pixel, which is how COCO rounds, end at its border.

    Raises:
        LayoutError: an entry is missing or broken, the image is not in the file, or a box sticks out further.
    """
    try:
        names = {category["id"]: category["name"] for category in annotations["categories"]}
        image = next((image for image in annotations["images"] if image["id"] == image_id), None)
        if image is None:
            raise LayoutError(f"`image_id` must be an image of the annotations, got {shown_value(image_id)}.")
        found = [entry for entry in annotations["annotations"] if entry["image_id"] == image_id]
        found = [entry for entry in found if include_crowds or not entry.get("iscrowd", 0)]
        objects = [
            SceneObject(
                phrase=names[entry["category_id"]], box=_coco_box(entry["bbox"], image["width"], image["height"])
            )
            for entry in found
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise LayoutError(f"`annotations` must be a COCO instances file; missing or wrong: {error}.") from None
    return Layout(prompt=_listing_prompt(objects) if prompt is None else prompt, objects=tuple(objects))


def _coco_box(bbox: Any, width: Any, height: Any) -> tuple[float, float, float, float]:
    width, height = finite_number(width, "width"), finite_number(height, "height")
    if width <= 0 or height <= 0:
        raise LayoutError(f"`width` and `height` of a COCO image must be positive, got {width} and {height}.")
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4:
        raise LayoutError(f"`bbox` must be [x, y, width, height] in pixels, got {shown_value(bbox)}.")
    x, y, box_width, box_height = (finite_number(number, "bbox") for number in bbox)
    corners = (x, y, x + box_width, y + box_height)
    limits = (width, height, width, height)
    slack = _COCO_SLACK_PIXELS
    if any(not -slack <= corner <= limit + slack for corner, limit in zip(corners, limits, strict=True)):
        raise LayoutError(f"`bbox` must lie in the {width} x {height} image, got {shown_value(bbox)}.")
    return check_box(
        [min(max(corner / limit, 0.0), 1.0) for corner, limit in zip(corners, limits, strict=True)], "bbox"
    )


def _listing_prompt(objects: Sequence[SceneObject]) -> str:
    names = [obj.phrase or "thing" for obj in objects]
    things = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    return prompt_of_phrases(things)


def prompt_of_phrases(phrases: Sequence[str]) -> str:
    """The phrases as a caption lists them: "a photo of a dog, a cup and two birds"; empty without phrases."""
    if not phrases:
        return ""
    return "a photo of " + (", ".join(phrases[:-1]) + " and " if phrases[1:] else "") + phrases[-1]


def _one_prompts_objects(entries: Sequence[Any], name: str) -> list[SceneObject]:
    objects = [_one_object(entry, f"{name}[{index}]") for index, entry in enumerate(entries)]
    sizes = {tuple(obj.mask.shape) for obj in objects if obj.mask is not None}
    if len(sizes) > 1:
        raise RegionError(f"`mask` must have one size for all objects of a prompt, got {sorted(sizes)} in `{name}`.")
    return objects


def _one_object(entry: Any, name: str) -> SceneObject:
    if isinstance(entry, SceneObject):
        return entry
    if isinstance(entry, Mapping):
        _refuse_unknown(entry, OBJECT_FIELDS, name)
        values = dict(entry)
    elif all(hasattr(entry, field) for field in OBJECT_FIELDS):
        # The same class from another copy of this code: pipelines pushed to the Hub carry their own.
        values = {field: getattr(entry, field) for field in OBJECT_FIELDS}
    else:
        raise LayoutError(f"`{name}` must be a SceneObject or a dict with its fields, got {shown_value(entry)}.")
    try:
        return SceneObject(**values)
    except ObjectComposeError as error:
        raise type(error)(f"{name}: {error}") from error


def _refuse_unknown(data: Mapping[Any, Any], known: Sequence[str], name: str) -> None:
    for key in data:
        if key in known:
            continue
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise LayoutError(f"`{name}` may have the fields {', '.join(known)}, got {shown_value(key)}.{hint}")


def _with_found_files(entry: Any, folder: Path, index: int) -> Any:
    """The object's JSON form with its relative paths replaced by full ones."""
    if not isinstance(entry, Mapping):
        return entry
    found = dict(entry)
    for name in ("image", "mask"):
        if found.get(name) is not None:
            found[name] = _found_file(found[name], folder, f"objects[{index}].{name}")
    return found


def _found_file(relative: Any, folder: Path, name: str) -> Path:
    check_text(relative, name)
    try:
        path, root = (folder / relative).resolve(), folder.resolve()
        inside = not Path(relative).is_absolute() and path.is_relative_to(root)
        exists = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise LayoutError(f"`{name}` must be a usable path, got {shown_value(relative)}: {error}.") from None
    if not inside:
        raise LayoutError(f"`{name}` must be a relative path inside the layout's folder, got {shown_value(relative)}.")
    if not exists:
        raise ImageInputError(
            f"`{name}` must be a file that exists, got {shown_value(relative)} in {shown_value(str(folder))}."
        )
    return path


def _object_to_json(obj: SceneObject, pictures: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name in OBJECT_FIELDS:
        value = getattr(obj, name)
        if _is_default(name, value):
            continue
        if name in ("image", "mask"):
            value = _save_picture(value, pictures)
        entry[name] = list(value) if name == "box" else value
    return entry


def _save_picture(value: Any, pictures: Path) -> str:
    """Write a picture or a mask; its path relative to the folder of the layout."""
    content = _picture_bytes(value)
    picture = Image.fromarray((value.numpy() * 255).astype(np.uint8)) if isinstance(value, torch.Tensor) else value
    pictures.mkdir(exist_ok=True)
    name = f"{hashlib.sha256(content).hexdigest()[:20]}.png"
    write_png(pictures / name, picture)
    return f"{pictures.name}/{name}"


def _picture_bytes(value: Any) -> bytes:
    """What makes two pictures, or two masks, the same: kind, size and values."""
    if value is None:
        return b""
    if isinstance(value, torch.Tensor):
        return f"mask {tuple(value.shape)} ".encode() + value.numpy().astype(np.uint8).tobytes()
    return f"{value.mode} {value.size} ".encode() + value.tobytes()


def _plain_fields(obj: SceneObject) -> tuple[Any, ...]:
    return obj.phrase, obj.box, obj.token, obj.scale, obj.order


def _is_default(name: str, value: Any) -> bool:
    default = _OBJECT_DEFAULTS[name]
    return value is None if default is None else value == default


def _refuse_constant(text: str) -> None:
    raise LayoutError(f"numbers must be finite, got {text}.")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise LayoutError(f"a key may occur only once, got {shown_value([key for key, _ in pairs])}.")
    return data
