"""The one picture that MIFO learns from, with a mask for each instance.

A folder holds `img.jpg` (or .png, ...) and `mask0.png`, `mask1.png`, ...; mask i is of `<asset i>`, by number and not
by the order in which a system lists files. Masks may also be found from phrases (`objectcompose.grounding`). The
shorter side is resized to the model's size and the middle cut out, of picture and masks alike (section C.1 of the
paper; its authors' code squashes instead, `fit="squash"`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, ObjectNotFoundError, RegionError
from objectcompose.grounding.inputs import plain_phrase
from objectcompose.layout_fields import check_picture
from objectcompose.training.runs import digest_of


Fit = Literal["crop", "squash"]
#: Share of the smaller of two masks that may lie in the other: edges of masks are soft, instances are not.
MAX_OVERLAP = 0.05
#: Two hits of a phrase are one thing, or a thing and its part, where more than this share of the smaller mask lies in
#: the other. So are all whose intersection is above half of their union.
SAME_THING_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class InstanceScene:
    """A picture and its N instances.

    Attributes:
        pixels: `(3, S, S)`, values in [-1, 1].
        masks: `(N, S, S)`, {0, 1}, 1 = instance.
    """

    pixels: torch.Tensor
    masks: torch.Tensor

    def digest(self) -> str:
        """Names the picture and its masks."""
        return digest_of([self.pixels.numpy().tobytes(), self.masks.numpy().tobytes()])

    def flipped(self) -> InstanceScene:
        """Mirrored left to right, picture and masks alike."""
        return InstanceScene(self.pixels.flip(-1), self.masks.flip(-1))

    def alone(self, instance: int) -> InstanceScene:
        """One instance on mid-grey, as separate sampling shows it."""
        return InstanceScene(self.pixels * self.masks[instance], self.masks)


def read_instance_mask(path: str | Path) -> torch.Tensor:
    """A mask file as bool `(H, W)`, at least half of white counts.

    Single-channel, RGB (the first channel) and RGBA pictures are read; of RGBA the alpha channel where it varies and
    the colours do not. Lossy files are fine.

    Raises:
        ImageInputError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            values = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageInputError(f"`masks` must be readable pictures, got {str(path)!r}: {error}.") from None
    channel = values[..., 0]
    if values.shape[2] == 4 and np.ptp(values[..., 3]) and not np.ptp(values[..., :3]):
        channel = values[..., 3]
    return torch.from_numpy(channel >= 128)


def scene_files(folder: str | Path) -> tuple[Path, list[Path]]:
    """The picture of a folder and its masks by number.

    Raises:
        LayoutError: no picture, no masks, or a number missing or twice.
    """
    folder = Path(folder)
    pictures = sorted(folder.glob("img.*"))
    numbered = [(re.fullmatch(r"mask(\d+)", path.stem), path) for path in folder.glob("mask*.*")]
    masks = sorted((int(match[1]), path) for match, path in numbered if match is not None)
    if len(pictures) != 1:
        raise LayoutError(f"`data` must hold one picture `img.*`, got {len(pictures)} in {str(folder)!r}.")
    if [number for number, _ in masks] != list(range(len(masks))) or not masks:
        found = ", ".join(path.name for _, path in masks) or "none"
        raise LayoutError(f"`data` must hold `mask0.*`, `mask1.*`, ... without gaps, got {found}.")
    return pictures[0], [path for _, path in masks]


def make_scene(image: Any, masks: Sequence[Any], size: int, fit: Fit = "crop") -> InstanceScene:
    """A scene for a model of `size` x `size` pixels.

    Args:
        image: PIL image or path.
        masks: per instance a tensor `(H, W)` of {0, 1} of the picture's size, or the path of a mask file.
        size: of the model.
        fit: "crop" cuts the middle out, "squash" changes the proportions.

    Raises:
        LayoutError: no masks, or an unknown `fit`.
        RegionError: a mask has another size than the picture, is empty (also after cropping), or two overlap.
        ImageInputError: a file cannot be read.
    """
    if fit not in ("crop", "squash"):
        raise LayoutError(f'`fit` must be "crop" or "squash", got {fit!r}.')
    if len(masks) == 0:
        raise LayoutError("`masks` must hold one mask per instance, got none.")
    picture = check_picture(image).convert("RGB")
    read = [read_instance_mask(mask) if isinstance(mask, (str, Path)) else mask.bool() for mask in masks]
    for index, mask in enumerate(read):
        if tuple(mask.shape) != (picture.height, picture.width):
            raise RegionError(
                f"`masks[{index}]` must have the picture's size ({picture.height}, {picture.width}), got"
                f" {tuple(mask.shape)}."
            )
        if not mask.any():
            raise RegionError(f"`masks[{index}]` must mark at least one pixel, got an empty mask.")
    box, scaled = _fitting(picture.width, picture.height, size, fit)
    pixels = torch.from_numpy(np.array(_fitted(picture, box, scaled, Image.Resampling.LANCZOS)))
    cut = [
        torch.from_numpy(
            np.array(_fitted(Image.fromarray(mask.cpu().numpy()).convert("L"), box, scaled, Image.Resampling.BOX))
        )
        for mask in read
    ]
    fitted = torch.stack(cut) >= 128
    _check_masks(fitted)
    return InstanceScene(pixels.permute(2, 0, 1).float() / 127.5 - 1, fitted.float())


