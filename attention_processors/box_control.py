"""Box control of one running call: masks, guidance of the latents, refinement of the masks (MIFO, section 3.3).

`BoxControlRun` lives as long as one call of a pipeline and knows tensors only. Its parts mask all attention layers in
every forward. Before each step, `before_step` takes in the maps of the step before, replaces boxes by refined masks
once it is time, and in the first steps moves the latents down the gradient of the box loss: the conditional half
alone, left after the last layer that the loss reads, all attention fused. Pictures of a batch do not act on each
other: each has its own loss, early stop and masks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from objectcompose.attention_processors.box_layers import ControlLayers
from objectcompose.attention_processors.box_loss import (
    BoxLoss,
    box_control_loss,
    descent_step_size,
    mean_box_masses,
    penalty_weight,
    scaled_steps,
    schedule_position,
    subject_token_mass,
)
from objectcompose.attention_processors.box_masks import PaddingRule, PromptSubjects, SubjectRegions, TokenVisibility
from objectcompose.attention_processors.box_refinement import MaskRefiner, RefinementOptions
from objectcompose.attention_processors.install import frozen_parameters, use_parts
from objectcompose.attention_processors.mask import KeyMask, RegionKeyMask
from objectcompose.attention_processors.probe import CellMapProbe, RegionMassProbe, TokenMapProbe
from objectcompose.errors import NonFiniteError, ObjectComposeError


@dataclass(frozen=True)
class BoxControlOptions:
    """How strongly, how long and by what boxes control a picture. Defaults are the paper's and its authors'.

    Attributes:
        guided_steps: iterations of the loop before which the latents are moved, but for those that a scheduler of
            second order starts from older latents; None: 15 of 50, in proportion.
        iterations: gradient steps before each of them, at most.
        step_sizes: of the descent, at the first guided step and where it would be after the last.
        cross_weight, self_weight: weights of the losses on cross- and self-attention.
        penalty: out-of-box penalty with its decay, with its first weight throughout, or none (in-box reward only).
        penalty_weights: its weight at first, where the linear part ends, and the least; with less than 15 guided steps
            the last one stands a little above the least.
        stop_below: no further iteration for a picture whose loss per subject is below.
        stop_on: the loss with the penalty, or the reward alone.
        subjects_in_reward: count the background mass times the number of subjects, as Bounded Attention does.
        attention: control both kinds of attention, by masks and loss, or one of them.
        padding: whether padding of the prompt is masked as its end token is, or never. Stable Diffusion does with
            "open"; models that read most from their padding, as small ones may, need "like_end".
        filtered_words: words or phrases of the prompt that no cell sees, also within a subject's phrase, but for one
            that would have none left; None: English function words, numbers and digits; an empty list hides none.
        refine: replace boxes by masks from clustering.
        refine_start, refine_period: first step with refined masks and steps between rebuilds; None: 15 and 5 of 50, in
            proportion.
        refinement: how masks are found.

    Raises:
        ObjectComposeError: a value out of range.
    """

    guided_steps: int | None = None
    iterations: int = 5
    step_sizes: tuple[float, float] = (8.0, 2.0)
    cross_weight: float = 1.5
    self_weight: float = 0.5
    penalty: Literal["decay", "constant", "none"] = "decay"
    penalty_weights: tuple[float, float, float] = (0.4, 0.1, 0.01)
    stop_below: float = 0.2
    stop_on: Literal["total", "reward"] = "total"
    subjects_in_reward: bool = False
    attention: Literal["both", "self", "cross"] = "both"
    padding: PaddingRule = "open"
    filtered_words: Collection[str] | None = None
    refine: bool = True
    refine_start: int | None = None
    refine_period: int | None = None
    refinement: RefinementOptions = field(default_factory=RefinementOptions)

    def __post_init__(self) -> None:
        for name, least in (("guided_steps", 0), ("iterations", 1), ("refine_start", 0), ("refine_period", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ObjectComposeError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
        for name in ("cross_weight", "self_weight", "stop_below"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ObjectComposeError(f"`{name}` must be finite and at least 0, got {getattr(self, name)!r}.")
        for name, count in (("step_sizes", 2), ("penalty_weights", 3)):
            values = getattr(self, name)
            if len(values) != count or not all(0 <= value < float("inf") for value in values):
                raise ObjectComposeError(f"`{name}` must be {count} finite numbers of at least 0, got {values!r}.")
        choices = {
            "penalty": ("decay", "constant", "none"),
            "stop_on": ("total", "reward"),
            "attention": ("both", "self", "cross"),
            "padding": ("open", "like_end"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ObjectComposeError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        words = self.filtered_words
        is_list = isinstance(words, Collection) and not isinstance(words, str)
        if words is not None and not (is_list and all(isinstance(word, str) and word.strip() for word in words)):
            raise ObjectComposeError(f"`filtered_words` must be a list of words, got {words!r}.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention that are controlled."""
        return ("cross", "self") if self.attention == "both" else (self.attention,)

    def penalty_at(self, step: int, guided_steps: int) -> float:
        """Weight of the penalty at a guided step."""
        if self.penalty == "none":
            return 0.0
        if self.penalty == "constant":
            return self.penalty_weights[0]
        return penalty_weight(schedule_position(step, guided_steps), *self.penalty_weights)


