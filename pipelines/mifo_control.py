"""`MIFOBoxControl`: box control as a part for any pipeline of the package.

    LocRefPipeline(..., parts=[MIFOBoxControl(objects)])

It is a *group*: a recipe that each call turns into parts and a step of its own (`objectcompose.pipelines.sampling`),
so nothing is kept between calls and one object serves many of them. `MIFOPipeline` is the plain pipeline with this
group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.utils import logging

from objectcompose.attention_processors.box_control import BoxControlOptions, BoxControlRun
from objectcompose.attention_processors.box_layers import ControlLayers, control_layers
from objectcompose.attention_processors.box_masks import PromptSubjects, SubjectRegions
from objectcompose.attention_processors.box_refinement import RefinementOptions
from objectcompose.attention_processors.early_exit import run_until
from objectcompose.attention_processors.install import attention_layers, layer_levels, match_layers
from objectcompose.attention_processors.mask import KeyMask, RegionKeyMask
from objectcompose.attention_processors.regions import RegionPyramid, RegionPyramidBatch, grids_of
from objectcompose.errors import ObjectComposeError, RegionError
from objectcompose.layout import SceneObject, as_scene_objects, require_object_fields
from objectcompose.pipelines.attention_maps import check_installable
from objectcompose.pipelines.call_arguments import CallArguments, SamplingState
from objectcompose.pipelines.gradient_passes import (
    check_gradients_allowed,
    check_weights_stay,
    held_lora_scale,
)
from objectcompose.pipelines.pipeline_output import PlacedObject
from objectcompose.pipelines.placement import place_phrases
from objectcompose.pipelines.subject_tokens import check_placeholders, prompt_subjects


box_control_logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ControlledPrompt:
    """One prompt whose objects are found.

    Attributes:
        subjects: their tokens.
        pyramid: their boxes on every grid.
        placed: what the caller is told about each.
    """

    subjects: PromptSubjects
    pyramid: RegionPyramid
    placed: list[PlacedObject]


def box_control_options(values: Any) -> BoxControlOptions:
    """Options from what a user gives: None, a mapping with some of the fields, or the options themselves.

    Raises:
        ObjectComposeError: an unknown name or a value out of range.
    """
    if values is None:
        return BoxControlOptions()
    if not isinstance(values, Mapping):
        if not hasattr(values, "guided_steps"):
            raise ObjectComposeError(f"`options` must be `BoxControlOptions` or a dict of its fields, got {values!r}.")
        return values  # by attribute, never by class: flattened Hub code holds a second copy of it
    known = {field.name for field in fields(BoxControlOptions)}
    of_refinement = {field.name for field in fields(RefinementOptions)}
    unknown = sorted(set(values) - known - of_refinement)
    if unknown:
        raise ObjectComposeError(f"`options` has no {', '.join(unknown)}; known: {sorted(known | of_refinement)}.")
    chosen = {name: value for name, value in values.items() if name in known}
    details = {name: value for name, value in values.items() if name in of_refinement}
    options = BoxControlOptions(**chosen)
    return replace(options, refinement=replace(options.refinement, **details)) if details else options


class MIFOBoxControl:
    """Keep each object in its box, and apart from the others, by attention (MIFO, arXiv 2511.00542, section 3.3).

    Args:
        objects: `SceneObject`s or dicts, one list for all prompts or one per prompt. Each needs a `phrase` of the
            prompt or a learned `token`, and a `box` or `mask` (where both are given, the mask). Objects of one phrase
            take its places in the prompt in turn; those left over share the last one, as the dogs of "two dogs" do.
        options: `BoxControlOptions`, or a dict with some of its and `RefinementOptions`' fields.
        loss_layers: attention layers that the loss reads, a regex or a list of names; None: see `control_layers`.
        map_layers: those whose maps refine the masks, all of one grid; None likewise.

    Raises:
        ObjectComposeError: options that cannot be used.
    """

    kind = "group"
    method = "MIFOBoxControl"

    def __init__(
        self,
        objects: Any,
        options: BoxControlOptions | Mapping[str, Any] | None = None,
        loss_layers: str | Sequence[str] | None = None,
        map_layers: str | Sequence[str] | None = None,
    ) -> None:
        self.objects = objects
        self.options = box_control_options(options)
        self.loss_layers, self.map_layers = loss_layers, map_layers
        # By call, so that what was checked is not found anew; gone as soon as the call is over.
        self._found: WeakKeyDictionary[CallArguments, list[ControlledPrompt]] = WeakKeyDictionary()

    def check(self, pipeline: Any, call: CallArguments) -> None:
        """Refuse what cannot be controlled, before any model runs; warn where guidance cannot act.

        Raises:
            ObjectComposeError: or one of its subclasses; see `controlled_prompts` and `choose_layers`. Or steps are
                guided in inference mode, under group offloading or layerwise casting.
        """
        prompts = [prompt for prompt in self.controlled_prompts(pipeline, call) if prompt.placed]
        if not prompts or self.options.guided_steps == 0:
            return
        remedy = "call it in `torch.no_grad` alone, or use `guided_steps` 0 for masks without guidance"
        check_gradients_allowed(pipeline.unet, "guided_steps", remedy)
        check_weights_stay({"unet": pipeline.unet}, "guided_steps", "use `guided_steps=0` for masks without guidance")
        grids = self._loss_grids(pipeline.unet, pipeline.latent_size(call.height, call.width))
        covered = [all(bool((prompt.pyramid.at(grid) > 0).any(0).all()) for grid in grids) for prompt in prompts]
        if any(covered):
            labels = ", ".join(repr(item.label) for item in prompts[covered.index(True)].placed)
            box_control_logger.warning(
                f"{self.method} cannot move latents where boxes cover the whole picture, since its loss compares them"
                f" with what no box covers; masks still act. The boxes are those of {labels}."
            )

    def _loss_grids(self, unet: Any, canvas: tuple[int, int]) -> set[tuple[int, int]]:
        layers, levels = self.choose_layers(unet, canvas), layer_levels(unet)
        names = [name for kind in self.options.kinds for name in layers.of_kind(layers.loss, unet, kind)]
        grids = grids_of(*canvas, 1 + max(levels.values()))
        return {grids[levels[name]] for name in names}

    def controlled_prompts(self, pipeline: Any, call: CallArguments) -> list[ControlledPrompt]:
        """The prompts of a call with their objects found and placed.

        Raises:
            MissingFieldError: an object has no phrase and no token, or no box and no mask.
            PhraseNotFoundError: a phrase does not occur in its prompt, or a token was not learned.
            PromptTooLongError: a prompt is longer than the text encoder reads.
            RegionError: two objects have the same cells, or there are too many for the grid of the maps.
            LayerNotFoundError, PartConflictError: the layers do not exist or cannot be controlled.
        """
        if call not in self._found:
            self._found[call] = self._find_prompts(pipeline, call)
        return self._found[call]

    def _find_prompts(self, pipeline: Any, call: CallArguments) -> list[ControlledPrompt]:
        texts = [call.prompt] if isinstance(call.prompt, str) else call.prompt
        canvas = pipeline.latent_size(call.height, call.width)
        rows = as_scene_objects(self.objects, 1 if texts is None else len(texts))
        for row in rows:
            require_object_fields(row, [("phrase", "token"), ("box", "mask")], self.method)
            if pipeline.tokenizer is not None:
                check_placeholders(pipeline.tokenizer, row)
        used = ("phrase", "token", "box", "mask")
        placed = place_phrases(
            pipeline.tokenizer, call.prompt, rows, (call.height, call.width), used, self.method, may_share=True
        )
        assert texts is not None  # `place_phrases` refuses objects without a prompt
        layers = self.choose_layers(pipeline.unet, canvas)
        # Something on every layer, as the masks will be: the processors there must be replaceable.
        check_installable(pipeline.unet, [KeyMask(torch.ones(1, dtype=torch.bool)), RegionKeyMask(None)])
        return [
            self._controlled(pipeline.tokenizer, text, row, where, canvas, layers)
            for text, row, where in zip(texts, rows, placed, strict=True)
        ]

    def _controlled(
        self,
        tokenizer: Any,
        prompt: str,
        objects: Sequence[SceneObject],
        placed: list[PlacedObject],
        canvas: tuple[int, int],
        layers: ControlLayers,
    ) -> ControlledPrompt:
        pyramid = RegionPyramid.from_objects(objects, canvas, rule="round")
        cells = pyramid.at(layers.map_grid)
        for second in range(len(objects)):
            for first in range(second):
                if torch.equal(cells[first], cells[second]):
                    raise RegionError(
                        f"`objects` must have boxes that differ on the grid {layers.map_grid} where they are told"
                        f" apart: {placed[first].label!r} and {placed[second].label!r} of {prompt!r} overlap fully."
                    )
        limit = cells[0].numel() // self.options.refinement.clusters_per_subject if len(objects) else 0
        if self.options.refine and len(objects) > limit:
            raise RegionError(
                f"`objects` must be at most {limit} on the grid {layers.map_grid}, got {len(objects)} for {prompt!r}."
            )
        subjects = prompt_subjects(tokenizer, prompt, objects, placed, self.options.filtered_words)
        return ControlledPrompt(subjects, pyramid, placed)

    def choose_layers(self, unet: Any, canvas: tuple[int, int]) -> ControlLayers:
        """The layers that loss and refinement read; `canvas` is (h, w) of the latents.

        Raises:
            LayerNotFoundError: a pattern matches nothing, or the UNet has no decoder with attention.
            RegionError: `map_layers` are of several grids, or of one with too many cells.
        """
        chosen = control_layers(unet, canvas)
        if self.loss_layers is not None:
            chosen = replace(chosen, loss=tuple(match_layers(unet, self.loss_layers)))
        if self.map_layers is not None:
            names = match_layers(unet, self.map_layers)
            levels = {layer_levels(unet)[name] for name in names}
            if len(levels) > 1:
                raise RegionError(f"`map_layers` must be of one grid, got {len(levels)}: {names}.")
            grid = grids_of(*canvas, 1 + max(levels))[max(levels)]
            chosen = replace(chosen, maps=tuple(names), map_grid=grid)
        if self.options.refine and chosen.map_grid[0] * chosen.map_grid[1] > 1024:
            raise RegionError(f"`map_layers` must have at most 1024 cells, got a grid of {chosen.map_grid}.")
        return chosen

    def bind(self, pipeline: Any, call: CallArguments, state: SamplingState) -> BoundBoxControl:
        """The parts and the step of one call, after `start_sampling`."""
        prompts = self.controlled_prompts(pipeline, call)
        pictures = [prompt for prompt in prompts for _ in range(call.num_images_per_prompt)]
        canvas = (state.latents.shape[-2], state.latents.shape[-1])
        run = BoxControlRun(
            pipeline.unet,
            [picture.subjects for picture in pictures],
            SubjectRegions(RegionPyramidBatch([picture.pyramid for picture in pictures])),
            state.prompt_embeds.shape[1],
            self.choose_layers(pipeline.unet, canvas),
            self.options,
            len(state.schedule),
        )
        return BoundBoxControl(run, pipeline, state)


class BoundBoxControl:
    """Box control in a running call.

    Args:
        run: what it does.
        pipeline: whose call it is.
        state: of the call.

    Attributes:
        parts: for the whole call.
    """

    def __init__(self, run: BoxControlRun, pipeline: Any, state: SamplingState) -> None:
        self.run, self.pipeline, self.state = run, pipeline, state
        self.parts = run.parts

    def before_step(
        self, step: int, timestep: torch.Tensor, latents: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Move the latents, if the step is guided; see `BoxControlRun.before_step`."""
        with held_lora_scale(self.pipeline.unet, self.pipeline.cross_attention_kwargs) as cross_attention_kwargs:
            return self._before_step(step, timestep, latents, prompt_embeds, cross_attention_kwargs)

    def _before_step(
        self,
        step: int,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        cross_attention_kwargs: dict[str, Any] | None,
    ) -> torch.Tensor:
        count = len(latents)
        # Parts of other methods may be made for both halves of the batch; then both run, and only the second is read.
        runs_both = len(prompt_embeds) > count and self._has_foreign_parts()
        repeats = len(prompt_embeds) // count if runs_both else 1
        inputs: dict[str, Any] = {
            "encoder_hidden_states": prompt_embeds if runs_both else prompt_embeds[-count:],
            "cross_attention_kwargs": cross_attention_kwargs,
        }
        if self.state.timestep_cond is not None:
            inputs["timestep_cond"] = self.state.timestep_cond
        if self.state.added_cond_kwargs is not None:
            embeds = self.state.added_cond_kwargs["image_embeds"]
            inputs["added_cond_kwargs"] = {"image_embeds": embeds if runs_both else [x[-count:] for x in embeds]}

        def scale_input(states: torch.Tensor) -> torch.Tensor:
            return self.pipeline.scheduler.scale_model_input(states, timestep)

        def forward(model_input: torch.Tensor) -> None:
            batch = torch.cat([model_input] * repeats) if repeats > 1 else model_input
            run_until(self.pipeline.unet, self.run.last_layers, batch, timestep, **inputs)

        # Schedulers of second order start every other step from latents that they stored, whatever these here are.
        is_kept = getattr(self.pipeline.scheduler, "state_in_first_order", True)
        moved = self.run.before_step(step, latents, scale_input, forward, is_kept)
        if hasattr(self.pipeline.scheduler, "last_sample") and not torch.equal(moved, latents):
            self.pipeline.scheduler.last_sample = None  # from where UniPC's corrector would do the last step anew
        return moved

    def _has_foreign_parts(self) -> bool:
        """Whether masks or branches of others are installed, which change what the layers compute."""
        for module in attention_layers(self.pipeline.unet).values():
            for part in getattr(module.processor, "composed_parts", ()):
                if part.kind != "probe" and not any(part is own for own in self.parts):
                    return True
        return False
