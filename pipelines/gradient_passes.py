"""What passes with gradients need while a call samples: that they are possible, and LoRA at one scale throughout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

from objectcompose.errors import ObjectComposeError


#: Hooks of diffusers that exchange weights around a forward pass, so that a backward pass meets others.
_WEIGHT_HOOKS = {"group_offloading": "group offloading", "layerwise_casting": "layerwise casting"}


def check_gradients_allowed(unet: Any, argument: str, remedy: str) -> None:
    """Refuse what needs gradients where inference mode, of the call or of the weights, forbids them.

    Args:
        unet: the model that gradients go through.
        argument: what asks for them, for the message.
        remedy: what to do instead, likewise.

    Raises:
        ObjectComposeError: they are forbidden.
    """
    if torch.is_inference_mode_enabled():
        raise ObjectComposeError(f"`{argument}` needs gradients, which inference mode forbids; {remedy}.")
    if any(weight.is_inference() for weight in unet.parameters()):
        raise ObjectComposeError(
            f"`{argument}` needs gradients, which a `unet` that was made in inference mode forbids; {remedy}."
        )


def check_weights_stay(models: Mapping[str, Any], argument: str, remedy: str) -> None:
    """Refuse what needs gradients through models whose weights are gone, or others, after a forward pass.

    Args:
        models: by the names of their components; None is none.
        argument: what asks for gradients, for the message.
        remedy: what to do instead, likewise.

    Raises:
        ObjectComposeError: a model is offloaded by groups, or stored in another dtype than it computes in.
    """
    for component, model in models.items():
        for module in [] if model is None else model.modules():
            for hook, what in _WEIGHT_HOOKS.items():
                if has_model_hook(module, hook):
                    raise ObjectComposeError(
                        f"`{argument}` needs gradients through `{component}`, which {what} forbids, since it changes"
                        f" the weights before the backward pass; {remedy}."
                    )


def has_model_hook(module: Any, name: str) -> bool:
    """Whether a module itself has a hook of diffusers' registry."""
    return hasattr(module, "_diffusers_hook") and name in module._diffusers_hook.hooks


@contextmanager
def held_lora_scale(unet: Any, cross_attention_kwargs: dict[str, Any] | None) -> Iterator[dict[str, Any] | None]:
    """LoRA layers at the scale that a call asks for, in forward passes of the block and in their backward passes.

    The UNet takes a scale back as soon as its forward ends, and gradient checkpointing runs its blocks again later.

    Args:
        unet: the model.
        cross_attention_kwargs: of the call; `scale` is that of LoRA, which needs PEFT.

    Yields:
        What to pass to the UNet inside the block.
    """
    scale = None if cross_attention_kwargs is None else cross_attention_kwargs.get("scale")
    if scale is None or not USE_PEFT_BACKEND:
        yield cross_attention_kwargs
        return
    assert cross_attention_kwargs is not None
    scale_lora_layers(unet, scale)
    try:
        yield {name: value for name, value in cross_attention_kwargs.items() if name != "scale"}
    finally:
        unscale_lora_layers(unet, scale)
