"""`ObjectPromptAdapter`: an object's picture becomes keys that say where it may be and values that say how it looks.

VisualComposer (arXiv:2501.01424), sections 3.2 and 3.3: a narrow encoding of a picture leaves the layout free but
loses the identity, a wide one keeps the identity and copies the pose. So both are made: a linear map of CLIP's one
global vector (layout tokens) and a resampler of CLIP's patch grid (appearance tokens). In each cross-attention layer
keys come from the first and values from the second. Row t of a softmax over keys weights value t, hence both streams
have the same number of tokens.

The paper's text leaves the resampler open. It is that of IP-Adapter-Plus (arXiv:2308.06721), as diffusers ships it,
so that its public weights are a start. Objects are encoded each by itself and get no number: their order is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from objectcompose.adapters.base import AdapterMixin
from objectcompose.adapters.base_identity import identify_base
from objectcompose.adapters.ip_adapter_weights import ip_adapter_layers, read_ip_adapter
from objectcompose.adapters.layer_adapter import KeyValueProjections
from objectcompose.attention_processors.install import match_layers
from objectcompose.errors import CheckpointError, ObjectComposeError


#: Which tokens keys and values are made of: "mixed" is the paper's, the others are its ablations.
TOKEN_STREAMS = {
    "mixed": ("layout", "appearance"),
    "coarse": ("layout", "layout"),
    "fine": ("appearance", "appearance"),
    "swapped": ("appearance", "layout"),
}
#: Widths of CLIP ViT-H/14, the image encoder of IP-Adapter: its joint space and its hidden states.
VIT_H_EMBED_WIDTH, VIT_H_GRID_WIDTH = 1024, 1280

# names in the files of IP-Adapter-Plus -> names in diffusers' class
_PLUS_NAMES = (
    (r"^(layers\.\d+)\.0\.norm1\.", r"\1.ln0."),
    (r"^(layers\.\d+)\.0\.norm2\.", r"\1.ln1."),
    (r"^(layers\.\d+)\.0\.to_q\.", r"\1.attn.to_q."),
    (r"^(layers\.\d+)\.0\.to_out\.", r"\1.attn.to_out.0."),
    (r"^(layers\.\d+)\.1\.0\.", r"\1.ff.0."),
    (r"^(layers\.\d+)\.1\.1\.", r"\1.ff.1.net.0.proj."),
    (r"^(layers\.\d+)\.1\.3\.", r"\1.ff.1.net.2."),
)


class LayoutTokens(nn.Module):
    """One linear map from the global vector `(M, D)` to `(M, T, C)`, normalised: too narrow to store a pose."""

    def __init__(self, embed_width: int, token_width: int, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Linear(embed_width, num_tokens * token_width)
        self.norm = nn.LayerNorm(token_width)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(embeds).unflatten(-1, (self.num_tokens, -1)))


class ObjectPromptAdapter(AdapterMixin, ModelMixin, ConfigMixin):
    """Pictures of objects to keys and values of the cross-attention layers of one base model.

    Args:
        layer_widths: inner width of each layer that the adapter acts on, by its name.
        token_width: width of the base's text tokens and of the object tokens (C).
        embed_width: width of the image encoder's `image_embeds` (D).
        grid_width: width of its hidden states (G).
        num_tokens: tokens of one object (T), for keys and for values.
        resampler_width, resampler_depth, resampler_heads, resampler_head_width: shape of the resampler.
        streams: what feeds keys and values, one of `TOKEN_STREAMS`; a stream that feeds nothing has no weights.
        base_fingerprint: see `BaseIdentity.fingerprint`.
        base_model: id of the base.

    Raises:
        CheckpointError: no layer, a width or count below 1, or unknown `streams`.
    """

    @register_to_config
    def __init__(
        self,
        layer_widths: dict[str, int],
        token_width: int,
        embed_width: int = VIT_H_EMBED_WIDTH,
        grid_width: int = VIT_H_GRID_WIDTH,
        num_tokens: int = 16,
        resampler_width: int = 768,
        resampler_depth: int = 4,
        resampler_heads: int = 12,
        resampler_head_width: int = 64,
        streams: str = "mixed",
        base_fingerprint: str | None = None,
        base_model: str | None = None,
    ):
        super().__init__()
        sizes = {
            "token_width": token_width,
            "embed_width": embed_width,
            "grid_width": grid_width,
            "num_tokens": num_tokens,
            "resampler_width": resampler_width,
            "resampler_depth": resampler_depth,
            "resampler_heads": resampler_heads,
            "resampler_head_width": resampler_head_width,
        }
        if not layer_widths or min([*sizes.values(), *layer_widths.values()]) < 1:
            raise CheckpointError(
                f"`layer_widths` must name one layer or more, and all sizes must be at least 1, got {layer_widths} and"
                f" {sizes}."
            )
        if streams not in TOKEN_STREAMS:
            raise CheckpointError(f"`streams` must be one of {', '.join(TOKEN_STREAMS)}, got {streams!r}.")
        used = TOKEN_STREAMS[streams]
        self.layout_adapter = LayoutTokens(embed_width, token_width, num_tokens) if "layout" in used else None
        self.appearance_adapter = None
        if "appearance" in used:
            self.appearance_adapter = IPAdapterPlusImageProjection(
                embed_dims=grid_width,
                output_dims=token_width,
                hidden_dims=resampler_width,
                depth=resampler_depth,
                dim_head=resampler_head_width,
                heads=resampler_heads,
                num_queries=num_tokens,
            )
        self.projections = KeyValueProjections(layer_widths, token_width)

    @classmethod
    def from_unet(
        cls,
        unet: Any,
        base_model: str | None = None,
        image_encoder: Any = None,
        layers: Any = "",
        streams: str = "mixed",
        num_tokens: int = 16,
        resampler_width: int | None = None,
        resampler_depth: int = 4,
        resampler_heads: int | None = None,
    ) -> ObjectPromptAdapter:
        """A fresh adapter for a base; keys and values start from the base's text projections.

        Args:
            unet: the base.
            base_model: its id, kept for messages and cards.
            image_encoder: the CLIP vision model (with projection) that will embed the pictures; None: one with the
                widths of ViT-H/14.
            layers: which of its cross-attention layers: a regex or a list of names; default all.
            streams, num_tokens, resampler_depth: see the class.
            resampler_width: default: the width of the text, at most 1280 (IP-Adapter-Plus: 768 for SD 1.5, 1280 for
                SDXL).
            resampler_heads: default: one per 64 of `resampler_width`.

        Raises:
            LayerNotFoundError: `layers` chooses nothing.
            CheckpointError: a size that cannot be, or unknown `streams`.
        """
        base = identify_base(unet, base_model, match_layers(unet, layers, kind="cross"))
        width = min(base.token_width, 1280) if resampler_width is None else resampler_width
        config = None if image_encoder is None else image_encoder.config
        adapter = cls(
            base.layer_widths,
            base.token_width,
            embed_width=VIT_H_EMBED_WIDTH if config is None else config.projection_dim,
            grid_width=VIT_H_GRID_WIDTH if config is None else config.hidden_size,
            num_tokens=num_tokens,
            resampler_width=width,
            resampler_depth=resampler_depth,
            resampler_heads=max(width // 64, 1) if resampler_heads is None else resampler_heads,
            streams=streams,
            base_fingerprint=base.fingerprint,
            base_model=base_model,
        )
        adapter.projections.copy_text_projections(unet)
        return adapter

    @property
    def encoder_widths(self) -> dict[str, int]:
        """Widths of the image encoder that is read, by their names in its config."""
        config: Any = self.config
        return {"projection_dim": config.embed_width, "hidden_size": config.grid_width}

    # ---- from features to tokens, from tokens to keys and values

    @apply_forward_hook
    def object_tokens(self, embeds: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What keys and values are made of, for each picture by itself.

        Args:
            embeds: global vectors `(M, D)` (`image_embeds`).
            grid: patch features `(M, L, G)` (`hidden_states[-2]`).

        Returns:
            Key tokens and value tokens, both `(M, T, C)`; under "mixed" the layout and the appearance tokens.

        Raises:
            ObjectComposeError: widths of another image encoder.
        """
        config: Any = self.config
        if embeds.shape[-1] != config.embed_width or grid.shape[-1] != config.grid_width:
            raise ObjectComposeError(
                f"`adapter` reads an image encoder of widths {config.embed_width} (embeds) and {config.grid_width}"
                f" (hidden states), got {embeds.shape[-1]} and {grid.shape[-1]}."
            )
        tokens = {}
        if self.layout_adapter is not None:
            tokens["layout"] = self.layout_adapter(embeds)
        if self.appearance_adapter is not None:
            tokens["appearance"] = self.appearance_adapter(grid)
        for_keys, for_values = TOKEN_STREAMS[config.streams]
        return tokens[for_keys], tokens[for_values]

    def token_parameters(self) -> list[torch.Tensor]:
        """All weights behind `object_tokens`."""
        return [weight for name, weight in self.named_parameters() if not name.startswith("projections.")]

    @apply_forward_hook
    def keys_of(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keys `{layer: (B, S, width)}` of key tokens `(B, S, C)`."""
        return self.projections.keys_of(tokens)

    @apply_forward_hook
    def values_of(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values `{layer: (B, S, width)}` of value tokens `(B, S, C)`."""
        return self.projections.values_of(tokens)

    def forward(self, embeds: torch.Tensor, grid: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of N objects per row, for `Branch(..., mode="add", num_objects=N)`.

        Args:
            embeds: `(B, N, D)`.
            grid: `(B, N, L, G)`.

        Returns:
            `{layer: (key, value)}`, both `(B, N * T, width of the layer)`.
        """
        key_tokens, value_tokens = self.object_tokens(embeds.flatten(0, 1), grid.flatten(0, 1))  # (B * N, T, C)
        check_token_counts_agree(key_tokens, value_tokens)
        rows = len(embeds)
        return self.projections(
            key_tokens.reshape(rows, -1, key_tokens.shape[-1]), value_tokens.reshape(rows, -1, value_tokens.shape[-1])
        )

    # ---- warm start

    def load_ip_adapter_plus(self, path: str | Path, unet: Any) -> None:
        """Start from the weights of IP-Adapter-Plus: its resampler, and its keys and values per layer.

        The layout adapter has no counterpart there and stays as it is.

        Args:
            path: a safetensors file such as `ip-adapter-plus_sd15.safetensors`, names as published.
            unet: the base; its processors' order (down, up, middle) is how the file numbers layers.

        Raises:
            CheckpointFileError: the file is missing or damaged, or no safetensors.
            CheckpointError: it is not of IP-Adapter-Plus, or its shapes are those of another base, image encoder or
                number of tokens; nothing was changed then.
        """
        tensors = read_ip_adapter(path)
        found = {}
        for name, pair in ip_adapter_layers(tensors, unet).items():
            for maps, weight in zip(("key_maps", "value_maps"), pair, strict=True):
                found[f"projections.{maps}.{name.replace('.', '-')}.weight"] = weight
        resampler = {
            key.removeprefix("image_proj."): one for key, one in tensors.items() if key.startswith("image_proj.")
        }
        for key, weight in plus_resampler_weights(resampler).items():
            found[f"appearance_adapter.{key}"] = weight
        own = self.state_dict()
        for key, weight in own.items():
            got = tuple(found[key].shape) if key in found else "nothing"
            if not key.startswith("layout_adapter.") and got != tuple(weight.shape):
                raise CheckpointError(
                    f"{str(path)!r} must hold IP-Adapter-Plus weights for this adapter: {key} has shape"
                    f" {tuple(weight.shape)}, the file has {got}."
                )
        self.load_state_dict({**own, **{key: weight for key, weight in found.items() if key in own}})


def plus_resampler_weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The resampler of a published IP-Adapter-Plus under the names of `IPAdapterPlusImageProjection`.

    Names that are diffusers' already are kept.
    """
    renamed = {}
    for key, tensor in tensors.items():
        both = re.match(r"^(layers\.\d+)\.0\.to_kv\.weight$", key)
        if both:  # keys and values in one matrix
            renamed[f"{both[1]}.attn.to_k.weight"], renamed[f"{both[1]}.attn.to_v.weight"] = tensor.chunk(2)
            continue
        for pattern, name in _PLUS_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = tensor
    return renamed


def check_token_counts_agree(key_tokens: torch.Tensor, value_tokens: torch.Tensor) -> None:
    """Raise `ObjectComposeError` unless there is one value token for each key token, `(B, S, C)` both.

    A softmax weights value t by key t: with other counts the streams cannot be paired.
    """
    if key_tokens.shape != value_tokens.shape:
        raise ObjectComposeError(
            "key tokens and value tokens must be as many, since token t of one weights token t of the other, got"
            f" shapes {tuple(key_tokens.shape)} and {tuple(value_tokens.shape)}."
        )
