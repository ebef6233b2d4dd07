"""The pipelines that the conformance suite runs over: one row each, on tiny components.

A row says how to build the pipeline and how to ask for what is its own (objects, parts, maps); the suite asks for it
everywhere, so that batches, callbacks and saving are tested with the method at work. `plain_class` is what the
pipeline must equal bit for bit when nothing of its own is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from tests.tiny import tiny_components


@dataclass(frozen=True)
class Scene:
    """A prompt and its objects, in layout-JSON form."""

    prompt: str
    objects: Sequence[dict[str, Any]]


SCENES = (
    Scene("a dog and a corgi", [{"phrase": "dog"}, {"phrase": "corgi"}]),
    Scene("a red cup on the table", [{"phrase": "red cup"}, {"phrase": "table"}]),
)


@dataclass(frozen=True)
class Row:
    """One pipeline of the suite.

    Attributes:
        pipeline_class: the pipeline.
        options: arguments of every call that uses the method, beside the objects.
        scenes: what is asked for, two scenes at least.
        plain_class: the pipeline of diffusers that it equals when it is not asked for anything of its own.
        adds_components: components beside those of the plain pipeline, made for a UNet.
    """

    pipeline_class: Any
    options: dict[str, Any]
    scenes: Sequence[Scene] = SCENES
    plain_class: Any = StableDiffusionPipeline
    adds_components: Callable[[Any], dict[str, Any]] = lambda unet: {}

    def components(self, kind: str = "sd1", **changes: Any) -> dict[str, Any]:
        plain = {**tiny_components(kind), **changes}
        return {**plain, **self.adds_components(plain["unet"])}

    def build(self, kind: str = "sd1", **changes: Any) -> Any:
        return quiet(self.pipeline_class(**self.components(kind, **changes)))

    def build_both(self, **changes: Any) -> tuple[Any, Any]:
        """The plain pipeline and this one, on the same components."""
        plain = {**tiny_components(), **changes}
        ours = {**plain, **self.adds_components(plain["unet"])}
        return quiet(self.plain_class(**plain)), quiet(self.pipeline_class(**ours))

    def call(self, pipeline: Any, *scenes: int, **arguments: Any) -> Any:
        """The method at work on scenes (default: the first): two steps, tensors, one seeded generator per picture."""
        chosen = [self.scenes[index] for index in scenes or (0,)]
        count = len(chosen) * arguments.get("num_images_per_prompt", 1)
        defaults = {
            "prompt": [scene.prompt for scene in chosen],
            "objects": [list(scene.objects) for scene in chosen],
            "num_inference_steps": 2,
            "output_type": "pt",
            "generator": generators(count),
            **self.options,
        }
        return pipeline(**{**defaults, **arguments})


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count: int, first: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


ROWS = {
    "token_compose": Row(TokenComposePipeline, {"return_attention": True}),
}
