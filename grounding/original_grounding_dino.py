"""Grounding DINO through its original package, `groundingdino-py`, on its original checkpoints.

The package was written for transformers 4: its BERT wrapper calls methods that transformers 5 no longer has. While a
model is built, `PhraseTextEncoder` stands in for that wrapper, with the same parameter names, so checkpoints fit and
the package's own `predict` and `annotate` work on the result. BERT's weights are part of the checkpoint, so only its
config and vocabulary are read from elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, BertModel

from objectcompose.errors import CheckpointError, ImageInputError, ObjectComposeError
from objectcompose.grounding.detection import Detection
from objectcompose.grounding.grounding_dino import (
    BOX_THRESHOLD,
    TEXT_THRESHOLD,
    boxes_of_phrases,
    phrase_tokens,
    text_of_phrases,
)
from objectcompose.grounding.inputs import check_threshold
from objectcompose.grounding.loading import (
    PUBLISHED_CHECKPOINTS,
    NamedByContent,
    fill_model,
    first_line,
    load_checkpoint_file,
    optional_package,
    require_float32,
)


PHRASE_ENCODER = "google-bert/bert-base-uncased"
ORIGINAL_DINO_FILES = {"swint": "groundingdino_swint_ogc.pth", "swinb": "groundingdino_swinb_cogcoor.pth"}
_DINO_CONFIGS = {"swint": "GroundingDINO_SwinT_OGC.py", "swinb": "GroundingDINO_SwinB_cfg.py"}
_DINO_STRIDES = (8, 16, 32, 64)
MIN_SHORT_SIDE = 224
#: In the official checkpoints, and used by none of the package's models.
_UNUSED_DINO_KEYS = {"label_enc.weight", "bert.embeddings.position_ids"}


class PhraseTextEncoder(nn.Module):
    """BERT whose tokens attend within their phrase only: what Grounding DINO asks of its text encoder.

    Args:
        bert_model: its embeddings, encoder and pooler become this module's, under the same names.
    """

    def __init__(self, bert_model: BertModel) -> None:
        super().__init__()
        self.config = bert_model.config
        self.embeddings, self.encoder, self.pooler = bert_model.embeddings, bert_model.encoder, bert_model.pooler

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Hidden states (B, L, C) of tokens (B, L); `attention_mask` is (B, L), or (B, L, L) for phrases apart."""
        hidden_states = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        bias = None
        if attention_mask is not None:
            visible = attention_mask.bool()
            visible = visible[:, None, None, :] if visible.ndim == 2 else visible[:, None]
            bias = torch.zeros(visible.shape, dtype=hidden_states.dtype, device=hidden_states.device)
            bias = bias.masked_fill(~visible, torch.finfo(hidden_states.dtype).min)
        return {"last_hidden_state": self.encoder(hidden_states, attention_mask=bias).last_hidden_state}


