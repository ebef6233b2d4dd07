"""What grounding accepts: pictures, phrases and settings, checked before any model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, ObjectComposeError, PromptTooLongError
from objectcompose.layout_fields import check_picture, check_text, shown_value


#: Below this side there is nothing to detect: a ViT patch alone is 14 or 16 pixels.
MIN_PICTURE_SIDE = 16
#: Detectors need a few hundred cells of their feature maps; a longer strip has fewer after their resize.
MAX_PICTURE_RATIO = 20
#: What transparency is shown on.
PICTURE_BACKGROUND = (255, 255, 255)


def check_ground_picture(image: Any, name: str = "image") -> Image.Image:
    """A picture as every detector reads it: RGB, 8 bits; transparent parts are shown on white.

    Args:
        image: PIL image or path; see `objectcompose.layout_fields.check_picture` for formats and modes. Pictures with
            16 bits are refused, since how to bring them to 8 is the user's choice.
        name: the argument's name for messages.

    Raises:
        ImageInputError: no readable picture of 8 bits, a side below 16 pixels, or sides in a proportion above 20.
    """
    picture = check_picture(image, name)
    width, height = picture.size
    if min(width, height) < MIN_PICTURE_SIDE:
        raise ImageInputError(
            f"`{name}` must have at least {MIN_PICTURE_SIDE} pixels on each side, got {width} x {height}."
        )
    if max(width, height) > MAX_PICTURE_RATIO * min(width, height):
        raise ImageInputError(
            f"`{name}` must have sides in a proportion of at most {MAX_PICTURE_RATIO}, got {width} x {height}."
        )
    return opaque_picture(picture)


def opaque_picture(picture: Image.Image) -> Image.Image:
    """An RGB picture as it is, an RGBA one on `PICTURE_BACKGROUND`."""
    if picture.mode != "RGBA":
        return picture
    background = Image.new("RGBA", picture.size, (*PICTURE_BACKGROUND, 255))
    return Image.alpha_composite(background, picture).convert("RGB")


def check_ground_phrases(phrases: Any, name: str = "phrases") -> tuple[str, ...]:
    """Phrases as given, at least one, all different when case and white space are disregarded.

    Raises:
        LayoutError: not a list of non-empty strings, no phrase, or a phrase twice.
    """
    if isinstance(phrases, str) or not isinstance(phrases, Sequence):
        raise LayoutError(f"`{name}` must be a list of strings, got {shown_value(phrases)}.")
    if not phrases:
        raise LayoutError(f"`{name}` must hold at least one phrase, got none.")
    seen: set[str] = set()
    for index, phrase in enumerate(phrases):
        words = plain_phrase(check_text(phrase, f"{name}[{index}]"))
        if words in seen:
            raise LayoutError(f"`{name}` must differ from one another, got {shown_value(phrase)} twice.")
        seen.add(words)
    return tuple(phrases)


def plain_phrase(phrase: str) -> str:
    """The phrase in lower case with single spaces: what detectors read, and what makes two phrases the same."""
    return " ".join(phrase.lower().split())


def check_threshold(value: Any, name: str) -> float:
    """`value` as a float in [0, 1]; raises ObjectComposeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ObjectComposeError(f"`{name}` must lie in [0, 1], got {value!r}.")
    return float(value)


def check_token_counts(tokenizer: Any, phrases: Sequence[str], longest: int) -> None:
    """Check that each phrase fits into a text encoder.

    Raises:
        PromptTooLongError: a phrase has more than `longest` tokens, special ones counted.
    """
    for phrase in phrases:
        count = len(tokenizer(phrase).input_ids)
        if count > longest:
            raise PromptTooLongError(
                f"`phrases` must have at most {longest} tokens each for this model, got {count}: {phrase!r}."
            )
