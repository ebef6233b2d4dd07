"""A fifth method, as docs/add_a_method.md builds it: a phrase is read only inside its box."""

from __future__ import annotations

from typing import Any

import torch

from objectcompose.attention_processors.mask import KeyMask
from objectcompose.attention_processors.regions import RegionPyramid
from objectcompose.errors import MissingFieldError
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from objectcompose.pipelines.placement import place_phrases


class PhraseVisibility:
    """Which positions of the text each cell sees: those of a phrase only inside its box.

    Args:
        pyramids: per picture the boxes of its objects on every grid.
        token_indices: per picture, for each object, the positions of its phrase.
        num_keys: positions of the text.
    """

    def __init__(self, pyramids: list[RegionPyramid], token_indices: list[list[tuple[int, ...]]], num_keys: int):
        self.pyramids, self.token_indices, self.num_keys = pyramids, token_indices, num_keys

    def at_tokens(self, num_tokens: int, device: Any = None) -> torch.Tensor:
        """bool `(pictures, num_tokens, num_keys)`, for the grid of `num_tokens` cells."""
        visible = torch.ones(len(self.pyramids), num_tokens, self.num_keys, dtype=torch.bool)
        for table, pyramid, phrases in zip(visible, self.pyramids, self.token_indices, strict=True):
            for inside, positions in zip(pyramid.at_tokens(num_tokens).flatten(1) > 0, phrases, strict=True):
                table[:, list(positions)] &= inside[:, None]
        return visible.to(device)


class PhraseBoxes:
    """The method as a part for any pipeline: `parts=[PhraseBoxes(objects)]`.

    Args:
        objects: `SceneObject`s or dicts with `phrase` and `box`, one list for all prompts or one per prompt.
    """

    kind = "group"
    before_step = None  # nothing happens between steps

    def __init__(self, objects: Any) -> None:
        self.objects = objects
        self.parts: list[Any] = []

    def check(self, pipeline: Any, call: Any) -> None:
        """Refuse what cannot be used, before any model runs."""
        self._placed(pipeline, call)

    def bind(self, pipeline: Any, call: Any, state: Any) -> PhraseBoxes:
        """The same with the parts of one call."""
        placed = [row for row in self._placed(pipeline, call) for _ in range(call.num_images_per_prompt)]
        canvas = pipeline.latent_size(call.height, call.width)
        visibility = PhraseVisibility(
            [RegionPyramid([item.box for item in row], canvas, rule="cover") for row in placed],
            [[item.token_indices for item in row] for row in placed],
            state.prompt_embeds.shape[1],
        )
        bound = PhraseBoxes(self.objects)
        bound.parts = [KeyMask(visibility, rows=slice(-len(placed), None))]  # the conditional half
        return bound

    def _placed(self, pipeline: Any, call: Any) -> list[list[Any]]:
        canvas, used = (call.height, call.width), ("phrase", "box")
        placed = place_phrases(pipeline.tokenizer, call.prompt, self.objects, canvas, used, "PhraseBoxes")
        for item in (item for row in placed for item in row):
            if item.box is None:
                raise MissingFieldError(f"`box` is needed of every object; {item.label!r} has none.")
        return placed


class PhraseBoxesPipeline(TokenComposePipeline):
    """The method as a pipeline of its own; without `objects` it is the plain pipeline, bit for bit."""

    used_fields = ("phrase", "box")

    def __call__(self, prompt: Any = None, *, objects: Any = None, parts: Any = (), **arguments: Any) -> Any:
        own = [] if objects is None else [PhraseBoxes(objects)]
        return super().__call__(prompt, objects=objects, parts=[*parts, *own], **arguments)
