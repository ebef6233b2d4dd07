"""diffusers' IP-Adapter with masks, trained by the same script as LocRef: the rival that adds to the text.

Without composite image, with one linear layer from the joint space to four tokens and gamma 1, what `train_locref`
trains is the sum that diffusers' processors form: text + sum of mask * attention to that picture's tokens. The weights
are renamed to a published IP-Adapter's, and diffusers' own code paints with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.files import write_atomically


#: Of `train_locref`: IP-Adapter's design (arXiv:2308.06721).
IP_ADAPTER_OPTIONS = {"composite": "none", "projection": "linear", "feature": "embeds", "num_tokens": 4, "gamma": 1.0}
IP_ADAPTER_FILE = "ip-adapter.safetensors"


def write_ip_adapter(weights: Path, unet: Any) -> Path:
    """Write an adapter's weights as an IP-Adapter file beside them; returns its path.

    Args:
        weights: folder of an adapter that was trained with `IP_ADAPTER_OPTIONS`.
        unet: the base, whose processors' order numbers the layers.
    """
    path = weights / IP_ADAPTER_FILE
    write_atomically(path, save(ip_adapter_tensors(LocRefAdapter.from_pretrained(weights), unet)))
    return path


def ip_adapter_tensors(adapter: LocRefAdapter, unet: Any) -> dict[str, torch.Tensor]:
    """The weights by their names in published files: cross-attention layers are numbered 1, 3, 5 and so on."""
    config: Any = adapter.config
    design = {name: getattr(config, name) for name in IP_ADAPTER_OPTIONS}
    assert design == IP_ADAPTER_OPTIONS and config.region_mask, f"no IP-Adapter: {design}"
    projection = adapter.reference_projection.state_dict()
    tensors = {f"image_proj.{name}": tensor for name, tensor in projection.items()}
    # a fresh basis of unit tokens gives back each map's own weights, whatever they are called inside
    names = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    basis = torch.eye(unet.config.cross_attention_dim)[None]
    with torch.no_grad():
        keys_values = adapter.reference_maps(basis, basis)
    for place, name in enumerate(names):
        for kind, rows in zip(("k", "v"), keys_values[name], strict=True):
            tensors[f"ip_adapter.{2 * place + 1}.to_{kind}_ip.weight"] = rows[0].T
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
