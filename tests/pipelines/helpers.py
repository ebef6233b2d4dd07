"""What the pipeline tests share: two pipelines on the same tiny components, an IP-Adapter, and a recording call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from tests.tiny import TEXT_WIDTH, tiny_components


CLIP_WIDTH = 11


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both_pipelines(kind: str = "sd1", **changes: Any) -> tuple[StableDiffusionPipeline, TokenComposePipeline]:
    """`StableDiffusionPipeline` and `TokenComposePipeline` on the same components."""
    components = {**tiny_components(kind), **changes}
    plain = StableDiffusionPipeline(**components, requires_safety_checker=False)
    return quiet(plain), quiet(TokenComposePipeline(**components, requires_safety_checker=False))


def compose_pipeline(kind: str = "sd1", **changes: Any) -> TokenComposePipeline:
    return quiet(TokenComposePipeline(**{**tiny_components(kind), **changes}))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipeline: Any, prompt: Any = "a dog and a corgi", seed: int = 0, **arguments: Any) -> Any:
    """A call with two steps, tensor output and a seeded generator."""
    defaults = {"num_inference_steps": 2, "output_type": "pt", "generator": seeded(seed)}
    return pipeline(prompt, **{**defaults, **arguments})


def add_ip_adapter(unet: Any, num_tokens: int = 4) -> None:
    """Give a UNet an IP-Adapter with random weights, as `load_ip_adapter` does."""
    generator = seeded(7)
    weights, key = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            for projection in ("to_k_ip", "to_v_ip"):
                weights[f"{key}.{projection}.weight"] = torch.randn(width, TEXT_WIDTH, generator=generator)
            key += 2
    projection = {
        "proj.weight": torch.randn(num_tokens * TEXT_WIDTH, CLIP_WIDTH, generator=generator),
        "proj.bias": torch.zeros(num_tokens * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False)


def ip_embeds(guided: bool = True) -> list[torch.Tensor]:
    """Embeddings for one prompt and one picture: negative row first under guidance, `(2 | 1, 1, CLIP_WIDTH)`."""
    return [torch.randn(2 if guided else 1, 1, CLIP_WIDTH, generator=seeded(5))]


def processor_ids(unet: Any) -> dict[str, int]:
    """Identity of every installed processor."""
    return {name: id(processor) for name, processor in unet.attn_processors.items()}
