"""OWLv2 (Minderer et al., 2023, arXiv:2306.09683) and OWL-ViT (2022, arXiv:2205.06230) through transformers: boxes.

The phrases of a picture compete: a box belongs to the phrase that fits it best. So give them in one call, as the
protocols of MULTIGEN and VISOR do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Owlv2ForObjectDetection, Owlv2Processor, OwlViTForObjectDetection, OwlViTProcessor

from objectcompose.grounding.detection import Detection, box_within_picture
from objectcompose.grounding.inputs import check_threshold, check_token_counts
from objectcompose.grounding.loading import NamedByContent, load_pretrained


DEFAULT_OWLV2 = "google/owlv2-base-patch16-ensemble"
DEFAULT_OWLVIT = "google/owlvit-base-patch32"
OWLV2_THRESHOLD = 0.1


class Owlv2Detector(NamedByContent):
    """Boxes from transformers' OWLv2.

    Args:
        model, processor: as loaded by transformers.
        threshold: a box counts when its probability is above it, in [0, 1].
    """

    name = "owlv2"

    def __init__(
        self, model: Owlv2ForObjectDetection, processor: Owlv2Processor, threshold: float = OWLV2_THRESHOLD
    ) -> None:
        self.model: Any = model.eval()
        self.processor: Any = processor
        self.threshold = check_threshold(threshold, "threshold")

    def identity_settings(self) -> list[Any]:
        """See `NamedByContent`."""
        return [self.model.config, self.processor.image_processor, [self.threshold]]

    @torch.no_grad()
    def detect(self, pictures: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Boxes of each picture's phrases; see `Detector`."""
        longest = self.model.config.text_config.max_position_embeddings
        check_token_counts(self.processor.tokenizer, [phrase for words in phrases for phrase in words], longest)
        words = [phrase for one in phrases for phrase in one]  # each picture has the same number: nothing is padded
        text = self.processor.tokenizer(words, padding="max_length", max_length=longest, return_tensors="pt")
        pixels = self.processor.image_processor(list(pictures), return_tensors="pt").pixel_values
        output = self.model(
            input_ids=text.input_ids.to(self.model.device),
            attention_mask=text.attention_mask.to(self.model.device),
            pixel_values=pixels.to(self.model.device, self.model.dtype),
        )
        output.logits, output.pred_boxes = output.logits.float(), output.pred_boxes.float()
        sizes = [(picture.height, picture.width) for picture in pictures]
        results = self.processor.post_process_grounded_object_detection(
            output, threshold=self.threshold, target_sizes=sizes
        )
        return [
            list(self._detections(result, picture, one))
            for result, picture, one in zip(results, pictures, phrases, strict=True)
        ]

    def _detections(self, result: dict[str, Any], picture: Image.Image, phrases: Sequence[str]) -> list[Detection]:
        scale = torch.tensor([picture.width, picture.height] * 2)
        rows = zip(result["boxes"].cpu() / scale, result["labels"].tolist(), result["scores"].tolist(), strict=True)
        # OWLv2 pads the picture to a square, and boxes may lie in the padding
        boxed = [(box_within_picture(corners.tolist()), label, score) for corners, label, score in rows]
        return [Detection(phrases[label], box, None, score) for box, label, score in boxed if box is not None]


class OwlViTDetector(Owlv2Detector):
    """Boxes from transformers' OWL-ViT, the first generation, which squeezes pictures into a square."""

    name = "owlvit"


def load_owlv2(
    source: str | Path | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threshold: float = OWLV2_THRESHOLD,
) -> Owlv2Detector:
    """`Owlv2Detector` from a folder or Hub id; by default "google/owlv2-base-patch16-ensemble"."""
    check_threshold(threshold, "threshold")
    model, processor = load_pretrained(Owlv2ForObjectDetection, Owlv2Processor, source or DEFAULT_OWLV2, device, dtype)
    return Owlv2Detector(model, processor, threshold)


def load_owlvit(
    source: str | Path | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threshold: float = OWLV2_THRESHOLD,
) -> OwlViTDetector:
    """`OwlViTDetector` from a folder or Hub id; by default "google/owlvit-base-patch32"."""
    check_threshold(threshold, "threshold")
    source = source or DEFAULT_OWLVIT
    model, processor = load_pretrained(OwlViTForObjectDetection, OwlViTProcessor, source, device, dtype)
    return OwlViTDetector(model, processor, threshold)
