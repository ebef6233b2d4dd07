"""What a pipeline is made of, as digests: equal digests paint equal pictures."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from objectcompose.grounding.loading import fingerprint


def pipeline_identity(pipeline: Any) -> dict[str, str]:
    """32 hex digits per component, and the pipeline's class.

    Weights are digested as they are in memory, so deltas and LoRA layers that are on a model count, with their scales;
    where they were loaded from does not.

    Args:
        pipeline: of diffusers' kind; all weights in memory.

    Returns:
        Component name to digest, in the order of names, and `"class"`.
    """
    found = {"class": type(pipeline).__name__}
    for name, component in sorted(pipeline.components.items()):
        if component is None:
            continue
        if isinstance(component, torch.nn.Module):
            found[name] = fingerprint(component, _settings(component), _lora_scales(component))
        elif hasattr(component, "get_vocab"):
            found[name] = _digest([sorted(component.get_vocab().items()), component.model_max_length])
        else:
            found[name] = _digest([type(component).__name__, _settings(component)])
    return found


def _settings(component: Any) -> Any:
    """The component's config without what only says where it came from."""
    config = getattr(component, "config", None) or {}
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    passing = ("transformers_version", "dtype", "torch_dtype", "name_or_path", "architectures")
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in passing}


def _lora_scales(module: torch.nn.Module) -> list[Any]:
    """How strong each LoRA layer is and whether it is on, which the weights do not say."""
    layers = [(name, one) for name, one in module.named_modules() if isinstance(getattr(one, "scaling", None), dict)]
    facts = ("active_adapters", "disable_adapters", "merged_adapters")
    return [[name, dict(one.scaling), *(getattr(one, fact, None) for fact in facts)] for name, one in layers]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
