"""Which base model weights were made for, and whether another model is that base.

Two questions, kept apart. Do the weights fit: the same layers, the same widths? And do they mean anything there: is
the model the one they were trained on, or a descendant of it? For the second one a fingerprint is kept: the signs of
weights that are read off at fixed places. Signs survive every change of dtype; fine-tuning flips few of them (weights
near zero), while two models that were trained apart agree in half, as two coins do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from objectcompose.attention_processors.install import attention_layers, match_layers
from objectcompose.errors import CheckpointError


SIGNS_PER_MATRIX = 32
#: Share of differing signs above which a model counts as another base: descendants differ in a few per cent.
MAX_SIGN_DISTANCE = 0.25


@dataclass(frozen=True)
class BaseIdentity:
    """What is known of a base model.

    Attributes:
        layer_widths: inner width of the keys and values of each cross-attention layer, by the layer's name.
        token_width: width of the text tokens that these layers read.
        fingerprint: signs of weights, as hexadecimal digits; None where they cannot be read.
        base_model: id of the model, or None.
    """

    layer_widths: dict[str, int]
    token_width: int
    fingerprint: str | None = None
    base_model: str | None = None

    @property
    def label(self) -> str:
        """How messages call it."""
        return self.base_model or "a base without a known id"


def identify_base(unet: Any, base_model: str | None = None, layers: str | list[str] = "") -> BaseIdentity:
    """Read off what identifies a UNet.

    Args:
        unet: a UNet with cross-attention; LoRA layers on it do not count.
        base_model: its id, if it is known.
        layers: which of its cross-attention layers: a regex or a list of names; default all.

    Raises:
        CheckpointError: its weights are not in memory (sequential offloading moved them away).
        LayerNotFoundError: `layers` chooses nothing.
    """
    modules = attention_layers(unet)
    maps = {name: modules[name].to_k for name in match_layers(unet, layers, kind="cross")}
    token_width = next(iter(maps.values())).in_features
    widths = {name: key_map.out_features for name, key_map in maps.items()}
    return BaseIdentity(widths, token_width, _fingerprint(maps), base_model)


def check_same_base(made_for: BaseIdentity, unet: Any, base_model: str | None, what: str) -> None:
    """Raise unless a UNet is the base that weights were made for, or descends from it.

    Args:
        made_for: the base that the weights carry; its layers may be a part of the UNet's.
        unet: the model to use them with.
        base_model: its id, for the message.
        what: the argument that holds the weights, for the message.

    Raises:
        CheckpointError: other layers, other widths, or weights that were trained apart.
    """
    found = identify_base(unet, base_model)
    message = f"`{what}` was made for {made_for.label}, not for {found.label}: "
    if made_for.token_width != found.token_width:
        raise CheckpointError(
            f"{message}there the text has width {made_for.token_width}, here it has {found.token_width}."
        )
    for name, width in made_for.layer_widths.items():
        if name not in found.layer_widths:
            raise CheckpointError(f"{message}this UNet has no cross-attention layer {name}.")
        if width != found.layer_widths[name]:
            raise CheckpointError(
                f"{message}its weights for layer {name} have width {width}, the layer has {found.layer_widths[name]}."
            )
    if made_for.fingerprint is not None:
        here = identify_base(unet, base_model, list(made_for.layer_widths)).fingerprint
        distance = 0.0 if here is None else fingerprint_distance(made_for.fingerprint, here)
        if distance > MAX_SIGN_DISTANCE:
            raise CheckpointError(
                f"{message}the shapes agree, but the signs of {distance:.0%} of the compared weights differ, which is"
                f" more than {MAX_SIGN_DISTANCE:.0%}, where a fine-tuned copy of the base differs in a few per cent."
            )


def fingerprint_distance(first: str, second: str) -> float:
    """Share of signs in which two fingerprints of the same layers differ, in [0, 1]; other lengths count as 1."""
    if len(first) != len(second):
        return 1.0
    return (int(first, 16) ^ int(second, 16)).bit_count() / (4 * len(first))


def _fingerprint(maps: dict[str, Any]) -> str | None:
    """Signs of `SIGNS_PER_MATRIX` weights of each map; None for quantized weights, which have none to read."""
    signs: list[bool] = []
    for _, key_map in sorted(maps.items()):
        weight = getattr(key_map, "base_layer", key_map).weight.detach().flatten()  # the base's own, inside LoRA
        if weight.is_meta:
            raise CheckpointError("`unet` has no weights in memory to compare: do this before offloading is enabled.")
        if not weight.is_floating_point():
            return None
        places = torch.linspace(0, weight.numel() - 1, SIGNS_PER_MATRIX, device=weight.device).long()
        signs += torch.signbit(weight[places].float()).tolist()  # float8 has no `signbit`
    return f"{int(''.join('01'[sign] for sign in signs), 2):0{len(signs) // 4}x}"
