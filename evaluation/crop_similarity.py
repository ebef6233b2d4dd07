"""How alike two pictures of an object are: cosines of embeddings, of toybox's encoders or of CLIP and DINO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from objectcompose.adapters.folders import loading_errors
from objectcompose.errors import CheckpointError
from objectcompose.grounding.loading import fingerprint
from objectcompose.pipelines.reference_images import normalize_pixels, reference_pixels
from objectcompose.toybox.judge import CROP_SIDE, Judge
from objectcompose.toybox.weights import toybox_path


DEFAULT_CLIP, DEFAULT_DINO = "openai/clip-vit-base-patch32", "facebook/dinov2-base"
#: Free space around an object, as toybox's encoders were trained with; the colour of open places there.
MARGIN, GREY = 0.1, (0.5, 0.5, 0.5)
#: What a box is painted over with where only the rest of a picture is looked at.
PAINTED_OVER = (128, 128, 128)


@dataclass(frozen=True)
class CropEncoder:
    """Embeds pictures of single objects.

    Attributes:
        name: of the figures.
        identity: changes with its weights.
        side: of the squares that it reads, in pixels.
        colour: RGB in [0, 1] around and behind an object.
        embed: squares (M, 3, S, S) in [0, 1] to vectors (M, D).
    """

    name: str
    identity: str
    side: int
    colour: tuple[float, float, float]
    embed: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def cosines(self, crops: Sequence[Image.Image], references: Sequence[Image.Image]) -> torch.Tensor:
        """Cosine of each crop with each reference, (N, M); crops and references are prepared alike."""
        squares = [reference_pixels(one, self.side, self.colour, MARGIN) for one in (*crops, *references)]
        vectors = F.normalize(self.embed(torch.stack(squares)).float().cpu(), dim=-1)
        return vectors[: len(crops)] @ vectors[len(crops) :].T

    def inside_and_outside(
        self, picture: Image.Image, boxes: Sequence[Sequence[float]], references: Sequence[Image.Image]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a picture shows in boxes, and beside each of them.

        Args:
            picture: RGB.
            boxes: xyxy fractions, N.
            references: N, one for each box.

        Returns:
            Cosine of each box's crop with each reference, (N, N); and of each reference with the picture whose box of
            that reference is painted over, (N,).
        """
        crops = [crop_of_box(picture, box) for box in boxes]
        table = self.cosines([*crops, *(without_boxes(picture, [box]) for box in boxes)], references)
        return table[: len(boxes)], table[len(boxes) :].diagonal()


def crop_of_box(picture: Image.Image, box: Sequence[float]) -> Image.Image:
    """What a picture shows in a box (xyxy fractions); at least one pixel."""
    return picture.crop(pixels_of_box(picture.size, box))


def without_boxes(picture: Image.Image, boxes: Sequence[Sequence[float]]) -> Image.Image:
    """A copy of a picture with boxes (xyxy fractions) painted over in grey."""
    rest = picture.copy()
    for box in boxes:
        rest.paste(PAINTED_OVER, pixels_of_box(picture.size, box))
    return rest


def pixels_of_box(size: tuple[int, int], box: Sequence[float]) -> tuple[int, int, int, int]:
    """A box (xyxy fractions) in pixels of a picture of this width and height: x0, y0, x1, y1; at least one pixel."""
    x0, y0, x1, y1 = (round(edge * side) for edge, side in zip(box, size * 2, strict=True))
    x0, y0 = min(x0, size[0] - 1), min(y0, size[1] - 1)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def toybox_encoders(device: str) -> list[CropEncoder]:
    """The judge's identity encoder ("identity"), and the encoders "clip_i" and "dino", which the methods may use."""
    judge = Judge.load(device)
    identity = fingerprint(judge.identity_encoder, judge.identity_encoder.config)
    return [
        CropEncoder("identity", identity, CROP_SIDE, GREY, judge.embed),
        _clip_encoder(str(toybox_path("image_encoder")), device),
        _dino_encoder(str(toybox_path("dino")), device),
    ]


def public_encoders(clip: str, dino: str, device: str) -> list[CropEncoder]:
    """CLIP ("clip_i") and DINO ("dino"), the first version or DINOv2, from folders or Hub ids.

    Raises:
        CheckpointError: one cannot be loaded, or is of another kind.
    """
    return [_clip_encoder(clip, device), _dino_encoder(dino, device)]


def _clip_encoder(source: str, device: str) -> CropEncoder:
    model, mean, std = _load(CLIPVisionModelWithProjection, source, device)
    return CropEncoder(
        "clip_i",
        fingerprint(model, model.config),
        model.config.image_size,
        tuple(mean.tolist()),
        partial(_embed, model, mean, std, lambda output: output.image_embeds),
    )


def _dino_encoder(source: str, device: str) -> CropEncoder:
    with _loading(source, "DINO"):
        config = AutoConfig.from_pretrained(source)
    if isinstance(config, ViTConfig):  # DINO's first version, which reads pictures of one size
        model, mean, std = _load(ViTModel, source, device, add_pooling_layer=False)
        side = config.image_size
    elif isinstance(config, Dinov2Config):
        model, mean, std = _load(Dinov2Model, source, device)
        side = min(config.image_size, 16 * config.patch_size) // config.patch_size * config.patch_size
    else:
        raise CheckpointError(f"{source!r} must be of DINO or DINOv2 (vit, dinov2), got {config.model_type!r}.")
    return CropEncoder(
        "dino",
        fingerprint(model, model.config),
        side,
        tuple(mean.tolist()),
        partial(_embed, model, mean, std, lambda output: output.last_hidden_state[:, 0]),  # after the final norm
    )


def _embed(
    model: Any, mean: torch.Tensor, std: torch.Tensor, read: Callable[[Any], torch.Tensor], pixels: torch.Tensor
) -> torch.Tensor:
    return read(model(normalize_pixels(pixels, mean, std).to(model.device)))


def _load(kind: Any, source: str, device: str, **options: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Model in fp32, and mean and standard deviation of its pixels."""
    with _loading(source, kind.__name__):
        model = kind.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **options)
        processor = AutoImageProcessor.from_pretrained(source)
    return model.eval().to(device), torch.tensor(processor.image_mean), torch.tensor(processor.image_std)


@contextmanager
def _loading(source: str, what: str) -> Iterator[None]:
    with loading_errors(source, refuses_pickles=True):
        try:
            yield
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{source!r} cannot be loaded as {what}: {error}.") from error