class OriginalGroundingDino(NamedByContent):
    """Boxes from a model of `groundingdino-py`.

    Args:
        model: as built by `build_original_grounding_dino` (or the package, with a working text encoder).
        threshold: a box counts when one of its token probabilities is above it, in [0, 1].
        text_threshold: a box belongs to a phrase when one of the phrase's tokens is above it, in [0, 1].
        short_side: pictures are brought to this many pixels on their shorter side, at most 5/3 of it on the longer;
            at least 224.
    """

    name = "groundingdino-py"

    def __init__(
        self,
        model: nn.Module,
        threshold: float = BOX_THRESHOLD,
        text_threshold: float = TEXT_THRESHOLD,
        short_side: int = 800,
    ) -> None:
        self.model: Any = model.eval()
        self.threshold = check_threshold(threshold, "threshold")
        self.text_threshold = check_threshold(text_threshold, "text_threshold")
        self.short_side = _checked_short_side(short_side)
        transforms: Any = optional_package("groundingdino.datasets.transforms", "groundingdino-py")
        self._transform = transforms.Compose(
            [
                transforms.RandomResize([self.short_side], max_size=self.short_side * 1333 // 800),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def identity_settings(self) -> list[Any]:
        """See `NamedByContent`."""
        return [[self.threshold, self.text_threshold, self.short_side]]

    @torch.no_grad()
    def detect(self, pictures: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Boxes of each picture's phrases; see `Detector`."""
        tokens = [phrase_tokens(self.model.tokenizer, words, self.model.max_text_len) for words in phrases]
        pixels = torch.stack([self._transform(picture, None)[0] for picture in pictures])
        cells = sum(ceil(pixels.shape[-2] / stride) * ceil(pixels.shape[-1] / stride) for stride in _DINO_STRIDES)
        if cells < self.model.num_queries:
            raise ImageInputError(
                f"`images` must be less elongated for {self.model.num_queries} queries, got {pictures[0].size}."
            )
        device = next(self.model.parameters()).device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the package's own, about autocast
            output = self.model(pixels.to(device), captions=[text_of_phrases(words) for words in phrases])
        probabilities, boxes = output["pred_logits"].sigmoid().cpu(), output["pred_boxes"].cpu()
        return [
            boxes_of_phrases(*row, self.threshold, self.text_threshold)
            for row in zip(probabilities, boxes, phrases, tokens, strict=True)
        ]


def build_original_grounding_dino(variant: str = "swint", text_encoder: str | Path = PHRASE_ENCODER) -> nn.Module:
    """The package's model with random weights, in eval mode.

    Args:
        variant: "swint" or "swinb".
        text_encoder: folder or Hub id with BERT's config and tokenizer (hidden size 768); its weights are not read.

    Raises:
        MissingPackageError: `groundingdino-py` is not installed.
        CheckpointError: the text encoder's config or tokenizer is not there.
    """
    if variant not in _DINO_CONFIGS:
        raise ObjectComposeError(f"`variant` must be one of {sorted(_DINO_CONFIGS)}, got {variant!r}.")
    package: Any = optional_package("groundingdino", "groundingdino-py")
    module: Any = optional_package("groundingdino.models.GroundingDINO.groundingdino", "groundingdino-py")
    models: Any = optional_package("groundingdino.models", "groundingdino-py")
    configs: Any = optional_package("groundingdino.util.slconfig", "groundingdino-py")
    settings = configs.SLConfig.fromfile(str(Path(package.__file__).parent / "config" / _DINO_CONFIGS[variant]))
    settings.device = "cpu"
    settings.text_encoder_type = str(text_encoder)
    # gradient checkpointing is for training, and its reentrant kind is on its way out of torch
    settings.use_checkpoint = settings.use_transformer_ckpt = False
    try:
        with _repaired_package(module), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's own: moved timm modules, meshgrid's indexing
            return models.build_model(settings).eval()
    except OSError as error:
        known = PUBLISHED_CHECKPOINTS[PHRASE_ENCODER]
        raise CheckpointError(
            f"`text_encoder` must be a folder or Hub id with BERT's config and tokenizer, got {str(text_encoder)!r}: "
            f"{first_line(error)}. They are published at {known.url} (config and vocabulary: below 1 MB)."
        ) from error


@contextlib.contextmanager
def _repaired_package(module: Any) -> Iterator[None]:
    """Stand-ins for what transformers 5 broke, and for reading BERT's weights, while a model is built."""
    names = module.get_tokenlizer
    wrapper, language_model = module.BertModelWarper, names.get_pretrained_language_model
    module.BertModelWarper = PhraseTextEncoder
    names.get_pretrained_language_model = lambda source: BertModel(AutoConfig.from_pretrained(source))
    try:
        yield
    finally:
        module.BertModelWarper, names.get_pretrained_language_model = wrapper, language_model


def load_original_grounding_dino(
    source: str | Path | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threshold: float = BOX_THRESHOLD,
    text_threshold: float = TEXT_THRESHOLD,
    variant: str | None = None,
    text_encoder: str | Path = PHRASE_ENCODER,
    short_side: int = 800,
) -> OriginalGroundingDino:
    """`OriginalGroundingDino` from a checkpoint file; `variant` None: as the file's name says, else "swint"."""
    require_float32(dtype, "groundingdino-py")
    check_threshold(threshold, "threshold")
    check_threshold(text_threshold, "text_threshold")
    _checked_short_side(short_side)
    source = source or ORIGINAL_DINO_FILES[variant or "swint"]
    variant = variant or ("swinb" if "swinb" in Path(source).name else "swint")
    optional_package("groundingdino", "groundingdino-py")
    state = load_checkpoint_file(source, ORIGINAL_DINO_FILES.get(variant, ""))
    model = build_original_grounding_dino(variant, text_encoder)
    fill_model(model, {key: value for key, value in state.items() if key not in _UNUSED_DINO_KEYS}, source)
    return OriginalGroundingDino(model.to(device), threshold, text_threshold, short_side)


def _checked_short_side(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < MIN_SHORT_SIDE:
        raise ObjectComposeError(f"`short_side` must be a whole number from {MIN_SHORT_SIDE} on, got {value!r}.")
    return value
