"""From the objects a user gives to what the pipelines work with: token positions, names, and fields that go unused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from diffusers.utils import logging

from objectcompose.errors import ObjectComposeError
from objectcompose.layout import (
    SceneObject,
    as_scene_objects,
    check_canvas,
    object_fields_used,
    require_object_fields,
)
from objectcompose.pipelines.pipeline_output import PlacedObject
from objectcompose.pipelines.token_utils import find_phrases


placement_logger = logging.get_logger(__name__)


def place_phrases(
    tokenizer: Any,
    prompts: str | list[str] | None,
    objects: Any,
    canvas: tuple[int, int],
    used: Iterable[str],
    method: str,
    may_share: bool = False,
) -> list[list[PlacedObject]]:
    """Find each object's phrase in its prompt.

    Args:
        tokenizer: the CLIP tokenizer of the text encoder.
        prompts: one prompt or a list of B prompts.
        objects: one list of `SceneObject`s (or dicts) for every prompt, or one list per prompt.
        canvas: height and width of the picture, in pixels.
        used: the fields of `SceneObject` that the method uses.
        method: the method's name, for messages.
        may_share: objects of the same phrase that find no place of their own share the last one that it has, as the
            dogs of "two dogs" do; else they are refused.

    Returns:
        B lists, one `PlacedObject` per object.

    Raises:
        MissingFieldError: an object has neither `phrase` nor `token`.
        PhraseNotFoundError: a phrase does not occur in its prompt, or not often enough.
        PromptTooLongError: a prompt with objects has more tokens than the text encoder reads.
        RegionError: a mask has other proportions than the canvas.
        ObjectComposeError: there is no prompt, or no tokenizer, to look in.
    """
    if prompts is None:
        raise ObjectComposeError("`objects` needs `prompt`: phrases cannot be found in `prompt_embeds`.")
    if tokenizer is None:
        raise ObjectComposeError("`objects` needs the pipeline's tokenizer, which is None.")
    texts = [prompts] if isinstance(prompts, str) else prompts
    rows = as_scene_objects(objects, len(texts))
    for row in rows:
        require_object_fields(row, [("phrase", "token")], method)
    used = tuple(used)
    return place_objects(tokenizer, texts, rows, canvas, lambda item: used, may_share)


def place_objects(
    tokenizer: Any,
    prompts: str | list[str] | None,
    rows: Sequence[Sequence[SceneObject]],
    canvas: tuple[int, int],
    used_fields: Callable[[SceneObject], Iterable[str]],
    may_share: bool = False,
) -> list[list[PlacedObject]]:
    """`place_phrases` for methods whose objects need no phrase: one that is given must be found all the same.

    Args:
        tokenizer: the CLIP tokenizer of the text encoder.
        prompts: one prompt or a list of B prompts; None where only embeddings are known, and no phrase is given then.
        rows: per prompt its objects.
        canvas: height and width of the picture, in pixels.
        used_fields: the fields that the method uses of an object.
        may_share: as in `place_phrases`.

    Raises:
        PhraseNotFoundError, PromptTooLongError, RegionError, ObjectComposeError: as `place_phrases`.
    """
    for row in rows:
        check_canvas(row, *canvas)
    if not any(_object_name(item) is not None for row in rows for item in row):
        return [[_placed(item, None, "", (), used_fields) for item in row] for row in rows]
    if prompts is None:
        raise ObjectComposeError("`phrase` needs `prompt`: phrases cannot be found in `prompt_embeds`.")
    if tokenizer is None:
        raise ObjectComposeError("`phrase` needs the pipeline's tokenizer, which is None.")
    texts = [prompts] if isinstance(prompts, str) else prompts
    return [_place_row(tokenizer, text, row, used_fields, may_share) for text, row in zip(texts, rows, strict=True)]


def _object_name(item: SceneObject) -> str | None:
    return item.phrase if item.phrase is not None else item.token


def _place_row(
    tokenizer: Any,
    prompt: str,
    objects: Sequence[SceneObject],
    used_fields: Callable[[SceneObject], Iterable[str]],
    may_share: bool,
) -> list[PlacedObject]:
    names = [name for name in map(_object_name, objects) if name is not None]
    positions = iter(find_phrases(tokenizer, prompt, names, may_share) if names else [])
    placed: list[PlacedObject] = []
    seen: dict[str, int] = {}
    for item in objects:
        name = _object_name(item)
        if name is None:
            placed.append(_placed(item, None, "", (), used_fields))
            continue
        seen[name] = seen.get(name, 0) + 1
        label = name if seen[name] == 1 else f"{name} #{seen[name]}"
        placed.append(_placed(item, name, label, next(positions), used_fields))
    return placed


def _placed(
    item: SceneObject,
    name: str | None,
    label: str,
    token_indices: Iterable[int],
    used_fields: Callable[[SceneObject], Iterable[str]],
) -> PlacedObject:
    used = tuple(used_fields(item))
    unused = object_fields_used(item, used if item.phrase is not None else (*used, "token"))
    return PlacedObject(name, label, tuple(token_indices), item.box, tuple(unused))


def warn_unused_fields(placed: Sequence[Sequence[PlacedObject]], method: str, warned: set[str]) -> None:
    """Warn of the fields that went unused and that are not in `warned` yet, and add them there."""
    unused = {name for row in placed for item in row for name in item.unused} - warned
    if unused:
        warned |= unused
        placement_logger.warning(
            f"{method} cannot use these fields of `objects`, which change nothing: {', '.join(sorted(unused))}."
        )
