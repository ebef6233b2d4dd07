"""`LayerAdapter`: image tokens become keys and values of the base's cross-attention layers.

The smallest adapter, and the part that adapters with an image branch have in common: beside each layer's frozen text
keys and values stands a trained pair of linear maps K' and V', named by the layer. They run once per call, not per
step, and what they give goes into a `Branch`. IP-Adapter (arXiv:2308.06721) reads both from the same tokens;
adapters that mix two streams (keys say where, values say what) give each its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from objectcompose.adapters.base import AdapterMixin
from objectcompose.adapters.base_identity import identify_base
from objectcompose.attention_processors.install import attention_layers, match_layers
from objectcompose.errors import CheckpointError


class KeyValueProjections(nn.Module):
    """A pair of linear maps without bias for each layer, from tokens to the layer's keys and values.

    Args:
        layer_widths: inner width of each layer, by its name.
        token_width: width of the tokens.

    Shapes:
        key tokens and value tokens, both `(B, S, token_width)`, to `{layer: (key, value)}`, both `(B, S, width)`.
    """

    def __init__(self, layer_widths: Mapping[str, int], token_width: int):
        super().__init__()
        self.layer_widths = dict(layer_widths)
        # names of modules may hold no dots; and none may end in `to_k` or `to_v`, which LoRA would take for the base's
        self.key_maps = nn.ModuleDict(
            {_module_name(name): nn.Linear(token_width, width, bias=False) for name, width in layer_widths.items()}
        )
        self.value_maps = nn.ModuleDict(
            {_module_name(name): nn.Linear(token_width, width, bias=False) for name, width in layer_widths.items()}
        )

    def forward(
        self, key_tokens: torch.Tensor, value_tokens: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        keys, values = self.keys_of(key_tokens), self.values_of(value_tokens)
        return {name: (keys[name], values[name]) for name in self.layer_widths}

    def keys_of(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The keys alone, `{layer: (B, S, width)}`."""
        return {name: self.key_maps[_module_name(name)](tokens) for name in self.layer_widths}

    def values_of(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The values alone, `{layer: (B, S, width)}`."""
        return {name: self.value_maps[_module_name(name)](tokens) for name in self.layer_widths}

    @torch.no_grad()
    def copy_text_projections(self, unet: Any) -> None:
        """Start from the base's own text projections, as IP-Adapter does."""
        modules = attention_layers(unet)
        weights = {}
        for name in self.layer_widths:
            pair = (modules[name].to_k, modules[name].to_v)
            key, value = (getattr(projection, "base_layer", projection).weight for projection in pair)  # inside LoRA
            weights[name] = (key, value)
        self.load_layers(weights)

    @torch.no_grad()
    def load_layers(self, weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take over the weights of the maps to keys and to values, `(width, token_width)` each, by layer name."""
        for name in self.layer_widths:
            for maps, weight in zip((self.key_maps, self.value_maps), weights[name], strict=True):
                maps[_module_name(name)].load_state_dict({"weight": weight})


def _module_name(layer: str) -> str:
    return layer.replace(".", "-")


class LayerAdapter(AdapterMixin, ModelMixin, ConfigMixin):
    """Keys and values for the cross-attention layers of one base model.

    Args:
        layer_widths: inner width of each layer that the adapter acts on, by its name.
        token_width: width of the base's text tokens and of the image tokens.
        base_fingerprint: see `BaseIdentity.fingerprint`.
        base_model: id of the base.

    Raises:
        CheckpointError: no layer, or a width below 1.
    """

    @register_to_config
    def __init__(
        self,
        layer_widths: dict[str, int],
        token_width: int,
        base_fingerprint: str | None = None,
        base_model: str | None = None,
    ):
        super().__init__()
        if not layer_widths or min([token_width, *layer_widths.values()]) < 1:
            raise CheckpointError(
                f"`layer_widths` and `token_width` must be at least 1, for one layer or more, got {layer_widths} and"
                f" {token_width}."
            )
        self.projections = KeyValueProjections(layer_widths, token_width)

    @classmethod
    def from_unet(cls, unet: Any, base_model: str | None = None, layers: Any = "") -> LayerAdapter:
        """A fresh adapter for a base, starting from the base's text projections.

        Args:
            unet: the base.
            base_model: its id, kept for messages and cards.
            layers: which of its cross-attention layers: a regex or a list of names; default all.

        Raises:
            LayerNotFoundError: `layers` chooses nothing.
        """
        chosen = match_layers(unet, layers, kind="cross")
        base = identify_base(unet, base_model, chosen)
        adapter = cls(base.layer_widths, base.token_width, base.fingerprint, base_model)
        adapter.projections.copy_text_projections(unet)
        return adapter

    def forward(
        self, key_tokens: torch.Tensor, value_tokens: torch.Tensor | None = None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values for `Branch`.

        Args:
            key_tokens: `(B, S, token_width)`.
            value_tokens: same shape; None takes the values from `key_tokens` too.

        Returns:
            `{layer: (key, value)}`, each `(B, S, width of the layer)`.
        """
        return self.projections(key_tokens, key_tokens if value_tokens is None else value_tokens)
