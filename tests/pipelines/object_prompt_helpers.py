"""What the tests of ObjectPromptPipeline share: real classes at tiny size, object pictures, and a segmenter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from objectcompose.adapters.object_prompt_adapter import ObjectPromptAdapter
from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline
from tests.tiny import tiny_components, tiny_dino, tiny_image_encoder


PROMPT = "a dog and a cup on the table"


def object_picture(seed: int, size: tuple[int, int] = (18, 26)) -> Image.Image:
    """Noise in one hue, cut out as an ellipse: RGBA."""
    generator = np.random.default_rng(seed)
    hue = generator.integers(40, 215, 3)
    levels = np.clip(hue + generator.integers(-40, 40, (*size, 3)), 0, 255).astype(np.uint8)
    rows, columns = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    alpha = np.where(rows**2 + columns**2 <= 1, 255, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([levels, alpha]))


def two_objects(**changes: Any) -> list[dict[str, Any]]:
    return [{"phrase": "dog", "image": object_picture(1), **changes}, {"phrase": "cup", "image": object_picture(2)}]


def prompt_adapter(unet: Any, **options: Any) -> ObjectPromptAdapter:
    """A small adapter whose tokens matter: keys, values and streams are random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        options = {"num_tokens": 3, "resampler_width": 12, "resampler_depth": 1, **options}
        adapter = ObjectPromptAdapter.from_unet(unet, image_encoder=tiny_image_encoder(), **options)
        for weight in adapter.projections.parameters():
            torch.nn.init.normal_(weight)
    return adapter


def own_components(unet: Any) -> dict[str, Any]:
    """Components beside those of Stable Diffusion."""
    return {"image_encoder": tiny_image_encoder(), "adapter": prompt_adapter(unet), "dino": tiny_dino()}


def prompt_pipeline(kind: str = "sd1", **changes: Any) -> ObjectPromptPipeline:
    components = tiny_components(kind)
    pipeline = ObjectPromptPipeline(**{**components, **own_components(components["unet"]), **changes})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class HalvesSegmenter:
    """Cuts every picture into two parts, left and right of the middle with a gap; counts its calls."""

    def __init__(self, found: tuple[str, ...] = ("left", "right")):
        self.found, self.pictures = found, []

    def segment(self, picture: Image.Image) -> list[torch.Tensor]:
        self.pictures.append(picture)
        width, height = picture.size
        columns = torch.arange(width)
        halves = {"left": columns < width * 0.4, "right": columns >= width * 0.6}
        return [halves[name].float().expand(height, width) for name in self.found]


def sample(pipeline: Any, seed: int = 0, **arguments: Any) -> Any:
    """A call with four steps, tensor output and a seeded generator."""
    defaults = {
        "prompt": PROMPT,
        "objects": two_objects(),
        "num_inference_steps": 4,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipeline(**{**defaults, **arguments})


def guided(pipeline: Any, seed: int = 0, **arguments: Any) -> Any:
    """`sample` with guidance that takes any pair for a match."""
    options = {"compositional_guidance": True, "segmenter": HalvesSegmenter(), "similarity_threshold": -1.0}
    return sample(pipeline, seed, **{**options, **arguments})


def plain_images(pipeline: Any, seed: int = 0, **arguments: Any) -> torch.Tensor:
    """What `StableDiffusionPipeline` paints with the same components."""
    plain = StableDiffusionPipeline(**{name: pipeline.components[name] for name in tiny_components()})
    plain.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    defaults = {"num_inference_steps": 4, "output_type": "pt", "generator": generator}
    return plain(PROMPT, **{**defaults, **arguments}).images


def close(first: torch.Tensor, second: torch.Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(first, second, atol=atol, rtol=0)