class BoxControlRun:
    """Box control of B pictures in one call.

    Args:
        unet: the model; its layers are read for their kind.
        subjects: per picture its subjects' tokens.
        regions: where they are, in the same order.
        num_keys: positions of the text states.
        layers: what the loss and the refinement read.
        options: see there.
        num_steps: iterations of the call's loop.

    Attributes:
        parts: to install for the whole call; batches are B rows, or `[uncond, cond]` of 2 B.
        losses: per step that was guided the losses of its iterations, `(B,)` each, for inspection.
    """

    def __init__(
        self,
        unet: Any,
        subjects: Sequence[PromptSubjects],
        regions: SubjectRegions,
        num_keys: int,
        layers: ControlLayers,
        options: BoxControlOptions,
        num_steps: int,
    ) -> None:
        self.unet, self.regions, self.options = unet, regions, options
        self.guided_steps = scaled_steps(15, num_steps) if options.guided_steps is None else options.guided_steps
        self.refine_start = scaled_steps(15, num_steps) if options.refine_start is None else options.refine_start
        self.refine_period = scaled_steps(5, num_steps) if options.refine_period is None else options.refine_period
        self.losses: list[list[torch.Tensor]] = []
        self._counts = regions.present.sum(1)  # (B,)
        self._visibility = TokenVisibility(regions, subjects, num_keys, options.padding)
        conditional = slice(-len(subjects), None)  # the last B rows, with and without an unconditional half
        self._cell_mask = RegionKeyMask(regions)
        masks = {"cross": KeyMask(self._visibility, rows=conditional), "self": self._cell_mask}
        self.parts: list[Any] = [masks[kind] for kind in options.kinds]

        # What the loss reads, on the conditional half.
        tokens = [sorted({subject.end_index, *sum(subject.token_indices, ())}) for subject in subjects]
        self._owners = _token_owners(subjects, tokens, regions.boxes.num_regions)
        cross, own = (layers.of_kind(layers.loss, unet, kind) for kind in ("cross", "self"))
        self._loss_probes: dict[str, Any] = {
            "cross": TokenMapProbe(tokens, layers=cross, head_mean=False, rows=conditional),
            "self": RegionMassProbe(regions.boxes, layers=own, head_mean=False, rows=conditional),
        }
        self.last_layers = [*(cross if "cross" in options.kinds else ()), *(own if "self" in options.kinds else ())]

        # What the refinement reads, in denoising passes.
        self._map_probes: list[Any] = []
        self._refiners: list[MaskRefiner | None] = []
        if options.refine:
            cross, own = (layers.of_kind(layers.maps, unet, kind) for kind in ("cross", "self"))
            leading = [list(subject.leading_indices) or [0] for subject in subjects]
            self._map_probes = [
                CellMapProbe(own, rows=conditional),
                TokenMapProbe(leading, layers=cross, rows=conditional),
            ]
            self.parts += self._map_probes
            boxes = regions.boxes.at(layers.map_grid).flatten(2) > 0  # (B, S, n)
            self._refiners = [
                MaskRefiner(row[:count], options.refinement) if count else None
                for row, count in zip(boxes, self._counts.tolist(), strict=True)
            ]
            self._num_map_cells = boxes.shape[2]
            self._map_grid = layers.map_grid

    def before_step(
        self,
        step: int,
        latents: torch.Tensor,
        scale_input: Callable[[torch.Tensor], torch.Tensor],
        forward: Any,
        is_kept: bool = True,
    ) -> torch.Tensor:
        """What happens before the prediction of a step.

        Args:
            step: iteration of the loop, from 0.
            latents: `(B, C, h, w)`, on the scheduler's scale.
            scale_input: latents to what the UNet reads at this step; linear.
            forward: runs the UNet on the conditional half of such an input `(B, C, h, w)`, at least until all of
                `last_layers` have run.
            is_kept: whether the scheduler's step starts from these latents. Where it does not, nothing is guided.

        Returns:
            The latents, moved if the step is guided.

        Raises:
            NonFiniteError: the gradient is not finite.
        """
        if self.options.refine:
            self._take_maps()
            if step >= self.refine_start and (step - self.refine_start) % self.refine_period == 0:
                self._refine()
        if is_kept and step < self.guided_steps:
            self._visibility.mode = "guide"
            try:
                latents = self._guide(step, latents, scale_input, forward)
            finally:
                self._visibility.mode = "denoise"
        return latents

    def _guide(self, step: int, latents: torch.Tensor, scale_input: Callable, forward: Any) -> torch.Tensor:
        options = self.options
        weight = options.penalty_at(step, self.guided_steps)
        size = descent_step_size(step, self.guided_steps, *options.step_sizes)
        if not bool(self._counts.any()):
            return latents
        active = (self._counts > 0).to(latents.device)
        # The UNet reads latents of unit variance whatever the scheduler's scale is, and the step sizes are for these.
        scale = scale_input(torch.ones_like(latents[:1, :1, :1, :1]))
        losses: list[torch.Tensor] = []
        self.losses.append(losses)
        probes = [self._loss_probes[kind] for kind in options.kinds]
        with use_parts(self.unet, probes, outer_probes=False), frozen_parameters([self.unet]):
            for _ in range(options.iterations):
                with torch.enable_grad():
                    model_input = scale_input(latents).detach().requires_grad_()
                    forward(model_input)
                    loss = self._loss(weight)
                    loss.total.sum().backward(inputs=[model_input])
                gradient = model_input.grad
                assert gradient is not None
                for probe in probes:
                    probe.clear()
                moved = latents - (size * gradient / scale).to(latents.dtype)
                latents = torch.where(active[:, None, None, None], moved, latents)
                losses.append(loss.total.detach())
                judged = (loss.total if options.stop_on == "total" else loss.reward).detach()
                active = active & (judged / self._counts.to(judged).clamp_min(1) >= options.stop_below)
                # Both questions at once, since each answer makes the host wait for the device.
                is_finite, goes_on = torch.stack([torch.isfinite(gradient).all(), active.any()]).tolist()
                if not is_finite:
                    raise NonFiniteError(
                        f"the gradient of box control at step {step} is not finite; use a wider dtype or smaller"
                        " `step_sizes`."
                    )
                if not goes_on:
                    break
        return latents

    def _loss(self, weight: float) -> BoxLoss:
        masses = {}
        for kind in self.options.kinds:
            probe = self._loss_probes[kind]
            measured = probe.mass if kind == "self" else subject_token_mass(probe.maps, self._owners)
            masses[kind] = mean_box_masses(measured, self.regions.boxes)
        weights = {"cross": self.options.cross_weight, "self": self.options.self_weight}
        device = next(iter(masses.values()))[0].device
        factor = self._counts[:, None].to(device) if self.options.subjects_in_reward else 1.0
        return box_control_loss(masses, weights, weight, self.regions.present.to(device), factor)

    def _take_maps(self) -> None:
        """Add the maps of the denoising pass that ran last, if one has."""
        cells, tokens = (probe.maps for probe in self._map_probes)
        if cells:
            for row, refiner in enumerate(self._refiners):
                if refiner is not None:
                    count = int(self._counts[row])
                    refiner.add(
                        {name: maps[row] for name, maps in cells.items()},
                        {name: maps[row, :, :count] for name, maps in tokens.items()},
                    )
        for probe in self._map_probes:
            probe.clear()

    def _refine(self) -> None:
        active = self.regions.at_tokens(self._num_map_cells).flatten(2)  # (B, S, n)
        masks = torch.zeros_like(active, device="cpu")
        for row, refiner in enumerate(self._refiners):
            if refiner is not None:
                count = int(self._counts[row])
                masks[row, :count] = refiner.masks(active[row, :count]).to(masks)
        self.regions.refine(masks.unflatten(-1, self._map_grid))
        self._cell_mask.regions = self.regions  # drops what was built from the old ones


def _token_owners(
    subjects: Sequence[PromptSubjects], tokens: Sequence[Sequence[int]], num_subjects: int
) -> torch.Tensor:
    """`(B, T, S)`, 1 where a measured token counts for a subject; the end token counts for all."""
    owners = torch.zeros(len(subjects), max(map(len, tokens)), num_subjects)
    for row, (prompt, measured) in enumerate(zip(subjects, tokens, strict=True)):
        for column, indices in enumerate(prompt.token_indices):
            for index in {prompt.end_index, *indices}:
                owners[row, measured.index(index), column] = 1.0
    return owners
