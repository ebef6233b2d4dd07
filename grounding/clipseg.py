"""CLIPSeg (Lueddecke and Ecker, 2022, arXiv:2112.10003) through transformers: masks of phrases, and boxes around them.

The default of toybox, whose own CLIPSeg lies in `examples/toybox/clipseg`. A picture is encoded once for all of its
phrases; the decoder runs once per phrase. A detection is one connected piece of a phrase's mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from objectcompose.errors import ObjectComposeError
from objectcompose.grounding.detection import Detection, box_of_mask
from objectcompose.grounding.inputs import check_threshold, check_token_counts
from objectcompose.grounding.loading import NamedByContent, load_pretrained


DEFAULT_CLIPSEG = "CIDAS/clipseg-rd64-refined"
CLIPSEG_THRESHOLD = 0.5
#: Pieces below this share of the picture are specks.
CLIPSEG_MIN_AREA = 0.005


class ClipSegDetector(NamedByContent):
    """Masks and boxes from transformers' CLIPSeg.

    Args:
        model, processor: as loaded by transformers.
        threshold: a pixel belongs to a phrase when its probability is above it, in [0, 1].
        min_area: share of the picture below which a connected piece of a mask is dropped, in [0, 1].
    """

    name = "clipseg"

    def __init__(
        self,
        model: CLIPSegForImageSegmentation,
        processor: CLIPSegProcessor,
        threshold: float = CLIPSEG_THRESHOLD,
        min_area: float = CLIPSEG_MIN_AREA,
    ) -> None:
        self.model: Any = model.eval()
        self.processor: Any = processor
        self.threshold = check_threshold(threshold, "threshold")
        self.min_area = check_threshold(min_area, "min_area")

    def identity_settings(self) -> list[Any]:
        """See `NamedByContent`."""
        return [self.model.config, self.processor.image_processor, [self.threshold, self.min_area]]

    @torch.no_grad()
    def probabilities(self, pictures: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """How likely each pixel belongs to each phrase.

        Args:
            pictures: RGB, of one size.
            phrases: for each picture its phrases; equal numbers are not needed.

        Returns:
            For each picture (P, H, W), in [0, 1], float32 on the CPU, at the picture's size.

        Raises:
            PromptTooLongError: a phrase does not fit into the text encoder.
        """
        words = [phrase for one in phrases for phrase in one]
        check_token_counts(self.processor.tokenizer, words, self.model.config.text_config.max_position_embeddings)
        pixels = self.processor.image_processor(list(pictures), return_tensors="pt").pixel_values
        text = self.processor.tokenizer(words, padding=True, return_tensors="pt").to(self.model.device)
        clip = self.model.clip
        seen = clip.vision_model(
            pixels.to(self.model.device, self.model.dtype), output_hidden_states=True, interpolate_pos_encoding=True
        ).hidden_states
        embeddings = clip.get_text_features(text.input_ids, attention_mask=text.attention_mask).pooler_output
        owners = torch.tensor([index for index, one in enumerate(phrases) for _ in one], device=self.model.device)
        logits = self.model.decoder(
            [seen[layer + 1][owners] for layer in self.model.extract_layers], embeddings
        ).logits.float()
        side = logits.shape[-1]
        # one phrase alone comes back without its batch axis
        logits = logits.reshape(len(words), 1, side, side)
        width, height = pictures[0].size
        maps = F.interpolate(logits, (height, width), mode="bilinear").sigmoid()[:, 0].cpu()
        return list(maps.split([len(one) for one in phrases]))

    def detect(self, pictures: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Masks and boxes of each picture's phrases; see `Detector`. The score is the mean probability of a piece."""
        return [
            [
                piece
                for phrase, probability in zip(words, maps, strict=True)
                for piece in self._pieces(phrase, probability)
            ]
            for words, maps in zip(phrases, self.probabilities(pictures, phrases), strict=True)
        ]

    def _pieces(self, phrase: str, probability: torch.Tensor) -> list[Detection]:
        labels, count = ndimage.label((probability > self.threshold).numpy())
        numbers = torch.from_numpy(labels)
        found = []
        for number in range(1, count + 1):
            mask = (numbers == number).float()
            box = box_of_mask(mask)
            if box is not None and float(mask.mean()) >= self.min_area:
                score = float((probability * mask).sum() / mask.sum())
                found.append(Detection(phrase, box, mask, min(score, 1.0)))
        return found


def load_clipseg(
    source: str | Path | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threshold: float = CLIPSEG_THRESHOLD,
    min_area: float = CLIPSEG_MIN_AREA,
) -> ClipSegDetector:
    """`ClipSegDetector` from a folder or Hub id; by default "CIDAS/clipseg-rd64-refined"."""
    check_threshold(threshold, "threshold")
    check_threshold(min_area, "min_area")
    model, processor = load_pretrained(
        CLIPSegForImageSegmentation, CLIPSegProcessor, source or DEFAULT_CLIPSEG, device, dtype
    )
    side = processor.image_processor.size
    if side["height"] != side["width"]:
        raise ObjectComposeError(f"`model` must read square pictures, got a processor for {dict(side)}.")
    return ClipSegDetector(model, processor, threshold, min_area)
