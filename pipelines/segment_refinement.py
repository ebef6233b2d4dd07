"""One refinement step with real models: predict, decode, look at the segments, carry the slope back to the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from objectcompose.attention_processors.compiled import prepare_parts
from objectcompose.attention_processors.install import frozen_parameters, use_parts
from objectcompose.pipelines.call_arguments import SamplingState
from objectcompose.pipelines.gradient_passes import held_lora_scale
from objectcompose.pipelines.object_matching import dino_side, dino_statistics, embed_crops, segment_pixels
from objectcompose.pipelines.object_prompts import ObjectPromptBranch
from objectcompose.pipelines.reference_images import clip_statistics
from objectcompose.pipelines.token_refinement import (
    HALF_LOSS_SCALE,
    TokenRefinement,
    predict_clean_latents,
    signal_share,
)


@dataclass(frozen=True, eq=False)
class RefinedObject:
    """One object that is refined: which picture and slot, its segment `(H, W)`, its DINO features `(D,)`."""

    picture: int
    slot: int
    mask: torch.Tensor
    reference: torch.Tensor


class SegmentRefiner:
    """Updates the value tokens of matched objects; key tokens and all weights stay as they are.

    Args:
        pipeline: with `unet`, `scheduler`, `adapter`, `dino`, `dino_processor`, `feature_extractor`, `vae` and
            `tiny_vae`.
        branch: of the call, installed while a step runs.
        targets: the objects, at least one.
    """

    def __init__(self, pipeline: Any, branch: ObjectPromptBranch, targets: Sequence[RefinedObject]):
        self.pipeline, self.branch, self.targets = pipeline, branch, list(targets)
        tokens = branch.tokens
        self.num_slots = tokens.present.shape[1]
        self.places = (
            torch.tensor([one.picture for one in self.targets], device=tokens.values.device),
            torch.tensor([one.slot for one in self.targets], device=tokens.values.device),
        )
        self.refinement = TokenRefinement(self._slots(tokens.values)[self.places])

    def _slots(self, states: torch.Tensor) -> torch.Tensor:
        """`(M, N * T, C)` to `(M, N, T, C)`."""
        return states.unflatten(1, (self.num_slots, -1))

    def step(self, state: SamplingState, timestep: torch.Tensor) -> None:
        """Update the tokens of the objects that are still active, and attend to the new values from now on."""
        if not self.refinement.active.any():
            return
        pipeline, refinement = self.pipeline, self.refinement
        models = (pipeline.unet, pipeline.vae, pipeline.tiny_vae, pipeline.dino, pipeline.adapter)
        quiet = use_parts(pipeline.unet, (), outer_probes=False)  # what probes measure is the sampling itself
        lora = held_lora_scale(pipeline.unet, pipeline.cross_attention_kwargs)
        with torch.enable_grad(), frozen_parameters(models), quiet, lora as cross_attention_kwargs:
            # In two halves, meeting at the values: offloading may move the adapter away once the UNet runs.
            values = {name: value.detach().requires_grad_() for name, value in self.branch.values.items()}
            self.branch.values = values
            losses = self.losses(state, timestep, cross_attention_kwargs)
            scale = HALF_LOSS_SCALE if pipeline.unet.dtype == torch.float16 else 1.0
            slopes = torch.autograd.grad(losses.sum() * scale, list(values.values()))
            tokens = refinement.tokens.clone().requires_grad_()
            projected = pipeline.adapter.values_of(tokens.to(pipeline.adapter.dtype))
            own_slopes = [self._slots(slope)[self.places] for slope in slopes]
            (gradients,) = torch.autograd.grad([projected[name] for name in values], tokens, own_slopes)
        refinement.update(losses.detach(), gradients)
        with torch.no_grad():
            changed = self._slots(self.branch.tokens.values).clone()
            changed[self.places] = refinement.tokens.to(changed)
            self.branch.values = pipeline.adapter.values_of(changed.flatten(1, 2))

    def losses(
        self, state: SamplingState, timestep: torch.Tensor, cross_attention_kwargs: dict[str, Any] | None
    ) -> torch.Tensor:
        """1 - cosine of each target's segment and prompt, `(K,)`, differentiable in the branch's values.

        0 for objects that are done. `cross_attention_kwargs` are for the UNet, see `held_lora_scale`.
        """
        pipeline = self.pipeline
        clean = self.clean_latents(state, timestep, cross_attention_kwargs)
        active = [index for index in range(len(self.targets)) if self.refinement.active[index]]
        shown = sorted({self.targets[index].picture for index in active})
        decoder = pipeline.vae if pipeline.tiny_vae is None else pipeline.tiny_vae
        # a tiny decoder's factor is 1: it reads the pipeline's latents as they are
        latents = (clean[shown] / decoder.config.scaling_factor).to(decoder.dtype)
        decoded = decoder.decode(latents, return_dict=False)[0].float() / 2 + 0.5
        colour, _ = clip_statistics(pipeline.feature_extractor)
        side, statistics = dino_side(pipeline.dino, pipeline.dino_processor), dino_statistics(pipeline.dino_processor)
        crops = []
        for index in active:
            target = self.targets[index]
            crops.append(segment_pixels(decoded[shown.index(target.picture)], target.mask, side, colour))
        features = embed_crops(pipeline.dino, torch.stack(crops), statistics, state.device)
        references = torch.stack([self.targets[index].reference for index in active]).to(features)
        losses = features.new_zeros(len(self.targets))
        losses[active] = 1 - (features * references).sum(-1)
        return losses

    def clean_latents(
        self, state: SamplingState, timestep: torch.Tensor, cross_attention_kwargs: dict[str, Any] | None
    ) -> torch.Tensor:
        """x0 `(M, C, h, w)` as the conditional half predicts it in one step, float32."""
        pipeline = self.pipeline
        count = len(state.latents)
        extra = state.added_cond_kwargs
        if extra is not None:  # image prompts lie as [uncond, cond], too
            extra = {name: [rows[-count:] for rows in tensors] for name, tensors in extra.items()}
        noisy = pipeline.scheduler.scale_model_input(state.latents, timestep)
        if state.is_compiled:
            prepare_parts(pipeline.unet, noisy)
        prediction = pipeline.unet(
            noisy,
            timestep,
            encoder_hidden_states=state.prompt_embeds[-count:],
            timestep_cond=state.timestep_cond,
            cross_attention_kwargs=cross_attention_kwargs,
            added_cond_kwargs=extra,
            return_dict=False,
        )[0]
        share = signal_share(pipeline.scheduler, float(timestep))
        return predict_clean_latents(noisy, prediction, share, pipeline.scheduler.config.prediction_type)