def _fitting(width: int, height: int, size: int, fit: Fit) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """The part of the resized picture to cut out, and the size to resize to."""
    if fit == "squash":
        return (0, 0, size, size), (size, size)
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (wide - size) // 2, (high - size) // 2
    return (left, top, left + size, top + size), (wide, high)


def _fitted(image: Image.Image, box: tuple[int, int, int, int], scaled: tuple[int, int], how: Any) -> Image.Image:
    return image.resize(scaled, how).crop(box)


def _check_masks(masks: torch.Tensor) -> None:
    sizes = masks.flatten(1).sum(1)
    for index, size in enumerate(sizes.tolist()):
        if not size:
            raise RegionError(f"`masks[{index}]` must mark something of the part that is learned from, got nothing.")
    for second in range(len(masks)):
        for first in range(second):
            shared = int((masks[first] & masks[second]).sum())
            if shared > MAX_OVERLAP * min(sizes[first], sizes[second]):
                raise RegionError(
                    f"`masks` must not overlap, got {shared} pixels in both `masks[{first}]` and `masks[{second}]`."
                )


def masks_of_phrases(grounder: Any, image: Any, phrases: Sequence[str]) -> list[torch.Tensor]:
    """A mask for each phrase, found in the picture (the paper's first limitation: masks had to be given).

    Look-alikes share their words, so a phrase may be named more than once: named n times it gets the masks of its n
    surest hits, from left to right. Of hits that show one thing (`SAME_THING_SHARE`) the surest counts alone.

    Args:
        grounder: a `Grounder` that makes masks.
        image: PIL image or path.
        phrases: such as ["a dog", "a dog", "a cup"]; case and white space make no difference.

    Returns:
        Masks bool `(H, W)`, in the order of the phrases.

    Raises:
        ObjectNotFoundError: a phrase names fewer things in the picture than it stands there for.
        RegionError: the grounder makes boxes only.
        LayoutError: no phrases, or one is empty.
    """
    wanted: dict[str, list[str]] = {}
    for phrase in phrases:
        wanted.setdefault(plain_phrase(phrase), []).append(phrase)
    hits: dict[str, list[Any]] = {words: [] for words in wanted}
    for detection in grounder.ground(check_picture(image), [same[0] for same in wanted.values()]):
        if detection.mask is None:
            raise RegionError("`grounder` must make masks; give it a segmenter.")
        hits[plain_phrase(detection.phrase)].append(detection)
    chosen = {words: _surest_things(hits[words], same[0], len(same)) for words, same in wanted.items()}
    return [chosen[plain_phrase(phrase)].pop(0) for phrase in phrases]


def _surest_things(hits: Sequence[Any], phrase: str, count: int) -> list[torch.Tensor]:
    """Masks of the `count` surest hits that show different things, from left to right; hits come surest first."""
    things: list[Any] = []
    for hit in hits:
        mask = hit.mask > 0
        if mask.any() and not any(_are_one_thing(mask, thing.mask > 0) for thing in things):
            things.append(hit)
    if len(things) < count:
        raise ObjectNotFoundError(
            f"`phrases` names {phrase!r} {count} time{'s' * (count > 1)}, and {len(things)} could be told apart in the"
            " picture. Use another detector or segmenter, words that are each of one thing, or `masks`."
        )
    return [thing.mask > 0 for thing in sorted(things[:count], key=lambda thing: thing.box)]


def _are_one_thing(first: torch.Tensor, second: torch.Tensor) -> bool:
    smaller = min(int(first.sum()), int(second.sum()))
    return int((first & second).sum()) > SAME_THING_SHARE * smaller
