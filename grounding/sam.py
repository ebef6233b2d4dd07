"""SAM (arXiv:2304.02643), SAM 2 (2408.00714) and SAM-HQ (2306.01567) through transformers: boxes to masks.

One mask per box, as TokenCompose takes them. Text-free segmentation is transformers' mask generation: masks of a grid
of points, filtered by predicted quality and stability, without duplicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    MaskGenerationPipeline,
    Sam2Model,
    Sam2Processor,
    SamHQModel,
    SamHQProcessor,
    SamModel,
    SamProcessor,
)

from objectcompose.errors import ObjectComposeError
from objectcompose.grounding.detection import Box, Detection, box_of_mask
from objectcompose.grounding.loading import NamedByContent, load_pretrained, optional_package


DEFAULT_SAM = {
    "sam": "facebook/sam-vit-huge",
    "sam2": "facebook/sam2.1-hiera-large",
    "sam-hq": "syscv-community/sam-hq-vit-huge",
}
SAM_POINTS = 32
SAM_MIN_QUALITY = 0.88
SAM_MIN_STABILITY = 0.95


class SamSegmenter(NamedByContent):
    """Masks from transformers' SAM family.

    Args:
        model, processor: `SamModel`, `Sam2Model` or `SamHQModel` and its processor.
        points_per_side: the grid of `segment`, at least 1.
        min_quality: predicted IoU from which on `segment` keeps a mask.
        min_stability: how stable a kept mask must be against another cut-off, in [0, 1].
    """

    def __init__(
        self,
        model: SamModel | Sam2Model | SamHQModel,
        processor: SamProcessor | Sam2Processor | SamHQProcessor,
        points_per_side: int = SAM_POINTS,
        min_quality: float = SAM_MIN_QUALITY,
        min_stability: float = SAM_MIN_STABILITY,
    ) -> None:
        self.model: Any = model.eval()
        self.processor: Any = processor
        self.name = {"sam2": "sam2", "sam_hq": "sam-hq"}.get(model.config.model_type, "sam")
        self.points_per_side = check_points(points_per_side)
        self.min_quality = min_quality
        self.min_stability = min_stability

    def identity_settings(self) -> list[Any]:
        """See `NamedByContent`."""
        return [
            self.model.config,
            self.processor.image_processor,
            [self.points_per_side, self.min_quality, self.min_stability],
        ]

    @torch.no_grad()
    def masks_in_boxes(self, pictures: Sequence[Image.Image], boxes: Sequence[Sequence[Box]]) -> list[torch.Tensor]:
        """One mask for each box; see `Segmenter`. Pictures are encoded together, each decodes its own boxes."""
        wanted = [index for index, rows in enumerate(boxes) if rows]
        masks = [torch.zeros(0, picture.height, picture.width) for picture in pictures]
        if not wanted:
            return masks
        inputs = [self._prompted(pictures[index], boxes[index]) for index in wanted]
        pixels = torch.cat([one["pixel_values"] for one in inputs]).to(self.model.device, self.model.dtype)
        embeddings = self.model.get_image_embeddings(pixels)
        for row, index in enumerate(wanted):
            masks[index] = self._decoded(inputs[row], _row_of_embeddings(embeddings, row))
        return masks

    def segment(self, pictures: Sequence[Image.Image]) -> list[list[Detection]]:
        """All parts of each picture; see `Segmenter`. The score is the predicted IoU."""
        optional_package("torchvision", "torchvision")  # transformers drops duplicate masks with it
        generate = _PartsPipeline(
            model=self.model, image_processor=self.processor.image_processor, device=self.model.device
        )
        found = []
        for picture in pictures:
            parts = generate(
                picture,
                points_per_crop=self.points_per_side,
                pred_iou_thresh=self.min_quality,
                stability_score_thresh=self.min_stability,
            )
            found.append(parts_as_detections(parts["masks"], parts["scores"]))
        return found

    def _prompted(self, picture: Image.Image, boxes: Sequence[Box]) -> dict[str, torch.Tensor]:
        width, height = picture.size
        pixels = [[x0 * width, y0 * height, x1 * width, y1 * height] for x0, y0, x1, y1 in boxes]
        return self.processor(images=picture, input_boxes=[pixels], return_tensors="pt")

    def _decoded(self, inputs: dict[str, torch.Tensor], embeddings: Any) -> torch.Tensor:
        # SAM-HQ also hands on what its encoder saw on the way
        names = ("image_embeddings", "intermediate_embeddings")
        known = dict(zip(names, embeddings if isinstance(embeddings, tuple) else (embeddings,), strict=False))
        output = self.model(
            input_boxes=inputs["input_boxes"].to(self.model.device, self.model.dtype), multimask_output=False, **known
        )
        sizes = [inputs["original_sizes"]]
        if "reshaped_input_sizes" in inputs:  # SAM 2 stretches the picture to a square, the others pad it
            sizes.append(inputs["reshaped_input_sizes"])
        masks = self.processor.post_process_masks(output.pred_masks.float().cpu(), *sizes)[0]
        return masks[:, 0].float()


class _PartsPipeline(MaskGenerationPipeline):
    """transformers' mask generation, also for half precision: its last step wants scores and boxes in one dtype."""

    def postprocess(self, model_outputs: Any, **options: Any) -> Any:
        """Drop duplicates and hand out the masks."""
        for part in model_outputs:
            part["iou_scores"] = part["iou_scores"].float()
        return super().postprocess(model_outputs, **options)


