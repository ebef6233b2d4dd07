"""What a grounded caption becomes before the UNet sees it: latent moments, text states, token positions, masks.

All of it follows from the sample alone, one sample at a time, so it may be kept on disk: what is read back is
bit-equal to what would be computed. Only the draw of the latent from its moments is random, and made anew each time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.regions import grids_of
from objectcompose.errors import ObjectComposeError, PhraseNotFoundError, PromptTooLongError
from objectcompose.grounding.loading import fingerprint
from objectcompose.layout_fields import shown_value
from objectcompose.pipelines.token_utils import find_phrase, find_phrases, max_prompt_length
from objectcompose.training.caption_nouns import findable_phrases
from objectcompose.training.grounded_captions import CaptionDataset, CaptionSample
from objectcompose.training.tensor_cache import cached_tensors


MaskMode = Literal["bilinear", "bilinear_aa", "maxpool"]
MASK_MODES = ("bilinear", "bilinear_aa", "maxpool")
#: Captions that are counted in one go.
_CHUNK = 1000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedCaption:
    """A sample, ready for a step.

    Attributes:
        moments: (2 * C, h, w), mean and log-variance of the latent, unscaled.
        text: (L, D), the text encoder's last hidden state.
        tokens: positions (BOS = 0) of each noun's tokens.
        masks: number of cells to (N, h', w') in {0, 1}, for the grid of every level of the UNet.
    """

    moments: torch.Tensor
    text: torch.Tensor
    tokens: tuple[tuple[int, ...], ...]
    masks: dict[int, torch.Tensor]


@dataclass(frozen=True)
class GroundingTargets:
    """What the losses on attention maps need for a batch; nouns and tokens are padded to the longest row.

    Attributes:
        token_indices: one list of positions per row, for `TokenMapProbe`.
        owners: (B, T, N), 1 where token T belongs to noun N.
        masks: number of cells to (B, N, h, w).
    """

    token_indices: list[list[int]]
    owners: torch.Tensor
    masks: dict[int, torch.Tensor]


def masks_on_grid(masks: torch.Tensor, grid: tuple[int, int], mode: MaskMode = "bilinear") -> torch.Tensor:
    """Masks on an attention grid.

    Args:
        masks: (N, H, W) in [0, 1].
        grid: (h, w).
        mode: "bilinear" is what TokenCompose trained with: no antialiasing, then above zero, which can lose a small
            object; "bilinear_aa" is that with antialiasing; "maxpool" never loses one.

    Returns:
        (N, h, w) in {0, 1}.

    Raises:
        ObjectComposeError: an unknown mode.
    """
    _check_mask_mode(mode)
    if not len(masks):
        return torch.zeros(0, *grid)
    if mode == "maxpool":
        resized = F.adaptive_max_pool2d(masks[:, None], grid)
    else:
        antialias = mode == "bilinear_aa"
        resized = F.interpolate(masks[:, None], grid, mode="bilinear", align_corners=False, antialias=antialias)
    return (resized[:, 0] > 0).float()


def _check_mask_mode(mode: str) -> None:
    if mode not in MASK_MODES:
        raise ObjectComposeError(f"`mask_mode` must be one of {', '.join(MASK_MODES)}, got {mode!r}.")


def stack_targets(samples: Sequence[EncodedCaption]) -> GroundingTargets:
    """Targets of a batch; a row without nouns owns nothing."""
    indices = [[position for noun in sample.tokens for position in noun] for sample in samples]
    nouns = max(len(sample.tokens) for sample in samples)
    owners = torch.zeros(len(samples), max(len(row) for row in indices), nouns)
    for row, sample in enumerate(samples):
        place = 0
        for number, noun in enumerate(sample.tokens):
            owners[row, place : place + len(noun), number] = 1
            place += len(noun)
    masks = {}
    for cells, first in samples[0].masks.items():
        padded = torch.zeros(len(samples), nouns, *first.shape[1:])
        for row, sample in enumerate(samples):
            padded[row, : len(sample.tokens)] = sample.masks[cells]
        masks[cells] = padded
    return GroundingTargets(indices, owners, masks)


class CaptionEncoder:
    """Encodes the samples of a data set, with what was encoded before kept on disk.

    Args:
        dataset: grounded captions.
        tokenizer: of the base.
        text_encoder: of the base, frozen.
        vae: of the base, frozen.
        levels: resolutions of the UNet, as many as it has blocks.
        mask_mode: see `masks_on_grid`.
        on_missing: what to do when a noun is not found in its caption: "error" or "skip" (the noun, not the sample); a
            caption that is too long is an error, or is cut and keeps no noun.
        cache: folder for encoded samples; None computes each anew.
        identity: of the cache's keys, beside the encoders' weights, which always count.

    Raises:
        ObjectComposeError: an unknown mode.
    """

    def __init__(
        self,
        dataset: CaptionDataset,
        tokenizer: Any,
        text_encoder: torch.nn.Module,
        vae: Any,
        levels: int,
        mask_mode: MaskMode = "bilinear",
        on_missing: Literal["error", "skip"] = "error",
        cache: Path | None = None,
        identity: str = "",
    ) -> None:
        _check_mask_mode(mask_mode)
        if on_missing not in ("error", "skip"):
            raise ObjectComposeError(f'`on_missing` must be "error" or "skip", got {on_missing!r}.')
        self.dataset, self.tokenizer, self.text_encoder, self.vae = dataset, tokenizer, text_encoder, vae
        self.levels, self.mask_mode, self.on_missing, self.cache = levels, mask_mode, on_missing, cache
        encoders = []
        if cache is not None:  # all that a sample is encoded by, in whatever folder it was
            encoders = [fingerprint(one, one.config) for one in (vae, text_encoder)]
            encoders.append(sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest())
        self._settings = json.dumps([identity, levels, mask_mode, on_missing, *encoders])

    def __getitem__(self, index: int) -> EncodedCaption:
        """An encoded sample, on the CPU."""
        if self.cache is None:
            return self.encode(self.dataset[index])
        key, required = self._settings + self.dataset.key(index), ("moments", "text", "tokens")
        tensors = cached_tensors(self.cache, key, required, lambda: _packed(self.encode(self.dataset[index])))
        tokens = json.loads(bytes(tensors["tokens"].tolist()))
        masks = {int(name): mask.float() for name, mask in tensors.items() if name not in required}
        return EncodedCaption(tensors["moments"], tensors["text"], tuple(tuple(noun) for noun in tokens), masks)

    def find_tokens(self, sample: CaptionSample) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
        """Which nouns are supervised (their numbers), and where their tokens are.

        Each noun has a place of its own where there is one, else it shares its first one: with "teddy bear" and "bear"
        in "a teddy bear", as in the authors' data, both claim "bear".

        Raises:
            PhraseNotFoundError, PromptTooLongError: a noun is not found, and `on_missing` is "error".
        """
        try:
            places = find_phrases(self.tokenizer, sample.caption, sample.phrases)
            return list(range(len(places))), tuple(tuple(place) for place in places)
        except PromptTooLongError:
            if self.on_missing == "error":
                raise
            return [], ()
        except PhraseNotFoundError:
            return self._find_shared_tokens(sample)

    def _find_shared_tokens(self, sample: CaptionSample) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
        """As `find_tokens`, where not all nouns have places of their own."""
        apart = findable_phrases(self.tokenizer, sample.caption, sample.phrases)
        places = find_phrases(self.tokenizer, sample.caption, [sample.phrases[one] for one in apart])
        found = dict(zip(apart, places, strict=True))
        for number in sorted(set(range(len(sample.phrases))) - set(apart)):
            try:
                found[number] = find_phrase(self.tokenizer, sample.caption, sample.phrases[number])
            except PhraseNotFoundError:
                if self.on_missing == "error":
                    raise
        kept = sorted(found)
        return kept, tuple(tuple(found[number]) for number in kept)

    @torch.no_grad()
    def encode(self, sample: CaptionSample) -> EncodedCaption:
        """Encode one sample, whatever the cache holds.

        Raises:
            PhraseNotFoundError, PromptTooLongError: as `find_tokens`.
        """
        kept, tokens = self.find_tokens(sample)
        device = next(self.vae.parameters()).device
        pixels = sample.pixels[None].to(device, next(self.vae.parameters()).dtype)
        moments = self.vae.encode(pixels).latent_dist.parameters[0].float().cpu()
        text = encode_caption(self.tokenizer, self.text_encoder, sample.caption)
        grids = grids_of(moments.shape[-2], moments.shape[-1], self.levels)
        masks = {
            rows * columns: masks_on_grid(sample.masks[kept], (rows, columns), self.mask_mode)
            for rows, columns in grids
        }
        return EncodedCaption(moments, text, tokens, masks)


def _packed(encoded: EncodedCaption) -> dict[str, torch.Tensor]:
    """As tensors: masks by their number of cells, one byte a cell, and tokens as the bytes of their JSON."""
    tensors = {str(cells): mask.byte() for cells, mask in encoded.masks.items()}
    tensors["tokens"] = torch.tensor(list(json.dumps(encoded.tokens).encode()), dtype=torch.uint8)
    return {**tensors, "moments": encoded.moments, "text": encoded.text}


def check_caption_lengths(
    tokenizer: Any,
    captions: Sequence[str],
    on_missing: Literal["error", "skip"] = "skip",
    is_shown: bool = True,
) -> int:
    """Count the captions that the text encoder does not read to their end, before any of them is trained on.

    Args:
        tokenizer: of the base.
        captions: all that training may draw.
        on_missing: with "skip" one warning tells their number.
        is_shown: whether this process is the one that warns.

    Returns:
        Their number.

    Raises:
        PromptTooLongError: there is one, and `on_missing` is "error".
    """
    limit, cut = max_prompt_length(tokenizer), list[str]()
    for start in range(0, len(captions), _CHUNK):
        some = list(captions[start : start + _CHUNK])
        rows = tokenizer(some, truncation=False, verbose=False).input_ids
        cut += [caption for caption, ids in zip(some, rows, strict=True) if len(ids) > limit]
    if cut:
        told = (
            f"{len(cut)} of {len(captions)} captions have more than the {limit} tokens that the text encoder reads"
            f" (start and end included), the first one is {shown_value(cut[0])}"
        )
        if on_missing == "error":
            raise PromptTooLongError(f"{told}. Shorten them or leave them out.")
        if is_shown:
            logger.warning(f"{told}. Training goes on without what lies beyond.")
    return len(cut)


@torch.no_grad()
def encode_caption(tokenizer: Any, text_encoder: torch.nn.Module, caption: str) -> torch.Tensor:
    """Last hidden state (L, D) of one prompt, float32 on the CPU; cut where `check_caption_lengths` says so."""
    ids = tokenizer(
        caption, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    device = next(text_encoder.parameters()).device
    return text_encoder(ids.to(device)).last_hidden_state[0].float().cpu()


def draw_latent(moments: torch.Tensor, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """Sample of the posterior, scaled; as diffusers' `DiagonalGaussianDistribution` draws it.

    Args:
        moments: (..., 2 * C, h, w).
        noise: standard normal, (..., C, h, w).
        scaling_factor: of the autoencoder.
    """
    mean, log_variance = moments.chunk(2, dim=-3)
    return (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise) * scaling_factor
