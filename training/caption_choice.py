"""Which of a picture's captions is trained on: the one that CLIP thinks fits best.

TokenCompose (arXiv 2312.03626, section 4.1) keeps, of the captions of a picture, the one with the highest image-text
logit of CLIP ViT-L/14 at 336 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from objectcompose.errors import CheckpointError, PromptTooLongError
from objectcompose.grounding.loading import NamedByContent, load_pretrained
from objectcompose.layout_fields import shown_value


DEFAULT_CLIP = "openai/clip-vit-large-patch14-336"


class ClipChooser(NamedByContent):
    """Chooses captions by a CLIP model's logits.

    Args:
        model, processor: as loaded by transformers.
    """

    name = "clip"

    def __init__(self, model: CLIPModel, processor: CLIPProcessor) -> None:
        self.model: Any = model.eval()
        self.processor: Any = processor

    def identity_settings(self) -> list[Any]:
        """See `NamedByContent`."""
        return [self.model.config, self.processor.image_processor]

    def check_captions(self, captions: Sequence[str]) -> None:
        """Raise PromptTooLongError for a caption that CLIP's text encoder cannot read whole."""
        longest = self.model.config.text_config.max_position_embeddings
        for caption in captions:
            count = len(self.processor.tokenizer(caption, verbose=False).input_ids)
            if count > longest:
                raise PromptTooLongError(
                    f"captions must have at most {longest} tokens for CLIP (start and end included), got {count}: "
                    f"{shown_value(caption)}."
                )

    @torch.no_grad()
    def choose(self, pictures: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> list[int]:
        """The number of the best caption of each picture; of equally good ones the first.

        Args:
            pictures: RGB, of any sizes.
            captions: for each picture at least one.

        Raises:
            PromptTooLongError: a caption does not fit into the text encoder.
        """
        every = [caption for of_picture in captions for caption in of_picture]
        self.check_captions(every)
        pixels = self.processor.image_processor(list(pictures), return_tensors="pt").pixel_values
        text = self.processor.tokenizer(every, padding=True, return_tensors="pt").to(self.model.device)
        pixels = pixels.to(self.model.device, self.model.dtype)
        # (pictures, all captions); each picture looks at its own columns
        logits = self.model(pixel_values=pixels, **text).logits_per_image.float()
        counts = [len(of_picture) for of_picture in captions]
        return [int(row.split(counts)[number].argmax()) for number, row in enumerate(logits)]


def load_clip_chooser(source: str | Path, device: torch.device, dtype: torch.dtype) -> ClipChooser:
    """`ClipChooser` from a folder or Hub id, safetensors only.

    Raises:
        CheckpointError: nothing there, corrupt, or no CLIP.
    """
    try:
        model, processor = load_pretrained(CLIPModel, CLIPProcessor, source, device, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"`--clip`: {error}") from error
    if len(processor.tokenizer) <= len(processor.tokenizer.all_special_tokens):
        raise CheckpointError(f"`--clip` must have a tokenizer beside its weights, got {str(source)!r} without one.")
    return ClipChooser(model, processor)
