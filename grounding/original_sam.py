"""SAM through its original package, `segment-anything`, on its original checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from objectcompose.errors import ObjectComposeError
from objectcompose.grounding.detection import Box, Detection
from objectcompose.grounding.loading import (
    NamedByContent,
    fill_model,
    load_checkpoint_file,
    optional_package,
    require_float32,
)
from objectcompose.grounding.sam import (
    SAM_MIN_QUALITY,
    SAM_MIN_STABILITY,
    SAM_POINTS,
    check_points,
    parts_as_detections,
)


ORIGINAL_SAM_FILES = {
    "vit_h": "sam_vit_h_4b8939.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_b": "sam_vit_b_01ec64.pth",
}


class OriginalSam(NamedByContent):
    """Masks from a model of `segment-anything`, by its `SamPredictor` and `SamAutomaticMaskGenerator`.

    Args:
        model: a `segment_anything.modeling.Sam`.
        points_per_side: the grid of `segment`, at least 1.
        min_quality: predicted IoU from which on `segment` keeps a mask.
        min_stability: how stable a kept mask must be against another cut-off, in [0, 1].
    """

    name = "segment-anything"

    def __init__(
        self,
        model: torch.nn.Module,
        points_per_side: int = SAM_POINTS,
        min_quality: float = SAM_MIN_QUALITY,
        min_stability: float = SAM_MIN_STABILITY,
    ) -> None:
        package: Any = optional_package("segment_anything", "segment-anything")
        self.model: Any = model.eval()
        self.settings = [check_points(points_per_side), min_quality, min_stability]
        self._predictor = package.SamPredictor(self.model)
        self._generator = package.SamAutomaticMaskGenerator(
            self.model,
            points_per_side=points_per_side,
            pred_iou_thresh=min_quality,
            stability_score_thresh=min_stability,
        )

    def identity_settings(self) -> list[Any]:
        """See `NamedByContent`."""
        # the picture's mean and deviation are buffers that no state dict holds
        extra = [self.model.image_encoder.img_size, self.model.pixel_mean.tolist(), self.model.pixel_std.tolist()]
        return [self.settings, extra]

    @torch.no_grad()
    def masks_in_boxes(self, pictures: Sequence[Image.Image], boxes: Sequence[Sequence[Box]]) -> list[torch.Tensor]:
        """One mask for each box; see `Segmenter`. The package takes one picture at a time, with all its boxes."""
        found = []
        for picture, rows in zip(pictures, boxes, strict=True):
            if not rows:
                found.append(torch.zeros(0, picture.height, picture.width))
                continue
            self._predictor.set_image(np.array(picture))
            scale = torch.tensor([picture.width, picture.height] * 2)
            corners = (torch.tensor(rows) * scale).to(self._predictor.device)
            corners = self._predictor.transform.apply_boxes_torch(corners, (picture.height, picture.width))
            masks, _, _ = self._predictor.predict_torch(None, None, boxes=corners, multimask_output=False)
            found.append(masks[:, 0].float().cpu())
        self._predictor.reset_image()
        return found

    def segment(self, pictures: Sequence[Image.Image]) -> list[list[Detection]]:
        """All parts of each picture; see `Segmenter`. The score is the predicted IoU."""
        found = []
        for picture in pictures:
            parts = self._generator.generate(np.array(picture))
            masks, scores = [part["segmentation"] for part in parts], [part["predicted_iou"] for part in parts]
            found.append(parts_as_detections(masks, scores))
        return found


def load_original_sam(
    source: str | Path | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    points_per_side: int = SAM_POINTS,
    min_quality: float = SAM_MIN_QUALITY,
    min_stability: float = SAM_MIN_STABILITY,
) -> OriginalSam:
    """`OriginalSam` from a checkpoint file; `variant` None: as the file's name says, else "vit_h"."""
    require_float32(dtype, "segment-anything")
    check_points(points_per_side)
    if variant is not None and variant not in ORIGINAL_SAM_FILES:
        raise ObjectComposeError(f"`variant` must be one of {sorted(ORIGINAL_SAM_FILES)}, got {variant!r}.")
    source = source or ORIGINAL_SAM_FILES[variant or "vit_h"]
    named = [name for name in ORIGINAL_SAM_FILES if name in Path(source).name]
    variant = variant or (named[0] if named else "vit_h")
    package: Any = optional_package("segment_anything", "segment-anything")
    state = load_checkpoint_file(source, ORIGINAL_SAM_FILES[variant])
    model = package.sam_model_registry[variant]()
    fill_model(model, state, source)
    return OriginalSam(model.to(device), points_per_side, min_quality, min_stability)
