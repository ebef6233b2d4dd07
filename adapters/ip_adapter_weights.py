"""Published IP-Adapter files (arXiv:2308.06721) as tensors by layer name.

The files number the cross-attention layers by their place among the UNet's processors: 1, 3, 5 ... (self-attention
has the even numbers), in the order down, UP, middle. That order is not the order in which layers run, so numbers are
translated to names here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from objectcompose.adapters.folders import PICKLE_HINT, checkpoint_file_errors
from objectcompose.attention_processors.install import plain_unet
from objectcompose.errors import CheckpointError


def read_ip_adapter(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, named `image_proj.*` and `ip_adapter.<number>.to_k_ip.weight`.

    Raises:
        CheckpointFileError: the file is missing or damaged, or no safetensors.
        CheckpointError: it is of another kind.
    """
    is_pickled = Path(path).suffix in (".bin", ".ckpt", ".pt", ".pth")
    with checkpoint_file_errors(
        f"the IP-Adapter {str(path)!r} cannot be loaded", lambda reason: PICKLE_HINT if is_pickled else ""
    ):
        tensors = load_file(path)
    kinds = {name.partition(".")[0] for name in tensors}
    if kinds != {"image_proj", "ip_adapter"}:
        raise CheckpointError(
            f"{str(path)!r} must be an IP-Adapter, with tensors named image_proj and ip_adapter, got {sorted(kinds)}."
        )
    return tensors


def ip_adapter_layers(tensors: Mapping[str, torch.Tensor], unet: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weights of the maps to keys and values, `(width of the layer, width of the text)` each, by layer name.

    Args:
        tensors: what `read_ip_adapter` returned.
        unet: the base; its processors' order is how the file numbers layers.

    Raises:
        CheckpointError: the file lacks a layer, or its weights have another shape than the layer's own.
    """
    unet = plain_unet(unet)
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    cross_layers = [name for name in names if unet.get_submodule(name).is_cross_attention]
    found = {}
    for place, name in enumerate(cross_layers):
        layer = unet.get_submodule(name)
        pair = []
        for theirs, ours in (("to_k_ip", layer.to_k), ("to_v_ip", layer.to_v)):
            key = f"ip_adapter.{2 * place + 1}.{theirs}.weight"
            wanted, weight = (ours.out_features, ours.in_features), tensors.get(key)
            if weight is None or tuple(weight.shape) != wanted:
                got = "nothing" if weight is None else tuple(weight.shape)
                raise CheckpointError(
                    f"the IP-Adapter must have been made for this base: {key}, for layer {name}, must have shape"
                    f" {wanted}, got {got}."
                )
            pair.append(weight)
        found[name] = (pair[0], pair[1])
    return found
