"""Ground truth of toybox's scenes behind the interface of a detector: exact masks and boxes, no model.

A scene is drawn from a seed, so its truth needs no file: the truth of a set of scenes is known from their seeds, and a
picture is recognised by its pixels. It answers only for pictures that it has rendered itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from objectcompose.errors import CheckpointError, ImageInputError, ObjectComposeError
from objectcompose.files import write_atomically
from objectcompose.grounding.detection import Box, Detection, box_of_mask
from objectcompose.grounding.inputs import plain_phrase
from objectcompose.layout_fields import shown_value
from objectcompose.toybox.categories import PRESETS, Preset
from objectcompose.toybox.scenes import SceneBatch, render_scenes, sample_scene


SCENES_FILE = "scenes.json"
_LEADING_WORDS = ("a photo of ", "a ", "an ", "the ")
_SCENES_AT_ONCE = 64


class ToyboxTruth:
    """What the scenes of some seeds show.

    Args:
        preset: the world.
        seeds: of `objectcompose.toybox.scenes.sample_scene`: each an integer or a tuple of integers.

    Attributes:
        pictures: the scenes as RGB pictures of 8 bits, in the order of the seeds.
    """

    name = "toybox"

    def __init__(self, preset: Preset, seeds: Sequence[int | Sequence[int]]) -> None:
        self.preset = preset
        self.seeds = [seed if isinstance(seed, int) else tuple(seed) for seed in seeds]
        self.pictures: list[Image.Image] = []
        self._truth: dict[str, list[tuple[str, torch.Tensor]]] = {}
        for start in range(0, len(self.seeds), _SCENES_AT_ONCE):
            part = self.seeds[start : start + _SCENES_AT_ONCE]
            self._add(render_scenes(preset, [sample_scene(preset, seed) for seed in part]))

    def _add(self, scenes: SceneBatch) -> None:
        for row, spec in enumerate(scenes.specs):
            picture = scene_picture(scenes.pixels[row])
            objects = [(one.category, scenes.visible[row, place]) for place, one in enumerate(spec.identities)]
            self.pictures.append(picture)
            self._truth[_pixel_key(picture)] = objects

    def identity(self) -> str:
        """Names the world and the seeds."""
        asked = json.dumps([self.preset.name, self.preset.image_size, self.seeds])
        return f"{self.name}:{hashlib.sha256(asked.encode()).hexdigest()[:32]}"

    def detect(self, pictures: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """What can be seen of each phrase, one detection per object, score 1; see `Detector`.

        Phrases name categories, with or without article; hidden objects have no hit.

        Raises:
            ImageInputError: a picture is none of this object's scenes.
            ObjectComposeError: a phrase names no category of the world.
        """
        named = [[self._category(phrase) for phrase in words] for words in phrases]
        found = []
        for picture, words, categories in zip(pictures, phrases, named, strict=True):
            phrase_of = dict(zip(categories, words, strict=True))
            found.append(
                [
                    Detection(phrase_of[category], box, mask, 1.0)
                    for category, box, mask in self._visible(picture)
                    if category in phrase_of
                ]
            )
        return found

    def segment(self, pictures: Sequence[Image.Image]) -> list[list[Detection]]:
        """All visible objects of each picture, without phrases; see `Segmenter`."""
        return [[Detection(None, box, mask, 1.0) for _, box, mask in self._visible(one)] for one in pictures]

    def save(self, folder: str | Path) -> Path:
        """Write the pictures, `00000.png` and so on, and their seeds, from which `load_toybox_truth` knows them again.

        Returns:
            Path of the seeds' file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(self.pictures):
            picture.save(folder / f"{number:05d}.png")
        path = folder / SCENES_FILE
        write_atomically(path, json.dumps({"preset": self.preset.name, "seeds": self.seeds}).encode())
        return path

    def _visible(self, picture: Image.Image) -> list[tuple[str, Box, torch.Tensor]]:
        key = _pixel_key(picture)
        if key not in self._truth:
            raise ImageInputError(f"`images` must be scenes of this ToyboxTruth, pixel for pixel, got {picture.size}.")
        boxed = [(category, box_of_mask(mask), mask.clone()) for category, mask in self._truth[key]]
        return [(category, box, mask) for category, box, mask in boxed if box is not None]

    def _category(self, phrase: str) -> str:
        words = plain_phrase(phrase)
        for leading in _LEADING_WORDS:
            words = words.removeprefix(leading)
        if words not in self.preset.categories:
            raise ObjectComposeError(
                f"`phrases` must name categories of toybox ({', '.join(self.preset.categories)}), got {phrase!r}."
            )
        return words


def scene_picture(pixels: torch.Tensor) -> Image.Image:
    """A scene's pixels (3, S, S) in [0, 1] as a PIL picture of 8 bits."""
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def load_toybox_truth(source: str | Path | None = None, *, device: torch.device, dtype: torch.dtype) -> ToyboxTruth:
    """`ToyboxTruth` of a folder, or of the file in it, that `ToyboxTruth.save` wrote; device and dtype play no part.

    Raises:
        CheckpointError: the file is not there or not of that form.
    """
    if source is None:
        raise CheckpointError(f"`model` must be the {SCENES_FILE} that `ToyboxTruth.save` wrote, got none.")
    path = Path(source).expanduser()
    path = path / SCENES_FILE if path.is_dir() else path
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        preset, seeds = PRESETS[content["preset"]], content["seeds"]
        if not all(_is_seed(seed) for seed in seeds):
            raise ValueError(f"seeds must be whole numbers from 0 on, or lists of them, got {shown_value(seeds)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"`model` must be a readable {SCENES_FILE}, got {str(source)!r}: {error}.") from error
    return ToyboxTruth(preset, seeds)


def _is_seed(value: Any) -> bool:
    numbers = value if isinstance(value, list) and value else [value]
    return all(type(number) is int and number >= 0 for number in numbers)


def _pixel_key(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
