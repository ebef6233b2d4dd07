"""Compositional guidance: sample once, see which segment shows which object, sample again with that in mind.

VisualComposer (arXiv:2501.01424), section 3.4, as the method spec fills in what the paper's text leaves open. The
second stage starts from the same noise and confines each object to its segment (`object_regions`), while the
appearance tokens of matched objects are refined (`token_refinement`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from objectcompose.layout import SceneObject
from objectcompose.pipelines.attention_maps import PhraseMapRecorder
from objectcompose.pipelines.call_arguments import CallArguments, SamplingState
from objectcompose.pipelines.guidance_options import GuidanceOptions
from objectcompose.pipelines.object_matching import (
    CROP_MARGIN,
    ObjectMatch,
    dino_side,
    dino_statistics,
    embed_crops,
    find_segments,
    mask_bounds,
    match_segments,
    segment_pixels,
)
from objectcompose.pipelines.object_prompts import ObjectPromptBranch
from objectcompose.pipelines.object_regions import dilated_masks, slot_masks
from objectcompose.pipelines.pipeline_output import PlacedObject
from objectcompose.pipelines.reference_images import clip_statistics, reference_pixels
from objectcompose.pipelines.segment_refinement import RefinedObject, SegmentRefiner
from objectcompose.pipelines.token_refinement import refinement_indices


#: Share of the second stage's steps with grown regions: shapes are not settled yet.
DILATED_SHARE = 0.2


def random_sources(generator: Any, device: torch.device) -> list[torch.Generator]:
    """The generators behind a call's noise: those given, else the device's own."""
    if generator is not None:
        return list(generator) if isinstance(generator, list) else [generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return [torch.cuda.default_generators[index]]
    return [torch.default_generator]


@dataclass(eq=False)
class FirstStage:
    """A finished first stage.

    Attributes:
        noise: `(M, C, h, w)`, where it started.
        random_states: of the generators then, for samplers that draw more noise.
        latents: its result.
        matches: per picture a match for each slot's object.
        recorder: of attention maps; None in fast mode.
    """

    noise: torch.Tensor
    random_states: list[torch.Tensor]
    latents: torch.Tensor
    matches: list[list[ObjectMatch]]
    recorder: PhraseMapRecorder | None

    @property
    def num_unmatched(self) -> int:
        return sum(one.mask is None for row in self.matches for one in row)

    def rank(self, picture: int) -> tuple[int, float]:
        """How good a picture is: its matched objects, then their mean similarity."""
        found = [one.similarity or 0.0 for one in self.matches[picture] if one.mask is not None]
        return len(found), sum(found) / max(len(found), 1)


class GuidedRun:
    """Both stages of one call.

    Args:
        pipeline: an `ObjectPromptPipeline`.
        call: the arguments.
        options: how to guide.
        branch: of the object pictures; confined and refined here.
        objects: per generated picture its `SceneObject`s; those of scale 0 have no slot and match nothing.
        placed: per generated picture its objects; replaced by what matching and refinement found.
        map_layers: what `check_attention` returned.
        num_backgrounds: per generated picture the slots after the objects that hold a background prompt, 0 or 1.
    """

    def __init__(
        self,
        pipeline: Any,
        call: CallArguments,
        options: GuidanceOptions,
        branch: ObjectPromptBranch,
        objects: Sequence[Sequence[SceneObject]],
        placed: list[list[PlacedObject]],
        map_layers: Sequence[str],
        num_backgrounds: Sequence[int],
    ):
        self.pipeline, self.call, self.options, self.branch = pipeline, call, options, branch
        self.placed, self.map_layers, self.num_backgrounds = placed, map_layers, num_backgrounds
        self.parts = [*call.parts, branch.part]
        self.colour, _ = clip_statistics(pipeline.feature_extractor)
        self.side = dino_side(pipeline.dino, pipeline.dino_processor)
        self.sources = random_sources(call.generator, pipeline._execution_device)
        shown = [[item for item in row if item.scale] for row in objects]
        self.places = [[place for place, item in enumerate(row) if item.scale] for row in objects]  # of the slots
        self.phrases = [[item.phrase for item in row] for row in shown]
        self.references = self._embed_prompts([[item.image for item in row] for row in shown])

    def run(self, state: SamplingState) -> tuple[SamplingState, PhraseMapRecorder | None]:
        """Sample from what `start_sampling` returned.

        Returns:
            The state to decode and the recorder of its run. Where nothing matches, or a callback interrupts the first
            stage, that is a full run without guidance, bit for bit.
        """
        first = self.first_stage(state)
        for _ in range(self.options.num_restarts):
            if first.num_unmatched and not self.pipeline.interrupt:
                first = self._with_better_pictures(first, self.first_stage(self._restart(state)))
        self._note_matches(first.matches)
        is_matched = any(one.mask is not None for row in first.matches for one in row)
        if self.pipeline.interrupt or (not is_matched and self.options.mode == "exact"):
            return replace(state, latents=first.latents), first.recorder
        state = self._rewind(replace(state, latents=first.noise), first.random_states)
        recorder = self.pipeline.make_recorder(self.call, self.placed, self.map_layers)
        if is_matched:
            self.second_stage(state, first.matches, recorder)
        else:
            self.pipeline.denoise(self.call, state, self.parts, recorder)
        return state, recorder

    # ---- the two stages

    def first_stage(self, start: SamplingState) -> FirstStage:
        """A run without guidance, at half the steps in fast mode, and what matches in its pictures."""
        random_states = [source.get_state() for source in self.sources]
        state = self._rewind(start, random_states)
        recorder = None
        if self.options.mode == "exact":
            recorder = self.pipeline.make_recorder(self.call, self.placed, self.map_layers)
        else:
            self._halve_schedule(state)
        self.pipeline.denoise(self.call, state, self.parts, recorder)
        matches = [[ObjectMatch(None, None)] * len(row) for row in self.places]
        if not self.pipeline.interrupt:
            matches = self.match_pictures(state.latents)
        return FirstStage(start.latents, random_states, state.latents, matches, recorder)

    def second_stage(
        self, state: SamplingState, matches: Sequence[Sequence[ObjectMatch]], recorder: PhraseMapRecorder | None
    ) -> None:
        """The run with regions and refinement; leaves its result in `state.latents`."""
        pipeline = self.pipeline
        masks = [
            slot_masks([one.mask for one in row], count) or [None]  # without prompts: one slot that nobody sees
            for row, count in zip(matches, self.num_backgrounds, strict=True)
        ]
        is_free = [
            [one.mask is None for one in row] + [True] * count or [True]
            for row, count in zip(matches, self.num_backgrounds, strict=True)
        ]
        canvas = pipeline.latent_size(self.call.height, self.call.width)
        coarsest = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)  # cells of the canvas that one there spans
        grown = dilated_masks(masks, canvas, coarsest)
        num_grown = math.ceil(DILATED_SHARE * len(state.schedule))
        updates = refinement_indices(state.schedule, self.options.refinement_steps)
        refiner = SegmentRefiner(pipeline, self.branch, self._targets(matches))

        def before_step(
            step: int, timestep: torch.Tensor, latents: torch.Tensor, prompt_embeds: torch.Tensor
        ) -> torch.Tensor:
            if step in (0, num_grown):
                self.branch.confine(grown if step < num_grown else masks, canvas, is_free)
            if step in updates:
                refiner.step(state, timestep)
            return latents

        pipeline.denoise(self.call, state, self.parts, recorder, before_step)
        for target, losses in zip(refiner.targets, refiner.refinement.losses, strict=True):
            row, place = self.placed[target.picture], self.places[target.picture][target.slot]
            row[place] = replace(row[place], refinement_losses=tuple(losses))

    def _targets(self, matches: Sequence[Sequence[ObjectMatch]]) -> list[RefinedObject]:
        return [
            RefinedObject(picture, slot, one.mask, self.references[picture][slot])
            for picture, row in enumerate(matches)
            for slot, one in enumerate(row)
            if one.mask is not None
        ]

    # ---- what is seen

    def _embed_prompts(self, images: Sequence[Sequence[Any]]) -> list[torch.Tensor]:
        """DINO features of each picture's prompts, `(N, D)` per picture, of length 1."""
        places: dict[int, int] = {}  # the pictures of one prompt share its objects
        crops: list[torch.Tensor] = []
        for image in (image for row in images for image in row):
            if id(image) not in places:
                places[id(image)] = len(crops)
                crops.append(reference_pixels(image, self.side, self.colour, CROP_MARGIN))
        features = self._embed(crops)
        return [features[[places[id(image)] for image in row]] for row in images]

    def _embed(self, crops: Sequence[torch.Tensor]) -> torch.Tensor:
        statistics = dino_statistics(self.pipeline.dino_processor)
        return embed_crops(self.pipeline.dino, torch.stack(list(crops)), statistics, self.pipeline._execution_device)

    def match_pictures(self, latents: torch.Tensor) -> list[list[ObjectMatch]]:
        """Decode, segment, embed and assign; per picture a match for each slot's object."""
        pipeline = self.pipeline
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        pictures = pipeline.image_processor.postprocess(decoded, output_type="pt").float()  # (M, 3, H, W)
        images = pipeline.image_processor.numpy_to_pil(pictures.permute(0, 2, 3, 1).cpu().numpy())
        matches: list[list[ObjectMatch]] = []
        for picture, image, reference, names in zip(pictures, images, self.references, self.phrases, strict=True):
            phrases = [name for name in names if name is not None]
            if not names:
                matches.append([])
                continue
            masks = find_segments(self.options.segmenter, image, phrases if len(phrases) == len(names) else None)
            if not len(masks):
                matches.append([ObjectMatch(None, None)] * len(names))
                continue
            features = self._embed([segment_pixels(picture, mask, self.side, self.colour) for mask in masks])
            matches.append(match_segments(masks, features, reference, self.options.similarity_threshold))
        return matches

    def _note_matches(self, matches: Sequence[Sequence[ObjectMatch]]) -> None:
        for row, places, found in zip(self.placed, self.places, matches, strict=True):
            for place, one in zip(places, found, strict=True):
                box = None
                if one.mask is not None:
                    height, width = one.mask.shape
                    top, bottom, left, right = mask_bounds(one.mask)
                    box = (left / width, top / height, right / width, bottom / height)
                row[place] = replace(
                    row[place], matched=one.mask is not None, similarity=one.similarity, region=one.mask, box=box
                )

    # ---- noise and schedule

    def _rewind(self, state: SamplingState, random_states: Sequence[torch.Tensor]) -> SamplingState:
        """A copy of `state` from which a full run starts, whatever ran since `start_sampling`."""
        pipeline, call = self.pipeline, self.call
        for source, random_state in zip(self.sources, random_states, strict=True):
            source.set_state(random_state)
        # callbacks may have changed these, and samplers remember their last steps
        pipeline.set_call_state(
            call.guidance_scale, call.guidance_rescale, call.clip_skip, call.cross_attention_kwargs
        )
        schedule, num_steps = pipeline.prepare_timesteps(
            call.num_inference_steps, state.device, call.timesteps, call.sigmas
        )
        pipeline._num_timesteps = len(schedule)
        return replace(state, schedule=schedule, num_inference_steps=num_steps)

    def _halve_schedule(self, state: SamplingState) -> None:
        """Every other step, from the same noise."""
        pipeline, call = self.pipeline, self.call
        sigma = float(pipeline.scheduler.init_noise_sigma)
        state.schedule, state.num_inference_steps = pipeline.prepare_timesteps(
            max(call.num_inference_steps // 2, 1),
            state.device,
            None if call.timesteps is None else call.timesteps[::2],
            None if call.sigmas is None else call.sigmas[::2],
        )
        pipeline._num_timesteps = len(state.schedule)
        state.latents = state.latents * (float(pipeline.scheduler.init_noise_sigma) / sigma)

    def _restart(self, state: SamplingState) -> SamplingState:
        """The same call from the generators' next noise."""
        pipeline, call = self.pipeline, self.call
        state = self._rewind(state, [source.get_state() for source in self.sources])
        shape, dtype = state.latents.shape, state.latents.dtype
        latents = pipeline.prepare_latents(
            shape[0], shape[1], call.height, call.width, dtype, state.device, call.generator
        )
        return replace(state, latents=latents)

    @staticmethod
    def _with_better_pictures(known: FirstStage, other: FirstStage) -> FirstStage:
        """Of each picture the better run; the earlier one where they are equally good."""
        is_better = [other.rank(picture) > known.rank(picture) for picture in range(len(known.matches))]
        chosen = torch.tensor(is_better, device=known.noise.device)[:, None, None, None]
        if all(is_better):
            return other
        if not any(is_better):
            return known
        # several pictures have a generator each (`check_guidance`)
        picks = [(other if better else known, index) for index, better in enumerate(is_better)]
        return FirstStage(
            torch.where(chosen, other.noise, known.noise),
            [run.random_states[index] for run, index in picks],
            torch.where(chosen, other.latents, known.latents),
            [run.matches[index] for run, index in picks],
            None,
        )
