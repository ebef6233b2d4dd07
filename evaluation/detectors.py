"""Which of a prompt's categories can be seen in a picture: open-vocabulary detectors, and toybox's judge.

All categories of a prompt are asked together: a box belongs to the query that fits it best, so that queries compete,
as in the protocols of MULTIGEN (TokenCompose, arXiv:2312.03626) and VISOR (arXiv:2212.10015). What is seen is kept
from a low score on, and the protocol's threshold applied when pictures are scored.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from objectcompose.errors import ImageInputError, ObjectComposeError
from objectcompose.evaluation.generation import Picture, require_pictures
from objectcompose.evaluation.row_log import RowLog, measure_groups
from objectcompose.grounding.detection import Detection
from objectcompose.grounding.grounder import usable_device
from objectcompose.grounding.grounding_dino import GroundingDinoDetector, load_grounding_dino
from objectcompose.grounding.inputs import check_ground_picture
from objectcompose.grounding.loading import fingerprint
from objectcompose.grounding.owlv2 import Owlv2Detector, load_owlv2, load_owlvit
from objectcompose.layout_fields import check_picture
from objectcompose.toybox.judge import Judge


#: Scores from which on sightings are kept, and above which a category counts as present.
SAVED_SCORE, PRESENCE_SCORE = 0.01, 0.1
QUERY = "a photo of a {}"
PRESENCE_DETECTORS = ("judge", "owlv2", "owlvit", "grounding-dino")
DEFAULT_OWLV2_LARGE = "google/owlv2-large-patch14-ensemble"


@dataclass(frozen=True)
class Sighting:
    """One thing that is seen: its category and a score in [0, 1]."""

    category: str
    score: float


@dataclass(frozen=True)
class PlacedSighting(Sighting):
    """One thing that is seen, and where: `box` is xyxy, fractions of width and height."""

    box: tuple[float, float, float, float]


class PresenceDetector(Protocol):
    """Says what pictures show."""

    name: str

    def identity(self) -> str:
        """Names weights and settings: equal identities give equal sightings."""

    def check_categories(self, categories: Sequence[str]) -> None:
        """Raise ObjectComposeError for a category that it cannot know."""

    def look(self, pictures: Sequence[Image.Image], categories: Sequence[Sequence[str]]) -> list[list[Sighting]]:
        """What each picture (RGB) shows, at least of its categories, scores above `SAVED_SCORE`."""

    def find(self, pictures: Sequence[Image.Image], categories: Sequence[Sequence[str]]) -> list[list[PlacedSighting]]:
        """As `look`, and where it is."""


class PhrasePresence:
    """OWLv2, OWL-ViT or Grounding DINO.

    Args:
        detector: of grounding, with thresholds of at most `SAVED_SCORE`.
    """

    def __init__(self, detector: Owlv2Detector | GroundingDinoDetector) -> None:
        threshold, self.query = detector.threshold, QUERY
        if isinstance(detector, GroundingDinoDetector):  # which reads the bare noun as its own token
            threshold, self.query = max(threshold, detector.text_threshold), "{}"
        if threshold > SAVED_SCORE:
            raise ObjectComposeError(f"`detector` must keep scores from {SAVED_SCORE} on, got {threshold}.")
        self.detector = detector
        self.name = detector.name

    def identity(self) -> str:
        """See `PresenceDetector`."""
        return f"{self.detector.identity()} {self.query}"

    def check_categories(self, categories: Sequence[str]) -> None:
        """Any word will do."""

    def look(self, pictures: Sequence[Image.Image], categories: Sequence[Sequence[str]]) -> list[list[Sighting]]:
        """See `PresenceDetector`."""
        return [[Sighting(one.category, one.score) for one in row] for row in self.find(pictures, categories)]

    def find(self, pictures: Sequence[Image.Image], categories: Sequence[Sequence[str]]) -> list[list[PlacedSighting]]:
        """See `PresenceDetector`; pictures of one size and number of categories share a forward pass."""
        found: list[list[PlacedSighting]] = [[] for _ in pictures]
        alike: dict[tuple, list[int]] = {}
        for index, picture in enumerate(pictures):
            alike.setdefault((picture.size, len(categories[index])), []).append(index)
        for group in alike.values():
            queries = [[self.query.format(name) for name in categories[index]] for index in group]
            seen = self.detector.detect([pictures[index] for index in group], queries)
            for index, asked, detections in zip(group, queries, seen, strict=True):
                names = dict(zip(asked, categories[index], strict=True))
                found[index] = [_sighting(one, names) for one in detections]
        return found


def _sighting(detection: Detection, names: dict[str, str]) -> PlacedSighting:
    return PlacedSighting(names[detection.phrase or ""], detection.score, detection.box)


class JudgePresence:
    """Toybox's judge; it always names everything that it sees.

    Args:
        judge: the committed one.
    """

    name = "judge"

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._identity = f"judge:{fingerprint(judge.segmenter, judge.segmenter.config)}"

    def identity(self) -> str:
        """See `PresenceDetector`."""
        return self._identity

    def check_categories(self, categories: Sequence[str]) -> None:
        """Raise ObjectComposeError for what is no category of the judge's world."""
        known = self.judge.preset.categories
        unknown = sorted(set(categories) - set(known))
        if unknown:
            raise ObjectComposeError(
                f"`prompts` must name categories that the judge knows ({', '.join(known)}), got {', '.join(unknown)}."
            )

    def look(self, pictures: Sequence[Image.Image], categories: Sequence[Sequence[str]]) -> list[list[Sighting]]:
        """See `PresenceDetector`."""
        return [[Sighting(one.category, one.score) for one in row] for row in self.find(pictures, categories)]

    def find(self, pictures: Sequence[Image.Image], categories: Sequence[Sequence[str]]) -> list[list[PlacedSighting]]:
        """See `PresenceDetector`."""
        found: list[list[PlacedSighting]] = [[] for _ in pictures]
        sizes = {picture.size for picture in pictures}
        for size in sizes:
            group = [index for index, picture in enumerate(pictures) if picture.size == size]
            seen = self.judge.detect(picture_tensor([pictures[index] for index in group]))
            for index, detections in zip(group, seen, strict=True):
                found[index] = [PlacedSighting(one.category, one.score, one.box) for one in detections]
        return found


