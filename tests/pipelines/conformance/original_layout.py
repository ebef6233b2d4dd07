"""Tiny components under the parameter names of the original Stable Diffusion checkpoints, for `from_single_file`."""

from __future__ import annotations

import re
from typing import Any

import torch


_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_state_dict(unet: Any, vae: Any) -> dict[str, torch.Tensor]:
    """Weights of a UNet and a VAE of the Stable Diffusion 1.x layout, as the original checkpoints name them."""
    state = {}
    for name, weight in unet.state_dict().items():
        state[f"model.diffusion_model.{_unet_name(name, unet)}"] = weight.clone()
    for name, weight in vae.state_dict().items():
        state[f"first_stage_model.{_vae_name(name, vae)}"] = weight.clone()
    return state


def _unet_name(name: str, unet: Any) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    per_level = unet.config.layers_per_block + 1
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, index, rest = match.groups()
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}.{_resnet_part(kind, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    assert match, name
    way, level, kind, index, rest = match.groups()
    start = int(level) * per_level
    if kind == "downsamplers":
        return f"input_blocks.{start + per_level}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        place = 2 if hasattr(unet.up_blocks[int(level)], "attentions") else 1
        return f"output_blocks.{start + per_level - 1}.{place}.{rest}"
    block = f"input_blocks.{1 + start + int(index)}" if way == "down" else f"output_blocks.{start + int(index)}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{_resnet_part(kind, rest)}"


def _resnet_part(kind: str, rest: str) -> str:
    part, _, parameter = rest.partition(".")
    return f"{_RESNET_PARTS[part]}.{parameter}" if kind == "resnets" else rest


def _vae_name(name: str, vae: Any) -> str:
    last = len(vae.config.block_out_channels) - 1
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{last - int(found[1])}.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", name)
    for ours, theirs in _VAE_PARTS.items():
        name = re.sub(rf"(?<=\.){re.escape(ours)}(?=\.)", theirs, name)
    return name
