"""The object pictures of a call as attention: tokens, keys and values, and the branch that adds them to the text's.

VisualComposer (arXiv:2501.01424), section 3.3: in every cross-attention layer one softmax over the tokens of all
objects is added to the text's attention,

    Z = softmax(Q K_text') V_text + scale * softmax(Q K' + M) V,

keys K of the layout tokens, values V of the appearance tokens. Objects compete for each cell, which is what makes a
layout. In the unconditional half every slot holds the null object, whose copies together act as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from objectcompose.adapters.object_prompt_adapter import check_token_counts_agree
from objectcompose.attention_processors.branch import Branch, KeysValues, cached_projection
from objectcompose.attention_processors.guided_keys_values import GuidedKeysValues
from objectcompose.pipelines.object_regions import SlotMasks, SlotRegions
from objectcompose.pipelines.reference_images import (
    clip_statistics,
    encode_references,
    encoder_side,
    normalize_pixels,
    null_features,
    reference_pixels,
)


#: Free space around an object in what the image encoder sees, as a share of its longer side.
PROMPT_MARGIN = 0.1

#: Key tokens and value tokens of P pictures, `(P, T, C)` each.
PictureTokens = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """Tokens of M pictures with up to N slots of T tokens each.

    Attributes:
        keys: `(M, N * T, C)`, 0 in slots that are empty.
        values: same shape.
        null_keys: `(1, T, C)`, of the null object.
        null_values: same shape.
        present: bool `(M, N)`: which slots hold an object.
        scales: float32 `(M, N)`: strength of each.
    """

    keys: torch.Tensor
    values: torch.Tensor
    null_keys: torch.Tensor
    null_values: torch.Tensor
    present: torch.Tensor
    scales: torch.Tensor

    @property
    def num_slots(self) -> int:
        return self.present.shape[1]


def prompt_tokens(
    adapter: Any,
    image_encoder: Any,
    feature_extractor: Any,
    images: Sequence[Any],
    backgrounds: Sequence[Any],
    device: torch.device | str,
    caches: dict[str, dict[str, Any]],
) -> tuple[PictureTokens, PictureTokens]:
    """Tokens of all pictures of a call, from one pass of the encoder, and those of the null picture.

    Tokens are kept, and not the features of the pictures, which are many times as large.

    Args:
        adapter, image_encoder, feature_extractor: as in the pipeline.
        images: PIL images of objects: cut out, framed with a margin.
        backgrounds: PIL images of scenes, which follow the objects: squashed whole.
        device: where the encoder runs.
        caches: kept by the pipeline, so that the same pictures are not encoded again; never stale.

    Returns:
        Key tokens and value tokens of P pictures, `(P, T, C)` each; and the same of the null picture, P = 1.
    """
    mean, std = clip_statistics(feature_extractor)
    side = encoder_side(image_encoder)
    pixels = [reference_pixels(image, side, mean, PROMPT_MARGIN) for image in images]
    pixels += [reference_pixels(image, side, mean, shape="stretch") for image in backgrounds]
    ready = normalize_pixels(torch.stack(pixels), mean, std).to(device)
    weights = list(image_encoder.parameters())

    def encode_null(_: torch.Tensor) -> Any:
        return null_features(image_encoder, device)

    def encode(batch: torch.Tensor) -> Any:
        features = encode_references(image_encoder, batch)
        null: Any = cached_projection(caches.setdefault("null", {}), ready.new_zeros(1), encode_null, weights)
        # the encoder is done before the adapter starts: offloading has one of them on the device
        embeds, grid = torch.cat([features.embeds, null.embeds]), torch.cat([features.grid, null.grid])
        return adapter.object_tokens(embeds.to(adapter.dtype), grid.to(adapter.dtype))

    found: Any = cached_projection(
        caches.setdefault("tokens", {}), ready, encode, [*weights, *adapter.token_parameters()]
    )
    key_tokens, value_tokens = found
    return (key_tokens[:-1], value_tokens[:-1]), (key_tokens[-1:], value_tokens[-1:])


def pack_tokens(
    key_tokens: torch.Tensor,
    value_tokens: torch.Tensor,
    null: PictureTokens,
    slots: Sequence[Sequence[tuple[int, float]]],
) -> PromptTokens:
    """Tokens of single pictures to slots.

    Args:
        key_tokens, value_tokens: `(P, T, C)`, of P pictures.
        null: the same of the null object, `(1, T, C)` each.
        slots: per generated picture and slot, which of the P pictures it holds and how strongly.

    Raises:
        ObjectComposeError: keys and values are not as many. No call of the pipeline comes to that: its adapter makes
            both streams of one `num_tokens`, and refuses weights of other sizes when it is loaded.
    """
    check_token_counts_agree(key_tokens, value_tokens)
    shape = (len(slots), max(map(len, slots)), *key_tokens.shape[1:])  # (M, N, T, C)
    keys, values = key_tokens.new_zeros(shape), value_tokens.new_zeros(shape)
    present, scales = torch.zeros(shape[:2], dtype=torch.bool), torch.ones(shape[:2])
    for picture, row in enumerate(slots):
        count, places = len(row), [place for place, _ in row]
        keys[picture, :count], values[picture, :count] = key_tokens[places], value_tokens[places]
        present[picture, :count], scales[picture, :count] = True, torch.tensor([scale for _, scale in row])
    device = key_tokens.device
    return PromptTokens(keys.flatten(1, 2), values.flatten(1, 2), *null, present.to(device), scales.to(device))


class ObjectPromptBranch:
    """The adding branch of a call, and what changes in it while the call runs.

    Args:
        adapter: projects tokens to keys and values of each layer.
        tokens: of the M pictures, one slot of which is taken at least.
        caches: kept by the pipeline, so that the same tokens are not projected again; never stale.

    Attributes:
        tokens: as given.
        part: the attention part; with rows for `[uncond, cond]`, it serves the conditional half alone, too.
    """

    def __init__(self, adapter: Any, tokens: PromptTokens, caches: dict[str, dict[str, Any]]):
        self.adapter, self.tokens = adapter, tokens
        nulls = self._project(caches, "null_", tokens.null_keys, tokens.null_values)
        shown = self._project(caches, "", tokens.keys, tokens.values)
        strengths = tokens.scales[tokens.present]
        first = float(strengths[0])
        is_uniform = bool((strengths == first).all())
        self.part = Branch(
            GuidedKeysValues(nulls, shown),
            scale=first if is_uniform else tokens.scales.repeat(2, 1),
            num_objects=tokens.num_slots,
            present=None if bool(tokens.present.all()) else tokens.present.repeat(2, 1),
            overlap="joint",
        )

    def _project(
        self, caches: dict[str, dict[str, Any]], name: str, key_tokens: torch.Tensor, value_tokens: torch.Tensor
    ) -> KeysValues:
        """Keys and values of each layer, two caches, so that new values leave the keys as they are."""
        adapter, maps = self.adapter, self.adapter.projections
        keys: Any = cached_projection(
            caches.setdefault(f"{name}keys", {}), key_tokens, adapter.keys_of, maps.key_maps.parameters()
        )
        values: Any = cached_projection(
            caches.setdefault(f"{name}values", {}), value_tokens, adapter.values_of, maps.value_maps.parameters()
        )
        return {layer: (key, values[layer]) for layer, key in keys.items()}

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """The conditional half's values of each layer, `(M, N * T, width)`."""
        kept: Any = self.part.keys_values
        return {name: value for name, (_, value) in kept.shown.items()}

    @values.setter
    def values(self, values: dict[str, torch.Tensor]) -> None:
        """Attend to other values from now on; keys and the unconditional half stay."""
        kept: Any = self.part.keys_values
        shown = {name: (key, values[name]) for name, (key, _) in kept.shown.items()}
        self.part.keys_values = GuidedKeysValues(kept.nulls, shown)

    def confine(self, masks: SlotMasks, canvas: tuple[int, int], is_free: Sequence[Sequence[bool]]) -> None:
        """Let each slot act only where its mask is, in both halves; see `SlotRegions`."""
        self.part.regions = SlotRegions(masks, canvas, is_free, halves=2)
