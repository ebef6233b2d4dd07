"""Grounding DINO (Liu et al., 2023, arXiv:2303.05499) through transformers, and how its tokens become phrases.

All phrases of a picture are one text, "a dog . a cup .". TokenCompose's code reads the tokens above the threshold back
as words and guesses which phrase they meant; here each phrase knows its own tokens, and a box belongs to every phrase
of which a token is above the text threshold. So "car" is not found in "carton", and no phrase is written over another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

from objectcompose.errors import LayoutError, PromptTooLongError
from objectcompose.grounding.detection import Detection, box_within_picture
from objectcompose.grounding.inputs import check_threshold, plain_phrase
from objectcompose.grounding.loading import NamedByContent, load_pretrained


DEFAULT_GROUNDING_DINO = "IDEA-Research/grounding-dino-tiny"
#: As TokenCompose's data was made.
BOX_THRESHOLD = TEXT_THRESHOLD = 0.25


class GroundingDinoDetector(NamedByContent):
    """Boxes from transformers' Grounding DINO.

    Args:
        model, processor: as loaded by transformers.
        threshold: a box counts when one of its token probabilities is above it, in [0, 1].
        text_threshold: a box belongs to a phrase when one of the phrase's tokens is above it, in [0, 1].
    """

    name = "grounding-dino"

    def __init__(
        self,
        model: GroundingDinoForObjectDetection,
        processor: GroundingDinoProcessor,
        threshold: float = BOX_THRESHOLD,
        text_threshold: float = TEXT_THRESHOLD,
    ) -> None:
        self.model: Any = model.eval()
        self.processor: Any = processor
        self.threshold = check_threshold(threshold, "threshold")
        self.text_threshold = check_threshold(text_threshold, "text_threshold")

    def identity_settings(self) -> list[Any]:
        """See `NamedByContent`."""
        return [self.model.config, self.processor.image_processor, [self.threshold, self.text_threshold]]

    @torch.no_grad()
    def detect(self, pictures: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Boxes of each picture's phrases; see `Detector`."""
        tokens = [phrase_tokens(self.processor.tokenizer, words, self.model.config.max_text_len) for words in phrases]
        texts = [text_of_phrases(words) for words in phrases]
        text = self.processor.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=True)
        inputs = {**text, **self.processor.image_processor(list(pictures), return_tensors="pt")}
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model(**inputs)
        probabilities, boxes = output.logits.float().sigmoid().cpu(), output.pred_boxes.float().cpu()
        return [
            boxes_of_phrases(*row, self.threshold, self.text_threshold)
            for row in zip(probabilities, boxes, phrases, tokens, strict=True)
        ]


def load_grounding_dino(
    source: str | Path | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threshold: float = BOX_THRESHOLD,
    text_threshold: float = TEXT_THRESHOLD,
) -> GroundingDinoDetector:
    """`GroundingDinoDetector` from a folder or Hub id; by default "IDEA-Research/grounding-dino-tiny"."""
    check_threshold(threshold, "threshold")
    check_threshold(text_threshold, "text_threshold")
    source = source or DEFAULT_GROUNDING_DINO
    model, processor = load_pretrained(GroundingDinoForObjectDetection, GroundingDinoProcessor, source, device, dtype)
    return GroundingDinoDetector(model, processor, threshold, text_threshold)


def text_of_phrases(phrases: Sequence[str]) -> str:
    """The phrases as Grounding DINO reads them: in lower case, each ended by a full stop."""
    return " . ".join(plain_phrase(phrase) for phrase in phrases) + " ."


def phrase_tokens(tokenizer: Any, phrases: Sequence[str], max_tokens: int) -> list[list[int]]:
    """The positions of each phrase's tokens in `text_of_phrases(phrases)`.

    Args:
        tokenizer: a fast BERT tokenizer.
        phrases: of one picture.
        max_tokens: what the model reads, special tokens counted.

    Raises:
        LayoutError: a phrase holds "." or "?", which end a phrase for the model, or has no token at all.
        PromptTooLongError: the phrases together have more tokens than the model reads.
    """
    for phrase in phrases:
        if "." in phrase or "?" in phrase:
            raise LayoutError(f"`phrases` must hold neither '.' nor '?' with Grounding DINO, got {phrase!r}.")
    encoded = tokenizer(text_of_phrases(phrases), return_offsets_mapping=True)
    if len(encoded.input_ids) > max_tokens:
        raise PromptTooLongError(
            f"`phrases` must have at most {max_tokens} tokens together for the detector, got {len(encoded.input_ids)}."
        )
    positions, start = [], 0
    for phrase in phrases:
        end = start + len(plain_phrase(phrase))
        offsets = enumerate(encoded["offset_mapping"])
        own = [place for place, (first, last) in offsets if first < last and start <= first and last <= end]
        if not own:
            raise LayoutError(f"`phrases` must hold words that the detector's tokenizer knows, got {phrase!r}.")
        positions.append(own)
        start = end + len(" . ")
    return positions


def boxes_of_phrases(
    probabilities: torch.Tensor,
    boxes: torch.Tensor,
    phrases: Sequence[str],
    tokens: Sequence[Sequence[int]],
    threshold: float,
    text_threshold: float,
) -> list[Detection]:
    """Which boxes belong to which phrases.

    Args:
        probabilities: (Q, T), of each box and token, in [0, 1].
        boxes: (Q, 4), (centre x, centre y, width, height) as fractions of the picture.
        phrases: N phrases.
        tokens: of each phrase its positions among the T tokens.
        threshold, text_threshold: see `GroundingDinoDetector`.

    Returns:
        Detections without masks, scored by the phrase's best token; a box may belong to several phrases.
    """
    kept = (probabilities.amax(1) > threshold).nonzero().flatten().tolist()
    found = []
    for query in kept:
        x, y, width, height = boxes[query].tolist()
        box = box_within_picture((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
        for phrase, own in zip(phrases, tokens, strict=True):
            score = float(probabilities[query, list(own)].max())
            if box is not None and score > text_threshold:
                found.append(Detection(phrase, box, None, score))
    return found
