"""Looks at a picture of learned instances: how alike each box is to each instance, what is outside of the boxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from objectcompose.adapters.folders import loading_errors
from objectcompose.errors import CheckpointError
from objectcompose.evaluation.crop_similarity import (
    CropEncoder,
    crop_of_box,
    pixels_of_box,
    public_encoders,
    toybox_encoders,
    without_boxes,
)
from objectcompose.evaluation.detectors import picture_tensor
from objectcompose.evaluation.disentangle_cases import EditingPrompt, InstanceCase
from objectcompose.evaluation.prompt_lists import stable_number
from objectcompose.grounding.loading import fingerprint
from objectcompose.pipelines.reference_images import reference_pixels
from objectcompose.toybox.backgrounds import sample_background
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.judge import Detection, Judge
from objectcompose.toybox.scenes import render_scenes, sample_scene
from objectcompose.toybox.weights import active_preset


#: Rendered scenes whose mean stands for a caption on toybox.
CAPTION_SCENES = 16

CaptionEmbedding = Callable[[InstanceCase, EditingPrompt], torch.Tensor]


class DisentangleScorer:
    """Encoders, and on toybox the judge.

    Args:
        clip, dino: of pictures.
        caption: the vector (D,) of a prompt's caption in CLIP's space.
        judge: with its `identity` encoder, or neither.
        identity: the judge's.
    """

    def __init__(
        self,
        clip: CropEncoder,
        dino: CropEncoder,
        caption: CaptionEmbedding,
        judge: Judge | None = None,
        identity: CropEncoder | None = None,
    ) -> None:
        self.clip, self.dino, self.caption = clip, dino, caption
        self.judge, self.judge_encoder = judge, identity

    @classmethod
    def of_toybox(cls, device: str) -> DisentangleScorer:
        """The committed models. Toybox's CLIP has no half for text: rendered scenes of a caption stand for it.

        Raises:
            CheckpointError: weights are missing.
        """
        identity, clip, dino = toybox_encoders(device)
        return cls(clip, dino, partial(_rendered_caption, clip, active_preset()), Judge.load(device), identity)

    @classmethod
    def of_public(cls, clip: str, dino: str, device: str) -> DisentangleScorer:
        """CLIP with both halves and DINO, from folders or Hub ids; see `public_encoders`.

        Raises:
            CheckpointError: one cannot be loaded.
        """
        pictures, own = public_encoders(clip, dino, device)
        return cls(pictures, own, _clip_captions(clip, device))

    def identity(self) -> dict[str, str]:
        """What looks: equal values give equal rows."""
        names = {"clip": self.clip.identity, "dino": self.dino.identity}
        if self.judge is not None and self.judge_encoder is not None:
            names["judge"] = fingerprint(self.judge.segmenter, self.judge.segmenter.config)
            names["judge_identity"] = self.judge_encoder.identity
        return names

    @torch.no_grad()
    def score(self, picture: Image.Image, case: InstanceCase, prompt: EditingPrompt) -> dict[str, Any]:
        """What `picture_figures` reads, of one RGB picture."""
        crops, references = [crop_of_box(picture, box) for box in prompt.boxes], list(case.references)
        square = reference_pixels(picture, self.clip.side, self.clip.colour, 0.0)
        shown = F.normalize(self.clip.embed(square[None]).float().cpu(), dim=-1)[0]
        row: dict[str, Any] = {
            "sim_c": float(shown @ self.caption(case, prompt)),
            "dino": self.dino.cosines(crops, references).tolist(),
            "background": self.dino.cosines([without_boxes(picture, prompt.boxes)], references)[0].tolist(),
        }
        if self.judge is not None and self.judge_encoder is not None:
            row["identity"] = self.judge_encoder.cosines(crops, references).tolist()
            seen = [one for one in self.judge.detect(picture_tensor([picture]))[0] if one.category in case.words]
            row["leakage"] = share_outside(seen, prompt.boxes)
            row["placed"] = [
                any(one.category == word and _middle_is_in(one.mask, box) for one in seen)
                for word, box in zip(case.words, prompt.boxes, strict=True)
            ]
        return row


def share_outside(seen: list[Detection], boxes: Any) -> float | None:
    """Share of what is seen, by area, that lies outside of all boxes; None where nothing is seen."""
    if not seen:
        return None
    masks = torch.stack([one.mask for one in seen])
    height, width = masks.shape[1:]
    inside = torch.zeros(height, width)
    for box in boxes:
        x0, y0, x1, y1 = pixels_of_box((width, height), box)
        inside[y0:y1, x0:x1] = 1
    return 1 - float((masks * inside).sum() / masks.sum())


def _middle_is_in(mask: torch.Tensor, box: Any) -> bool:
    rows, columns = mask.nonzero(as_tuple=True)
    x, y = (float(columns.float().mean()) + 0.5) / mask.shape[1], (float(rows.float().mean()) + 0.5) / mask.shape[0]
    return bool(box[0] <= x <= box[2] and box[1] <= y <= box[3])


def _clip_captions(source: str, device: str) -> CaptionEmbedding:
    with loading_errors(source, refuses_pickles=True):
        try:
            model = CLIPTextModelWithProjection.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{source!r} cannot be loaded as a CLIP text model: {error}.") from error
    model.eval().to(device)

    @lru_cache(maxsize=256)
    def embed(caption: str) -> torch.Tensor:
        tokens = tokenizer(caption, return_tensors="pt", truncation=True).to(device)
        return F.normalize(model(**tokens).text_embeds[0].float().cpu(), dim=-1)

    return lambda case, prompt: embed(prompt.caption)


def _rendered_caption(clip: CropEncoder, preset: Preset, case: InstanceCase, prompt: EditingPrompt) -> torch.Tensor:
    place = prompt.caption.removeprefix(f"a photo of {' and '.join(case.words)}").strip()
    return _rendered_mean(clip, preset, case.words, place)


@lru_cache(maxsize=256)
def _rendered_mean(clip: CropEncoder, preset: Preset, words: tuple[str, ...], place: str) -> torch.Tensor:
    """Mean direction of scenes of these categories in a place, in identities as training has them."""
    specs = []
    for number in range(CAPTION_SCENES):
        seed = stable_number("caption scene", *words, place, number)
        spec = sample_scene(preset, seed, list(words))
        for trial in count():
            background = sample_background(np.random.default_rng((seed, trial)))
            if not place or background.words == place:
                break
        specs.append(dataclasses.replace(spec, background=background))
    pixels = F.interpolate(
        render_scenes(preset, specs).pixels, (clip.side, clip.side), mode="bilinear", antialias=True
    )
    vectors = F.normalize(clip.embed(pixels).float().cpu(), dim=-1)
    return F.normalize(vectors.mean(0), dim=-1)
