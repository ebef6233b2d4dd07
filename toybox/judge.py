"""The judge: what an independent pair of eyes finds in a picture of toybox's world.

A SegFormer names each pixel's category; a detection is one connected component of a category, with the mean
probability as its score. A ConvNeXt embeds a crop, so that the cosine of two embeddings says how much two objects are
one identity.
Evaluation only: nothing here conditions, matches, guides or trains a method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from transformers import ConvNextConfig, ConvNextModel, SegformerConfig, SegformerForSemanticSegmentation

from objectcompose.errors import ImageInputError
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.scenes import boxes_of_masks
from objectcompose.toybox.weights import active_preset, toybox_path


CROP_SIDE = 64
#: Components below this share of the picture are specks, not objects.
MIN_AREA = 0.008
#: A component counts as a detection from this mean probability on.
MIN_SCORE = 0.5


@dataclass(frozen=True)
class Detection:
    """One object that the judge sees.

    Attributes:
        category: name of the category.
        box: xyxy fractions of width and height.
        score: mean probability of the category over the component, in (0, 1].
        mask: (H, W) float, {0, 1}.
    """

    category: str
    box: tuple[float, float, float, float]
    score: float
    mask: torch.Tensor


def build_segmenter(preset: Preset) -> SegformerForSemanticSegmentation:
    """Untrained segmenter: one class per category and one for background, logits at half the resolution."""
    wide = 2 if preset.name == "gpu" else 1
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_labels=len(preset.categories) + 1,
            depths=[1, 1, 1, 1],
            hidden_sizes=[16 * wide, 32 * wide, 48 * wide, 64 * wide],
            num_attention_heads=[1, 2, 3, 4],
            mlp_ratios=[2, 2, 2, 2],
            patch_sizes=[5, 3, 3, 3],
            strides=[2, 2, 2, 2],
            sr_ratios=[8, 4, 2, 1],
            decoder_hidden_size=48 * wide,
        )
    )


def build_identity_encoder(preset: Preset) -> ConvNextModel:
    """Untrained identity encoder for crops of 64x64 pixels."""
    wide = 2 if preset.name == "gpu" else 1
    sizes = [24 * wide, 48 * wide, 72 * wide, 96 * wide]
    return ConvNextModel(ConvNextConfig(patch_size=2, depths=[1, 1, 2, 1], hidden_sizes=sizes, image_size=CROP_SIDE))


class Judge:
    """Segmenter and identity encoder together.

    Args:
        preset: the world that both were trained in.
        segmenter: names pixels.
        identity_encoder: embeds crops.
    """

    def __init__(
        self, preset: Preset, segmenter: SegformerForSemanticSegmentation, identity_encoder: ConvNextModel
    ) -> None:
        self.preset = preset
        self.segmenter = segmenter.eval()
        self.identity_encoder = identity_encoder.eval()

    @classmethod
    def load(cls, device: str | torch.device = "cpu") -> Judge:
        """The committed judge, in fp32.

        Raises:
            CheckpointError: its weights are missing.
        """
        path = toybox_path("judge")
        segmenter: Any = SegformerForSemanticSegmentation.from_pretrained(
            path / "segmenter", dtype=torch.float32, use_safetensors=True
        )
        encoder: Any = ConvNextModel.from_pretrained(path / "identity", dtype=torch.float32, use_safetensors=True)
        return cls(active_preset(), segmenter.to(device), encoder.to(device))

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Class probabilities of every pixel.

        Args:
            images: (B, 3, H, W), in [0, 1].

        Returns:
            (B, 1 + categories, H, W); class 0 is background.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ImageInputError(f"`images` must have shape (B, 3, H, W), got {tuple(images.shape)}.")
        side = self.preset.image_size
        device = next(self.segmenter.parameters()).device
        seen = F.interpolate(images.to(device).float(), (side, side), mode="bilinear", antialias=True)
        logits = self.segmenter(seen * 2 - 1).logits
        return F.interpolate(logits, images.shape[-2:], mode="bilinear").softmax(1)

    def detect(self, images: torch.Tensor) -> list[list[Detection]]:
        """All objects of each picture, best first.

        Args:
            images: (B, 3, H, W), in [0, 1].
        """
        found = []
        for probabilities in self.probabilities(images).cpu():
            labels = probabilities.argmax(0).numpy()
            detections: list[Detection] = []
            for number in np.unique(labels[labels > 0]):
                detections.extend(self._components(int(number), labels, probabilities[number]))
            found.append(sorted(detections, key=lambda detection: -detection.score))
        return found

    def _components(self, number: int, labels: np.ndarray, probability: torch.Tensor) -> list[Detection]:
        components, count = ndimage.label(labels == number)
        detections = []
        for index in range(1, count + 1):
            mask = torch.from_numpy(components == index).float()
            score = float((probability * mask).sum() / mask.sum())
            if mask.mean() >= MIN_AREA and score >= MIN_SCORE:
                x1, y1, x2, y2 = boxes_of_masks(mask).tolist()
                detections.append(Detection(self.preset.categories[number - 1], (x1, y1, x2, y2), score, mask))
        return detections

    @torch.no_grad()
    def embed(self, crops: torch.Tensor) -> torch.Tensor:
        """Unit identity embeddings (N, D) of crops (N, 3, h, w) in [0, 1]; cosine 1 means the same identity."""
        device = next(self.identity_encoder.parameters()).device
        crops = F.interpolate(crops.to(device).float(), (CROP_SIDE, CROP_SIDE), mode="bilinear", antialias=True)
        return F.normalize(self.identity_encoder(crops * 2 - 1).pooler_output, dim=-1)
