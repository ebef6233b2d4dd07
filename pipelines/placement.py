"""From the objects a user gives to what the pipelines work with: token positions, names, and fields that go unused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from diffusers.utils import logging

from objectcompose.errors import MissingFieldError, ObjectComposeError
from objectcompose.layout import SceneObject, as_scene_objects, check_canvas, object_fields_used
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
) -> list[list[PlacedObject]]:
    """Find each object's phrase in its prompt.

    Args:
        tokenizer: the CLIP tokenizer of the text encoder.
        prompts: one prompt or a list of B prompts.
        objects: one list of `SceneObject`s (or dicts) for every prompt, or one list per prompt.
        canvas: height and width of the picture, in pixels.
        used: the fields of `SceneObject` that the method uses.
        method: the method's name, for messages.

    Returns:
        B lists, one `PlacedObject` per object.

    Raises:
        MissingFieldError: an object has neither `phrase` nor `token`.
        PhraseNotFoundError: a phrase does not occur in its prompt.
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
        check_canvas(row, *canvas)
    used = tuple(used)
    return [_place_row(tokenizer, text, row, used, method) for text, row in zip(texts, rows, strict=True)]


def _place_row(
    tokenizer: Any,
    prompt: str,
    objects: Sequence[SceneObject],
    used: tuple[str, ...],
    method: str,
) -> list[PlacedObject]:
    names = []
    for index, item in enumerate(objects):
        name = item.phrase if item.phrase is not None else item.token
        if name is None:
            raise MissingFieldError(f"{method} needs `phrase` of every object; object {index} of {prompt!r} has none.")
        names.append(name)
    if not names:
        return []
    positions = find_phrases(tokenizer, prompt, names)
    placed: list[PlacedObject] = []
    seen: dict[str, int] = {}
    for item, name, indices in zip(objects, names, positions, strict=True):
        seen[name] = seen.get(name, 0) + 1
        placed.append(
            PlacedObject(
                phrase=name,
                label=name if seen[name] == 1 else f"{name} #{seen[name]}",
                token_indices=tuple(indices),
                box=item.box,
                unused=tuple(object_fields_used(item, used if item.phrase is not None else (*used, "token"))),
            )
        )
    return placed


def warn_unused_fields(placed: Sequence[Sequence[PlacedObject]], method: str, warned: set[str]) -> None:
    """Warn of the fields that went unused and that are not in `warned` yet, and add them there."""
    unused = {name for row in placed for item in row for name in item.unused} - warned
    if unused:
        warned |= unused
        placement_logger.warning(
            f"{method} cannot use these fields of `objects`, which change nothing: {', '.join(sorted(unused))}."
        )
