"""`LocRefAdapter`: reference pictures, and the composite image that shows where they go, as keys and values.

LocRef-Diffusion (arXiv:2411.15252), section III.B: a frozen image encoder's global vector of each picture goes through
two linear layers and a norm, which become T tokens; two pairs of maps per cross-attention layer make keys and values
of them, one pair for the composite image (CI), one for the references (RI). The paper does not state the widths; with
one network for both streams, T = 16 and the encoder of IP-Adapter, the weights are 55.7 million on Stable Diffusion
1.5, where the paper has 56.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from objectcompose.adapters.base import AdapterMixin
from objectcompose.adapters.base_identity import identify_base
from objectcompose.adapters.ip_adapter_weights import ip_adapter_layers, read_ip_adapter
from objectcompose.adapters.layer_adapter import KeyValueProjections
from objectcompose.attention_processors.install import match_layers
from objectcompose.errors import CheckpointError


#: Which vector of the image encoder is read, and its width in ViT-H/14, the encoder of IP-Adapter.
REFERENCE_FEATURE_WIDTHS = {"pooled": 1280, "embeds": 1024}
COMPOSITE_KINDS = ("image", "coordinates", "none")
REFERENCE_PROJECTIONS = ("mlp", "linear")
#: Sine and cosine of four coordinates at eight frequencies.
BOX_FREQUENCIES = 8
BOX_FEATURE_WIDTH = 2 * 4 * BOX_FREQUENCIES


def box_features(boxes: torch.Tensor) -> torch.Tensor:
    """Boxes as Fourier features, as GLIGEN has them (arXiv:2301.07093).

    Args:
        boxes: `(..., 4)`, xyxy in fractions of width and height.

    Returns:
        `(..., 64)`, values in [-1, 1].
    """
    frequencies = 100.0 ** (torch.arange(BOX_FREQUENCIES, device=boxes.device) / BOX_FREQUENCIES)
    angles = boxes[..., None] * frequencies.to(boxes.dtype)  # (..., 4, 8)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class GlobalTokens(nn.Module):
    """A vector `(..., D)` to T normalised tokens `(..., T, C)`.

    Args:
        width: D.
        token_width: C.
        num_tokens: T.
        hidden_width: of the layer between two linear ones; None: one linear layer alone.
    """

    def __init__(self, width: int, token_width: int, num_tokens: int, hidden_width: int | None):
        super().__init__()
        self.num_tokens = num_tokens
        inner = width if hidden_width is None else hidden_width
        self.hidden = None if hidden_width is None else nn.Sequential(nn.Linear(width, hidden_width), nn.GELU())
        self.proj = nn.Linear(inner, num_tokens * token_width)
        self.norm = nn.LayerNorm(token_width)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        inner = vectors if self.hidden is None else self.hidden(vectors)
        return self.norm(self.proj(inner).unflatten(-1, (self.num_tokens, -1)))


class LocRefAdapter(AdapterMixin, ModelMixin, ConfigMixin):
    """Features of references and of their composite image to keys and values of one base model's layers.

    Args:
        layer_widths: inner width of each cross-attention layer that the adapter acts on, by its name.
        token_width: width of the base's text tokens and of the image tokens (C).
        image_width: width of the image encoder's vector (D).
        feature: which vector that is: "pooled" (the class token after the last norm) or "embeds" (in the joint space
            of pictures and text).
        num_tokens: tokens of one picture (T).
        hidden_width: of the projection network; unused by "linear".
        projection: "mlp" (two linear layers), or "linear" (one, as IP-Adapter has it; an ablation).
        shared_projection: one network for references and composite image; False gives each its own.
        composite: what tells where objects go, beside the regions: "image" (the composite image), "coordinates" (one
            token for each box; an ablation) or "none".
        region_mask: see `FusionSettings`; what the weights were trained with.
        gamma: share of the text that stays inside the boxes, unless a call says otherwise; 0 is what the paper has.
        ci_scale: strength of the composite image, likewise.
        ri_scale: strength of the references, likewise.
        null_references: under guidance, the unconditional half sees null pictures in the same regions, which the
            weights were trained with; False leaves that half to the base alone.
        base_fingerprint: see `BaseIdentity.fingerprint`.
        base_model: id of the base.

    Raises:
        CheckpointError: no layer, a width or count below 1, an unknown choice, a switch that is not boolean, or a
            strength that is no finite number from 0 on.
    """

    @register_to_config
    def __init__(
        self,
        layer_widths: dict[str, int],
        token_width: int,
        image_width: int = 1280,
        feature: str = "pooled",
        num_tokens: int = 16,
        hidden_width: int = 1280,
        projection: str = "mlp",
        shared_projection: bool = True,
        composite: str = "image",
        region_mask: bool = True,
        gamma: float = 0.0,
        ci_scale: float = 1.0,
        ri_scale: float = 1.0,
        null_references: bool = True,
        base_fingerprint: str | None = None,
        base_model: str | None = None,
    ):
        super().__init__()
        _check_locref_sizes(
            layer_widths,
            token_width=token_width,
            image_width=image_width,
            num_tokens=num_tokens,
            hidden_width=hidden_width,
        )
        _check_locref_choice("feature", feature, tuple(REFERENCE_FEATURE_WIDTHS))
        _check_locref_choice("projection", projection, REFERENCE_PROJECTIONS)
        _check_locref_choice("composite", composite, COMPOSITE_KINDS)
        switches = {
            "shared_projection": shared_projection,
            "region_mask": region_mask,
            "null_references": null_references,
        }
        for name, switch in switches.items():
            if not isinstance(switch, bool):
                raise CheckpointError(f"`{name}` must be True or False, got {switch!r}.")
        for name, strength in (("gamma", gamma), ("ci_scale", ci_scale), ("ri_scale", ri_scale)):
            if not math.isfinite(strength) or strength < 0:
                raise CheckpointError(f"`{name}` must be a finite number of at least 0, got {strength!r}.")
        hidden = hidden_width if projection == "mlp" else None
        self.reference_projection = GlobalTokens(image_width, token_width, num_tokens, hidden)
        self.reference_maps = KeyValueProjections(layer_widths, token_width)
        self.composite_projection = None
        if composite == "image" and not shared_projection:
            self.composite_projection = GlobalTokens(image_width, token_width, num_tokens, hidden)
        if composite == "coordinates":
            self.composite_projection = GlobalTokens(BOX_FEATURE_WIDTH, token_width, 1, hidden)
        self.composite_maps = None if composite == "none" else KeyValueProjections(layer_widths, token_width)

    @classmethod
    def from_unet(
        cls,
        unet: Any,
        base_model: str | None = None,
        image_encoder: Any = None,
        layers: Any = "",
        feature: str = "pooled",
        hidden_width: int | None = None,
        **choices: Any,
    ) -> LocRefAdapter:
        """A fresh adapter for a base; keys and values start from the base's text projections.

        Args:
            unet: the base.
            base_model: its id, kept for messages and cards.
            image_encoder: the CLIP vision model that will read the pictures; None: one with ViT-H/14's widths.
            layers: which of its cross-attention layers: a regex or a list of names; default all.
            feature: see the class.
            hidden_width: see the class; default: the width of the feature.
            choices: further arguments of the class.

        Raises:
            LayerNotFoundError: `layers` chooses nothing.
            CheckpointError: what the class raises.
        """
        base = identify_base(unet, base_model, match_layers(unet, layers, kind="cross"))
        _check_locref_choice("feature", feature, tuple(REFERENCE_FEATURE_WIDTHS))
        width = REFERENCE_FEATURE_WIDTHS[feature]
        if image_encoder is not None:
            config = image_encoder.config
            width = config.hidden_size if feature == "pooled" else config.projection_dim
        adapter = cls(
            base.layer_widths,
            base.token_width,
            image_width=width,
            feature=feature,
            hidden_width=width if hidden_width is None else hidden_width,
            base_fingerprint=base.fingerprint,
            base_model=base_model,
            **choices,
        )
        for maps in (adapter.reference_maps, adapter.composite_maps):
            if maps is not None:
                maps.copy_text_projections(unet)
        return adapter

    @classmethod
    def from_ip_adapter(cls, path: str | Path, unet: Any, base_model: str | None = None) -> LocRefAdapter:
        """An adapter that starts from published IP-Adapter or IP-Adapter-Plus weights, both pairs of maps alike.

        IP-Adapter's image projection is taken over too; that of IP-Adapter-Plus reads patches, not a vector, so the
        projection network is fresh there. IP-Adapter was trained as an addition to text and without regions: the call
        defaults become gamma 1, composite 0.3, references 0.7, and an unconditional half that is the base's alone.

        Args:
            path: a safetensors file such as `ip-adapter_sd15.safetensors`, names as published.
            unet: the base.
            base_model: its id.

        Raises:
            CheckpointFileError: the file is missing or damaged, or no safetensors.
            CheckpointError: it is of another kind, or of another base.
        """
        tensors = read_ip_adapter(path)
        weights = ip_adapter_layers(tensors, unet)
        token_width = next(iter(weights.values()))[0].shape[1]
        linear, latents = tensors.get("image_proj.proj.weight"), tensors.get("image_proj.latents")
        choices: dict[str, Any] = {"gamma": 1.0, "ci_scale": 0.3, "ri_scale": 0.7, "null_references": False}
        base = identify_base(unet, base_model)
        if linear is not None and linear.ndim == 2 and linear.shape[0] % token_width == 0:
            choices |= {"feature": "embeds", "projection": "linear"}
            width, num_tokens = linear.shape[1], linear.shape[0] // token_width
        elif latents is not None and "image_proj.proj_in.weight" in tensors:
            width, num_tokens = tensors["image_proj.proj_in.weight"].shape[1], latents.shape[1]
        else:
            raise CheckpointError(
                f"{str(path)!r} must be IP-Adapter or IP-Adapter-Plus, got another image projection:"
                f" {sorted(name for name in tensors if name.startswith('image_proj'))[:3]}."
            )
        adapter = cls(
            base.layer_widths,
            base.token_width,
            image_width=width,
            num_tokens=num_tokens,
            hidden_width=width,
            base_fingerprint=base.fingerprint,
            base_model=base_model,
            **choices,
        )
        if linear is not None:
            prefix = "image_proj."
            own = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
            adapter.reference_projection.load_state_dict(own)
        adapter.reference_maps.load_layers(weights)
        assert adapter.composite_maps is not None
        adapter.composite_maps.load_layers(weights)
        return adapter

    @property
    def encoder_widths(self) -> dict[str, int]:
        """Widths of the image encoder that is read, by their names in its config."""
        config: Any = self.config
        return {"hidden_size" if config.feature == "pooled" else "projection_dim": config.image_width}

    def forward(
        self, references: torch.Tensor, composite: torch.Tensor | None = None
    ) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Keys and values for `fusion_parts`.

        Args:
            references: vectors of N references per row, `(B, N, D)`; all-zero ones stand for a dropped or missing
                picture.
            composite: with a composite image, its vector `(B, 1, D)`; with coordinates, `box_features` `(B, N, 64)`;
                zeros for a dropped one. Not read without either.

        Returns:
            "references": `{layer: (key, value)}`, each `(B, N * T, width)`; "composite", if there is one, alike,
            `(B, T, width)` of an image or `(B, N, width)` of coordinates.

        Raises:
            CheckpointError: vectors of another width than the adapter reads, or no `composite` where it needs one.
        """
        config: Any = self.config
        _check_feature_width("references", references, config.image_width)
        tokens = self.reference_projection(references).flatten(1, 2)  # (B, N * T, C)
        keys_values = {"references": self.reference_maps(tokens, tokens)}
        if self.composite_maps is not None:
            width = BOX_FEATURE_WIDTH if config.composite == "coordinates" else config.image_width
            _check_feature_width("composite", composite, width)
            projection = self.composite_projection or self.reference_projection
            tokens = projection(composite).flatten(1, 2)
            keys_values["composite"] = self.composite_maps(tokens, tokens)
        return keys_values


def _check_locref_sizes(layer_widths: dict[str, int], **sizes: int) -> None:
    if not layer_widths or min([*sizes.values(), *layer_widths.values()]) < 1:
        raise CheckpointError(
            f"`layer_widths` must name one layer or more, and all sizes must be at least 1, got {layer_widths} and"
            f" {sizes}."
        )


def _check_locref_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise CheckpointError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


def _check_feature_width(name: str, features: torch.Tensor | None, width: int) -> None:
    if features is None or features.ndim != 3 or features.shape[-1] != width:
        got = None if features is None else tuple(features.shape)
        raise CheckpointError(f"`{name}` must have shape (rows, pictures, {width}) for this adapter, got {got}.")