def picture_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size as (B, 3, H, W) in [0, 1]."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def load_presence(
    name: str, model: str | Path | None = None, *, device: str | torch.device, dtype: torch.dtype = torch.float32
) -> PresenceDetector:
    """A detector by name.

    Args:
        name: one of `PRESENCE_DETECTORS`.
        model: folder or Hub id, not of the judge; None: the protocols' own, or Grounding DINO tiny.
        device: where it runs.
        dtype: of all but the judge.

    Raises:
        ObjectComposeError: an unknown name, a model for the judge, which has one only, or an unusable device.
        CheckpointError: weights are missing or of another model.
    """
    if name not in PRESENCE_DETECTORS:
        raise ObjectComposeError(f"`detector` must be one of {', '.join(PRESENCE_DETECTORS)}, got {name!r}.")
    place = usable_device(device, "--device")
    if name == "judge":
        if model is not None:
            raise ObjectComposeError(f"`detector_model` must not be given with the judge, got {str(model)!r}.")
        return JudgePresence(Judge.load(place))
    common: dict[str, Any] = {"device": place, "dtype": dtype, "threshold": SAVED_SCORE}
    if name == "owlvit":
        return PhrasePresence(load_owlvit(model, **common))
    if name == "grounding-dino":
        return PhrasePresence(load_grounding_dino(model, text_threshold=SAVED_SCORE, **common))
    return PhrasePresence(load_owlv2(model or DEFAULT_OWLV2_LARGE, **common))


def look_at_pictures(
    detector: PresenceDetector,
    pictures: Sequence[Picture],
    folder: str | Path,
    batch_size: int = 8,
    state: PartialState | None = None,
) -> list[list[Sighting]]:
    """What all pictures show, this process looking at its share; what was seen before is read from the folder.

    Args:
        detector: looks.
        pictures: files that are there; each record names categories.
        folder: of the raw sightings, one folder in it for each detector.
        batch_size: pictures at once.
        state: the processes; default: those of the launcher.

    Returns:
        For each picture, in every process, its sightings with scores above `SAVED_SCORE`.

    Raises:
        ObjectComposeError: a category that the detector cannot know, or a prompt without categories.
        ImageInputError: pictures are missing or unreadable.
    """
    state = state or PartialState()
    bare = [picture.record.id for picture in pictures if not picture.record.categories]
    if bare:
        raise ObjectComposeError(f"`prompts` must name categories to look for, prompt {bare[0]} has none.")
    detector.check_categories(sorted({name for picture in pictures for name in picture.record.categories}))
    require_pictures(pictures)
    place = Path(folder) / f"{detector.name}-{sha256(detector.identity().encode()).hexdigest()[:16]}"
    seen = measure_groups(pictures, partial(_look_at_group, detector), place, batch_size, state, label=detector.name)
    found = dict(seen)
    return [found[picture.path.name] for picture in pictures]


def _look_at_group(
    detector: PresenceDetector, group: Sequence[Picture], log: RowLog
) -> list[tuple[str, list[Sighting]]]:
    """File name and sightings of each picture; rows are kept under name, content and question, so none is stale."""
    contents = [picture.path.read_bytes() for picture in group]
    asked = [list(picture.record.categories) for picture in group]
    keys = [
        f"{picture.path.name} {sha256(content + json.dumps(names).encode()).hexdigest()[:32]}"
        for picture, content, names in zip(group, contents, asked, strict=True)
    ]
    waiting = [index for index, key in enumerate(keys) if key not in log.rows]
    if waiting:
        images = [_read_picture(contents[index], group[index].path) for index in waiting]
        for index, seen in zip(waiting, detector.look(images, [asked[index] for index in waiting]), strict=True):
            log.add(
                keys[index], {"classes": [one.category for one in seen], "scores": [float(one.score) for one in seen]}
            )
    rows = [log.rows[key] for key in keys]
    return [
        (picture.path.name, [Sighting(*pair) for pair in zip(row["classes"], row["scores"], strict=True)])
        for picture, row in zip(group, rows, strict=True)
    ]


def _read_picture(content: bytes, path: Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # damaged files make the decoders raise almost anything
        raise ImageInputError(f"`pictures` must be readable, {path} is not: {error}.") from error
    return check_ground_picture(check_picture(image, str(path)), str(path))
