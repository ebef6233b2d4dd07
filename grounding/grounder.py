"""`Grounder`: from a picture and phrases to boxes and masks, whichever models find them.

A detector turns phrases into boxes, some into masks as well; a segmenter turns boxes into masks, and without any text
a picture into all its parts. Backends are named in `DETECTORS` and `SEGMENTERS` and imported when they are asked for.
Results depend on pixels, phrases, weights and settings only: models run in eval mode, without sampling, and detections
come in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from objectcompose.errors import LayoutError, ObjectComposeError, ObjectNotFoundError
from objectcompose.grounding.cache import GroundingCache, result_key
from objectcompose.grounding.detection import Box, Detection, sorted_detections
from objectcompose.grounding.inputs import check_ground_phrases, check_ground_picture


#: Name -> `module:function` that loads the backend; the function takes `model`, `device`, `dtype` and its options.
DETECTORS = {
    "clipseg": "objectcompose.grounding.clipseg:load_clipseg",
    "grounding-dino": "objectcompose.grounding.grounding_dino:load_grounding_dino",
    "groundingdino-py": "objectcompose.grounding.original_grounding_dino:load_original_grounding_dino",
    "owlv2": "objectcompose.grounding.owlv2:load_owlv2",
    "owlvit": "objectcompose.grounding.owlv2:load_owlvit",
    "toybox": "objectcompose.grounding.toybox_truth:load_toybox_truth",
}
SEGMENTERS = {
    "sam": "objectcompose.grounding.sam:load_sam",
    "sam2": "objectcompose.grounding.sam:load_sam2",
    "sam-hq": "objectcompose.grounding.sam:load_sam_hq",
    "segment-anything": "objectcompose.grounding.original_sam:load_original_sam",
}

#: Detectors that make masks themselves; the others need a segmenter where masks are wanted.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MASK_DETECTORS = frozenset({"clipseg", "toybox"})

ImageLike = Image.Image | str | Path


class Detector(Protocol):
    """Finds phrases. Pictures of one call have one size, and one number of phrases each."""

    name: str

    def identity(self) -> str:
        """Names the weights and the settings: equal identities give equal results."""

    def detect(self, pictures: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """What each picture (RGB) shows of its phrases."""


class Segmenter(Protocol):
    """Finds outlines. Pictures of one call have one size."""

    name: str

    def identity(self) -> str:
        """Names the weights and the settings: equal identities give equal results."""

    def masks_in_boxes(self, pictures: Sequence[Image.Image], boxes: Sequence[Sequence[Box]]) -> list[torch.Tensor]:
        """For each picture (RGB) the masks (N, H, W), {0, 1}, of what its N boxes (xyxy fractions) hold."""

    def segment(self, pictures: Sequence[Image.Image]) -> list[list[Detection]]:
        """All parts of each picture (RGB), without phrases."""


class Grounder:
    """Detector, segmenter and cache together.

    Args:
        detector: finds phrases; None where only `segment` is wanted.
        segmenter: makes the masks from the detector's boxes; None: the detector's own masks, if it makes any.
        cache: where results are kept; None: nowhere.
        batch_size: pictures that the models see at once, at least 1. Only pictures of one size share a batch, so
            padding changes nothing.
    """

    def __init__(
        self,
        detector: Detector | None = None,
        segmenter: Segmenter | None = None,
        cache: GroundingCache | None = None,
        batch_size: int = 8,
    ) -> None:
        if detector is None and segmenter is None:
            raise ObjectComposeError("`detector` and `segmenter` must not both be None.")
        if batch_size < 1:
            raise ObjectComposeError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.detector = detector
        self.segmenter = segmenter
        self.cache = cache
        self.batch_size = batch_size

    def identity(self) -> str:
        """Names detector and segmenter with their weights and settings, as they were at the first call."""
        parts = [part.identity() for part in (self.detector, self.segmenter) if part is not None]
        return "+".join(parts)

    def ground(
        self, image: ImageLike, phrases: Sequence[str], on_missing: Literal["error", "skip"] = "error"
    ) -> list[Detection]:
        """What one picture shows of the phrases; see `ground_batch`."""
        return self.ground_batch([image], [phrases], on_missing)[0]

    def ground_batch(
        self,
        images: Sequence[ImageLike],
        phrases: Sequence[Sequence[str]],
        on_missing: Literal["error", "skip"] = "error",
    ) -> list[list[Detection]]:
        """What each picture shows of its phrases.

        Args:
            images: PIL images or paths, of any sizes; transparent parts are shown on white.
            phrases: for each picture its phrases, such as ["a dog", "a cup"]; all different.
            on_missing: "error" raises when a phrase has no hit, before masks are made; "skip" leaves it out.

        Returns:
            For each picture its detections: in the order of its phrases, the surest of a phrase first.

        Raises:
            ImageInputError: a picture cannot be read or is too small; see `check_ground_picture`.
            LayoutError: a phrase is empty or twice; `images` and `phrases` differ in number; no detector is there.
            PromptTooLongError: the phrases do not fit into the detector's text encoder.
            ObjectNotFoundError: a phrase has no hit.
        """
        if on_missing not in ("error", "skip"):
            raise LayoutError(f'`on_missing` must be "error" or "skip", got {on_missing!r}.')
        if self.detector is None:
            raise LayoutError("`ground` needs a detector, and this Grounder has only a segmenter.")
        if isinstance(images, (str, Path, Image.Image)) or len(images) != len(phrases):
            raise LayoutError("`images` and `phrases` must be lists of the same length, a list of phrases per image.")
        pictures = [check_ground_picture(image, f"images[{i}]") for i, image in enumerate(images)]
        asked = [check_ground_phrases(words, f"phrases[{i}]") for i, words in enumerate(phrases)]
        keys = [self._key(picture, words) for picture, words in zip(pictures, asked, strict=True)]
        found = [self._cached(key) for key in keys]
        for index, detections in enumerate(found):
            if detections is not None and on_missing == "error":
                _require_hits(detections, asked[index], index)
        waiting = [index for index, detections in enumerate(found) if detections is None]
        for group in self._groups(waiting, pictures, asked):
            some, words = [pictures[index] for index in group], [asked[index] for index in group]
            for index, detections in zip(group, self._detected(some, words, group, on_missing), strict=True):
                found[index] = detections
                self._keep(keys[index], detections)
        return [detections if detections is not None else [] for detections in found]

    def segment(self, image: ImageLike) -> list[Detection]:
        """All parts of one picture, without text; see `segment_batch`."""
        return self.segment_batch([image])[0]

    def segment_batch(self, images: Sequence[ImageLike]) -> list[list[Detection]]:
        """All parts of each picture, without text: detections without phrase, the surest first.

        Raises:
            ImageInputError: a picture cannot be read or is too small.
            ObjectComposeError: neither model works without text.
        """
        model: Any = self.segmenter or self.detector
        if not hasattr(model, "segment"):
            raise ObjectComposeError(
                f"`segment` needs a segmenter ({', '.join(SEGMENTERS)}): {model.name!r} finds nothing without phrases."
            )
        pictures = [check_ground_picture(image, f"images[{i}]") for i, image in enumerate(images)]
        keys = [self._key(picture, None) for picture in pictures]
        found = [self._cached(key) for key in keys]
        waiting = [index for index, detections in enumerate(found) if detections is None]
        for group in self._groups(waiting, pictures, [()] * len(pictures)):
            for index, parts in zip(group, model.segment([pictures[index] for index in group]), strict=True):
                detections = sorted_detections(parts, ())
                found[index] = detections
                self._keep(keys[index], detections)
        return [detections if detections is not None else [] for detections in found]

    def _detected(
        self,
        pictures: Sequence[Image.Image],
        phrases: Sequence[Sequence[str]],
        numbers: Sequence[int],
        on_missing: str,
    ) -> list[list[Detection]]:
        assert self.detector is not None
        found = [
            sorted_detections(one, words)
            for one, words in zip(self.detector.detect(pictures, phrases), phrases, strict=True)
        ]
        if on_missing == "error":
            for detections, words, number in zip(found, phrases, numbers, strict=True):
                _require_hits(detections, words, number)
        if self.segmenter is None:
            return found
        masks = self.segmenter.masks_in_boxes(pictures, [[one.box for one in detections] for detections in found])
        return [
            [replace(one, mask=mask) for one, mask in zip(detections, rows, strict=True)]
            for detections, rows in zip(found, masks, strict=True)
        ]

    def _groups(
        self, waiting: Sequence[int], pictures: Sequence[Image.Image], phrases: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        """Numbers of pictures that may share a batch: one size, one number of phrases."""
        alike: dict[tuple, list[int]] = {}
        for index in waiting:
            alike.setdefault((pictures[index].size, len(phrases[index])), []).append(index)
        step = self.batch_size
        return [group[start : start + step] for group in alike.values() for start in range(0, len(group), step)]

    def _key(self, picture: Image.Image, phrases: Sequence[str] | None) -> str:
        return "" if self.cache is None else result_key(picture, phrases, self.identity())

    def _cached(self, key: str) -> list[Detection] | None:
        return None if self.cache is None else self.cache.load(key)

    def _keep(self, key: str, found: Sequence[Detection]) -> None:
        if self.cache is not None:
            self.cache.store(key, found)


def _require_hits(found: Sequence[Detection], phrases: Sequence[str], number: int) -> None:
    hit = {one.phrase for one in found}
    missing = [phrase for phrase in phrases if phrase not in hit]
    if missing:
        raise ObjectNotFoundError(
            f"`phrases` must all have a hit in images[{number}]; nothing was found for {missing!r}. A lower threshold "
            'may help; on_missing="skip" leaves such phrases out.'
        )


def load_grounder(
    detector: str | None = None,
    model: str | Path | None = None,
    segmenter: str | None = None,
    segmenter_model: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    cache: GroundingCache | str | Path | bool = False,
    batch_size: int = 8,
    detector_options: Mapping[str, Any] | None = None,
    segmenter_options: Mapping[str, Any] | None = None,
) -> Grounder:
    """Load models by name.

    Args:
        detector: a name of `DETECTORS`; None where only `segment` is wanted.
        model: its folder, checkpoint or Hub id; None: the one that its loader names as default.
        segmenter: a name of `SEGMENTERS`; None: the detector's own masks, if it makes any.
        segmenter_model: as `model`.
        device: None: "cuda" where there is one, else "cpu".
        dtype: of the transformers models; the original packages run in float32 only.
        cache: True: the user's cache folder (`default_cache_folder`); a path; or False.
        batch_size: pictures that the models see at once.
        detector_options, segmenter_options: what else the loaders take, such as `threshold` and `text_threshold`.

    Raises:
        ObjectComposeError: unknown name or option, or a device that cannot be used.
        CheckpointError: weights are missing, corrupt or of another model; says where they are published.
        MissingPackageError: an optional package is not installed; says how to install it.
    """
    _check_backend("detector", detector, DETECTORS, model, detector_options)
    _check_backend("segmenter", segmenter, SEGMENTERS, segmenter_model, segmenter_options)
    place = usable_device(device)
    found, outliner = (
        None if name is None else _backend_loader(table, name)(source, device=place, dtype=dtype, **(options or {}))
        for name, table, source, options in (
            (detector, DETECTORS, model, detector_options),
            (segmenter, SEGMENTERS, segmenter_model, segmenter_options),
        )
    )
    if cache is True:
        cache = GroundingCache()
    elif isinstance(cache, (str, Path)):
        cache = GroundingCache(cache)
    return Grounder(found, outliner, cache or None, batch_size)


def _check_backend(
    kind: str, name: str | None, table: Mapping[str, str], source: str | Path | None, options: Mapping[str, Any] | None
) -> None:
    if name is None:
        if source is not None or options:
            raise ObjectComposeError(f"`{kind}` must be named when its model or options are given.")
        return
    if name not in table:
        raise ObjectComposeError(f"`{kind}` must be one of {', '.join(sorted(table))}, got {name!r}.")
    known = set(_backend_loader(table, name).__kwdefaults__ or {}) - {"device", "dtype"}
    for option in options or {}:
        if option not in known:
            raise ObjectComposeError(f"`{kind}_options` of {name} may hold {sorted(known)}, got {option!r}.")


def _backend_loader(table: Mapping[str, str], name: str) -> Any:
    module, _, function = table[name].partition(":")
    return getattr(import_module(module), function)


def usable_device(device: str | torch.device | None, name: str = "device") -> torch.device:
    """The device, tried out; None: "cuda" where there is one, else "cpu".

    Args:
        device: what was asked for.
        name: the argument's name for messages.

    Raises:
        ObjectComposeError: torch cannot use it.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(wanted)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ObjectComposeError(f"`{name}` {str(wanted)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return place
