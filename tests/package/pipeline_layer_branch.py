"""A pipeline with an adapter, as a method with trained weights has it, small enough to read at a glance.

Not part of the package: the tests put it into a copy of the package (`test_hub_roundtrip.py`), where it is built,
saved, pushed and loaded like the package's own.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPTextModel, CLIPTokenizer

from objectcompose.adapters.layer_adapter import LayerAdapter
from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.install import use_parts
from objectcompose.pipelines.adapter_loading import AdapterLoaderMixin
from objectcompose.pipelines.saving import HubSavingMixin


class LayerBranchPipeline(HubSavingMixin, AdapterLoaderMixin, StableDiffusionPipeline):
    """Stable Diffusion that also attends to image tokens, `(1, S, C)`, through an adapter."""

    model_cpu_offload_seq = "text_encoder->image_encoder->adapter->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder", "adapter"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
        adapter: LayerAdapter | None = None,
    ):
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.check_adapter(adapter, unet)
        self.register_modules(adapter=adapter)

    @torch.no_grad()
    def __call__(self, *args: Any, image_tokens: torch.Tensor | None = None, **options: Any) -> Any:
        parts = []
        if image_tokens is not None and self.adapter is not None:
            tokens = image_tokens.to(self._execution_device, self.adapter.dtype)
            parts.append(Branch(self.adapter(tokens), num_objects=1))
        with use_parts(self.unet, parts):
            return super().__call__(*args, **options)
