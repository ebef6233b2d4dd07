"""Which parameters of a UNet are trained, and how they are exported."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from objectcompose.errors import MissingPackageError, ObjectComposeError


TrainModules = Literal["unet", "attn2", "to_k", "lora"]
LoraLayers = Literal["cross", "attention", "all"]
#: What a name must contain: the dots keep `attn1.to_k` and `attn2.to_kv` out.
_NAME_PARTS = {"unet": "", "attn2": ".attn2.", "to_k": ".attn2.to_k."}
#: Layers that LoRA is on; "all" are those of attention, its feed-forward and projections, and the convolutions.
_LORA_TARGETS = {
    "cross": r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)",
    "attention": r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    "all": r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2|conv1|conv2|conv_shortcut)",
}
LORA_ADAPTER = "default"


def select_trainable(
    unet: Any, modules: TrainModules, lora_rank: int = 8, lora_layers: LoraLayers = "cross"
) -> dict[str, torch.nn.Parameter]:
    """Freeze a UNet but for the chosen parameters, which become float32 so that small steps are not lost.

    Args:
        unet: a diffusers UNet; changed in place.
        modules: "unet" (all), "attn2" (cross-attention), "to_k" (its key projections, as Separate-and-Enhance), or
            "lora" (new low-rank layers, through peft).
        lora_rank: of the new layers, at least 1.
        lora_layers: what they are on: cross-attention, all attention, or all layers of blocks.

    Returns:
        Name to parameter, in the model's order.

    Raises:
        ObjectComposeError: an unknown choice or rank, or a UNet that has no such parameters.
        MissingPackageError: "lora" without peft.
    """
    if modules not in get_args(TrainModules):
        raise ObjectComposeError(
            f"`train_modules` must be one of {', '.join(get_args(TrainModules))}, got {modules!r}."
        )
    unet.requires_grad_(False)
    if modules == "lora":
        if lora_rank < 1 or lora_layers not in _LORA_TARGETS:
            raise ObjectComposeError(
                f"`lora_rank` must be at least 1 and `lora_layers` one of {', '.join(_LORA_TARGETS)}, got {lora_rank}"
                f" and {lora_layers!r}."
            )
        try:
            from peft import LoraConfig  # an extra: only who trains LoRA needs it
        except ImportError as error:
            raise MissingPackageError(
                f'`train_modules` "lora" needs peft: pip install "objectcompose[train]" ({error}).'
            ) from error

        config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=_LORA_TARGETS[lora_layers])
        unet.add_adapter(config, LORA_ADAPTER)
        chosen = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    else:
        part = _NAME_PARTS[modules]
        chosen = {name: parameter for name, parameter in unet.named_parameters() if part in name}
    if not chosen:
        raise ObjectComposeError(f"`train_modules` is {modules!r}, of which this UNet has no parameters.")
    for parameter in chosen.values():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    return chosen
