"""Looks at a picture of an object set: which segment shows which object, how alike, where and in which pose."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessor, CLIPVisionModelWithProjection, Dinov2Model

from objectcompose.evaluation.composition_metrics import Row, overlap_of_boxes, pair_rows
from objectcompose.evaluation.detectors import picture_tensor
from objectcompose.evaluation.prompt_lists import stable_number
from objectcompose.evaluation.touching_objects import divide_touching
from objectcompose.evaluation.toybox_object_sets import ObjectSet, reference_picture
from objectcompose.evaluation.toybox_poses import estimate_pose
from objectcompose.grounding.loading import fingerprint
from objectcompose.layout_fields import check_picture
from objectcompose.pipelines.object_matching import (
    CROP_MARGIN,
    dino_side,
    dino_statistics,
    embed_crops,
    segment_pixels,
)
from objectcompose.pipelines.reference_images import (
    clip_statistics,
    encode_references,
    encoder_side,
    normalize_pixels,
    reference_pixels,
)
from objectcompose.toybox.identities import Identity, sample_identity
from objectcompose.toybox.judge import CROP_SIDE, MIN_AREA, MIN_SCORE, Detection, Judge
from objectcompose.toybox.weights import toybox_path


#: Other identities of a prompt's category that make its floor.
FLOOR_IDENTITIES = 8
#: What the judge sees around a cut-out, as in half of its training.
_GREY = torch.full((3,), 0.5)


class CompositionScorer:
    """The judge, DINO and CLIP together.

    Args:
        judge: finds segments, names them and tells identities apart.
        dino, dino_processor: compare prompts and segments, to pair them.
        image_encoder, feature_extractor: a CLIP vision model with projection.
    """

    def __init__(
        self, judge: Judge, dino: Any, dino_processor: Any, image_encoder: Any, feature_extractor: Any
    ) -> None:
        self.judge, self.dino, self.image_encoder = judge, dino.eval(), image_encoder.eval()
        self.dino_side, self.dino_statistics = dino_side(dino, dino_processor), dino_statistics(dino_processor)
        self.clip_statistics = clip_statistics(feature_extractor)
        self._bounds = lru_cache(maxsize=1024)(self._identity_bounds)
        self._identity = "+".join(
            fingerprint(model, model.config)
            for model in (judge.segmenter, judge.identity_encoder, dino, image_encoder)
        )

    @classmethod
    def of_toybox(cls, device: str | torch.device) -> CompositionScorer:
        """The committed models, in fp32.

        Raises:
            CheckpointError: weights are missing.
        """
        dino, encoder = toybox_path("dino"), toybox_path("image_encoder")
        return cls(
            Judge.load(device),
            Dinov2Model.from_pretrained(dino, dtype=torch.float32, use_safetensors=True).to(device),
            BitImageProcessorPil.from_pretrained(dino),
            CLIPVisionModelWithProjection.from_pretrained(encoder, dtype=torch.float32, use_safetensors=True).to(
                device
            ),
            CLIPImageProcessor.from_pretrained(encoder),
        )

    def identity(self) -> str:
        """Names weights and settings: equal identities give equal rows."""
        return f"judge-3:{self._identity} {MIN_AREA} {MIN_SCORE} {CROP_MARGIN} {FLOOR_IDENTITIES}"

    @torch.no_grad()
    def score(self, path: Path, one: ObjectSet) -> list[Row]:
        """One row per object of the set; see `composition_metrics`.

        Raises:
            ImageInputError: the picture cannot be read.
        """
        picture = picture_tensor([check_picture(path, str(path)).convert("RGB")])[0]
        names = [identity.category for identity in one.identities]
        segments = divide_touching(self.judge.detect(picture[None])[0], names)
        count = len(one.identities)
        crops = {}
        for name, size in self._sides():  # the judge knows the whole object, also where the method saw a part
            shown = [one.reference(self.judge.preset, number, is_whole=name == "judge") for number in range(count)]
            crops[name, size] = self._crops(picture, segments, shown, (name, size))
        cosines = {name: embedded[:count] @ embedded[count:].T for name, embedded in self._embed(crops).items()}
        is_category = [[segment.category == name for segment in segments] for name in names]
        rows = pair_rows(cosines["dino"], cosines["clip"], cosines["judge"], is_category)
        boxes = [None if row["segment"] is None else segments[row["segment"]].box for row in rows]
        for identity, row, overlap in zip(one.identities, rows, overlap_of_boxes(boxes), strict=True):
            row["overlap"] = overlap
            row["identity_floor"], row["identity_ceiling"] = self._bounds(identity)
            if row["segment"] is not None:
                row |= self._place(identity, segments[row["segment"]])
        return rows

    def _sides(self) -> set[tuple[str, int]]:
        return {("dino", self.dino_side), ("clip", encoder_side(self.image_encoder)), ("judge", CROP_SIDE)}

    def _colour(self, name: str) -> torch.Tensor:
        return _GREY if name == "judge" else self.clip_statistics[0]

    def _crops(
        self, picture: torch.Tensor, segments: list[Detection], prompts: list[Image.Image], side: tuple[str, int]
    ) -> torch.Tensor:
        """Prompts, then segments, prepared alike: (N + M, 3, S, S) in [0, 1]."""
        name, size = side
        colour = self._colour(name)
        shown = [reference_pixels(prompt, size, colour, CROP_MARGIN) for prompt in prompts]
        shown += [segment_pixels(picture, segment.mask, size, colour) for segment in segments]
        return torch.stack(shown)

    def _embed(self, crops: dict[tuple[str, int], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rows of length 1, on the CPU."""
        found = {}
        for (name, _), pixels in crops.items():
            if name == "dino":
                embedded = embed_crops(self.dino, pixels, self.dino_statistics, self.dino.device)
            elif name == "clip":
                ready = normalize_pixels(pixels, *self.clip_statistics).to(self.image_encoder.device)
                embedded = F.normalize(encode_references(self.image_encoder, ready).embeds.float(), dim=-1)
            else:
                embedded = self.judge.embed(pixels)
            found[name] = embedded.cpu()
        return found

    def _identity_bounds(self, identity: Identity) -> tuple[float, float]:
        """Judge's cosine of a rendering with other identities of its category, and with itself in other poses."""
        seed = stable_number("floor", repr(identity)) % 2**31
        rng = np.random.default_rng(seed)
        others = [sample_identity(self.judge.preset, identity.category, rng) for _ in range(FLOOR_IDENTITIES)]
        shown = [identity] * 4 + [one for one in others if one != identity]
        pictures = [reference_picture(self.judge.preset, one, seed + place) for place, one in enumerate(shown)]
        crops = torch.stack([reference_pixels(one, CROP_SIDE, _GREY, CROP_MARGIN) for one in pictures])
        embedded = self.judge.embed(crops).cpu()
        same, different = embedded[1:4] @ embedded[0], embedded[4:] @ embedded[0]
        return float(different.mean()), float(same.mean())

    def _place(self, identity: Identity, segment: Detection) -> Row:
        """Centre and size of a segment; its pose where it is of the prompt's category and its outline tells."""
        x1, y1, x2, y2 = segment.box
        row: Row = {"x": (x1 + x2) / 2, "y": (y1 + y2) / 2, "size": float(segment.mask.mean())}
        if segment.category == identity.category:
            pose = estimate_pose(self.judge.preset, identity, segment.mask)
            row |= {"rotation": pose.rotation, "flip": None if pose.flip is None else int(pose.flip)}
        return row