def parts_as_detections(masks: Sequence[Any], scores: Sequence[Any]) -> list[Detection]:
    """Masks (H, W) and predicted IoUs, which regression may put outside [0, 1], as detections without phrase."""
    found = []
    for mask, score in zip(masks, scores, strict=True):
        tensor = torch.as_tensor(np.asarray(mask)).float()
        box = box_of_mask(tensor)
        if box is not None:
            found.append(Detection(None, box, tensor, min(max(float(score), 0.0), 1.0)))
    return found


def check_points(value: Any) -> int:
    """`points_per_side` as an int, at least 1; raises ObjectComposeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ObjectComposeError(f"`points_per_side` must be a whole number from 1 on, got {value!r}.")
    return value


def _row_of_embeddings(embeddings: Any, row: int) -> Any:
    if isinstance(embeddings, torch.Tensor):
        return embeddings[row : row + 1]
    return type(embeddings)(_row_of_embeddings(part, row) for part in embeddings)


def _load_sam_family(
    name: str, model_class: Any, processor_class: Any, source: str | Path | None, place: tuple, options: dict[str, Any]
) -> SamSegmenter:
    check_points(options["points_per_side"])
    model, processor = load_pretrained(model_class, processor_class, source or DEFAULT_SAM[name], *place)
    return SamSegmenter(model, processor, **options)


def load_sam(
    source: str | Path | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    points_per_side: int = SAM_POINTS,
    min_quality: float = SAM_MIN_QUALITY,
    min_stability: float = SAM_MIN_STABILITY,
) -> SamSegmenter:
    """`SamSegmenter` with SAM from a folder or Hub id; by default "facebook/sam-vit-huge"."""
    options = {"points_per_side": points_per_side, "min_quality": min_quality, "min_stability": min_stability}
    return _load_sam_family("sam", SamModel, SamProcessor, source, (device, dtype), options)


def load_sam2(
    source: str | Path | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    points_per_side: int = SAM_POINTS,
    min_quality: float = SAM_MIN_QUALITY,
    min_stability: float = SAM_MIN_STABILITY,
) -> SamSegmenter:
    """`SamSegmenter` with SAM 2 from a folder or Hub id; by default "facebook/sam2.1-hiera-large"."""
    optional_package("torchvision", "torchvision")  # its pictures are prepared by nothing else
    options = {"points_per_side": points_per_side, "min_quality": min_quality, "min_stability": min_stability}
    return _load_sam_family("sam2", Sam2Model, Sam2Processor, source, (device, dtype), options)


def load_sam_hq(
    source: str | Path | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    points_per_side: int = SAM_POINTS,
    min_quality: float = SAM_MIN_QUALITY,
    min_stability: float = SAM_MIN_STABILITY,
) -> SamSegmenter:
    """`SamSegmenter` with SAM-HQ from a folder or Hub id; by default "syscv-community/sam-hq-vit-huge"."""
    options = {"points_per_side": points_per_side, "min_quality": min_quality, "min_stability": min_stability}
    return _load_sam_family("sam-hq", SamHQModel, SamHQProcessor, source, (device, dtype), options)
