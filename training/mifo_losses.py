"""The losses with which MIFO learns instances from one picture (arXiv 2511.00542, section 3.2, equations 1 to 5, 16).

One call serves both stages. In the first only the placeholders move: reward, then penalty, on the cross-attention of
the decoder, and only at low noise, where the layout of the noisy latents is still that of the masks (`t < gate`). In
the second the model moves too, with the penalty alone, beside pictures that keep it what it was (prior preservation).
Sampling is joint: each step names some of the instances, in any order, and looks at the union of their masks.

Where the authors' code has a slip we follow the paper: the gate of the second stage asks the instance's own timestep,
not that of the class picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.box_layers import control_layers, layer_levels
from objectcompose.attention_processors.box_loss import subject_token_mass
from objectcompose.attention_processors.install import match_layers, use_parts
from objectcompose.attention_processors.losses import mask_penalty_loss, mask_reward_loss
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.attention_processors.regions import grids_of, rasterize
from objectcompose.errors import ObjectComposeError, PromptTooLongError
from objectcompose.training.caption_encoding import draw_latent
from objectcompose.training.loop import Draw, draw_noise
from objectcompose.training.mifo_scene import InstanceScene
from objectcompose.training.mifo_watch import AttentionWatch
from objectcompose.training.placeholders import Placeholders


@dataclass(frozen=True)
class MIFOLossOptions:
    """What is minimised.

    Attributes:
        reward_steps: n0, steps with the reward; the penalty follows.
        attention_loss: reward, then penalty ("both"), "reward" or "penalty" throughout, or "none".
        reward_weight: of the loss that asks for attention inside the mask.
        penalty_weight: of the loss on attention outside the mask.
        reward_target: lambda_r, attention asked for inside the mask, in [0, 1].
        gate: t0, no attention loss from this timestep on (of 1000).
        reconstruction_weight: of the masked denoising loss.
        reconstruction_mean: over "all" latent cells, as the authors have it, or over the masked ones ("area").
        sampling: "joint", or "separate": one instance alone on grey per step.
        flip_probability: of mirroring the picture; 0 for what has a left and a right.
        prior_weight: of the denoising loss on class pictures; 0 leaves them out.
        mask_resize: of masks to attention grids: by a cell's share ("area"), or "bilinear" as the authors' code.
        latent_mask: of the union mask to latents: a cell's middle pixel ("nearest-exact"), or its first as the
            authors' code ("nearest").

    Raises:
        ObjectComposeError: a value out of range.
    """

    reward_steps: int = 200
    attention_loss: Literal["both", "reward", "penalty", "none"] = "both"
    reward_weight: float = 1e-2
    penalty_weight: float = 2e-2
    reward_target: float = 0.5
    gate: int = 500
    reconstruction_weight: float = 1.0
    reconstruction_mean: Literal["all", "area"] = "all"
    sampling: Literal["joint", "separate"] = "joint"
    flip_probability: float = 0.5
    prior_weight: float = 0.0
    mask_resize: Literal["area", "bilinear"] = "area"
    latent_mask: Literal["nearest-exact", "nearest"] = "nearest-exact"

    def __post_init__(self) -> None:
        choices = {
            "attention_loss": ("both", "reward", "penalty", "none"),
            "reconstruction_mean": ("all", "area"),
            "sampling": ("joint", "separate"),
            "mask_resize": ("area", "bilinear"),
            "latent_mask": ("nearest-exact", "nearest"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ObjectComposeError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in (
            "reward_weight",
            "penalty_weight",
            "reconstruction_weight",
            "prior_weight",
            "reward_steps",
            "gate",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ObjectComposeError(f"`{name}` must be finite and at least 0, got {getattr(self, name)!r}.")
        for name in ("reward_target", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ObjectComposeError(f"`{name}` must be in [0, 1], got {getattr(self, name)!r}.")


def learning_layers(unet: Any, canvas: tuple[int, int], stage: Literal[1, 2]) -> list[str]:
    """The cross-attention layers that a stage supervises, by their grid.

    Stage 1: of the decoder, the level that tells objects apart (16 x 16 cells on Stable Diffusion, see
    `control_layers`) and the next finer one, or the next coarser where there is none. Stage 2: all layers of the
    former, those of the encoder included.
    """
    levels, depth = layer_levels(unet), len(unet.down_blocks)
    map_grid = control_layers(unet, canvas).map_grid
    chosen = grids_of(*canvas, depth).index(map_grid)
    cross = set(match_layers(unet, "", "cross"))
    if stage == 2:
        return [name for name, level in levels.items() if level == chosen and name in cross]
    other = chosen - 1 if chosen > 0 else chosen + 1
    in_decoder = [name for name in levels if name.startswith("up_blocks.") and name in cross]
    return [name for name in in_decoder if levels[name] in (chosen, other)]


class SceneLatents:
    """The VAE's posterior of a scene and of its mirror image, each encoded once.

    Args:
        scene: the picture.
        vae: frozen.
        sampling: see `MIFOLossOptions`; "separate" encodes each instance alone on grey.
    """

    @torch.no_grad()
    def __init__(self, scene: InstanceScene, vae: Any, sampling: str) -> None:
        self.scaling_factor = vae.config.scaling_factor
        self._moments: dict[tuple[int, bool], torch.Tensor] = {}
        for is_flipped in (False, True):
            view = scene.flipped() if is_flipped else scene
            shown = {-1: view} if sampling == "joint" else {n: view.alone(n) for n in range(len(scene.masks))}
            for instance, picture in shown.items():
                pixels = picture.pixels[None].to(vae.device, vae.dtype)
                self._moments[instance, is_flipped] = vae.encode(pixels).latent_dist.parameters[0].float()

    def __call__(self, chosen: Sequence[int], is_flipped: bool) -> torch.Tensor:
        """Mean and logarithm of the variance, `(2 C, h, w)`."""
        return self._moments[(chosen[0] if (chosen[0], is_flipped) in self._moments else -1), is_flipped]


@dataclass(frozen=True)
class _Sample:
    """What one draw decides: which instances, in which order, mirrored or not."""

    chosen: tuple[int, ...]
    is_flipped: bool


class MIFOLosses:
    """Losses of a batch of draws, as `run_loop` wants them; warns where attention is lost (`AttentionWatch`).

    Args:
        unet, text_encoder: of the model, in training or frozen.
        scheduler: a diffusers scheduler with `add_noise`; its `prediction_type` decides the target.
        scene: the picture and its masks.
        latents: of the scene.
        placeholders: one per instance; `placeholders.in_place()` must be in force.
        layers: supervised cross-attention layers.
        options: see there.
        prior: moments of class pictures `(P, 2 C, h, w)` and their prompt, needed for `prior_weight` above 0.
        autocast: makes the context in which the models run.

    Raises:
        ObjectComposeError: another number of placeholders than masks, a scheduler that predicts neither noise nor
            velocity, or no prior pictures where they are wanted.
        PromptTooLongError: all instances together do not fit into a prompt.
    """

    def __init__(
        self,
        unet: Any,
        text_encoder: Any,
        scheduler: Any,
        scene: InstanceScene,
        latents: SceneLatents,
        placeholders: Placeholders,
        layers: Sequence[str],
        options: MIFOLossOptions,
        prior: tuple[torch.Tensor, str] | None = None,
        autocast: Any = nullcontext,
    ) -> None:
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ObjectComposeError(
                f"the scheduler's `prediction_type` must be 'epsilon' or 'v_prediction', got {self.prediction!r}."
            )
        if len(placeholders.names) != len(scene.masks):
            raise ObjectComposeError(
                f"`placeholders` must be one per mask ({len(scene.masks)}), got {len(placeholders.names)}."
            )
        if options.prior_weight and prior is None:
            raise ObjectComposeError(f"`prior_weight` {options.prior_weight} needs class pictures, got none.")
        self.unet, self.text_encoder, self.scheduler = unet, text_encoder, scheduler
        self.scene, self.latents, self.placeholders = scene, latents, placeholders
        self.layers, self.options, self.autocast = list(layers), options, autocast
        self.prior = prior if options.prior_weight else None
        self._masks: dict[tuple[int, int, bool], torch.Tensor] = {}
        check_placeholders_fit(placeholders)
        even_share = placeholders.vectors_per_name / placeholders.tokenizer.model_max_length
        self.watch = AttentionWatch(placeholders.names, even_share)

    def sample(self, draw: Draw) -> _Sample:
        """Which instances a draw shows (equation 16: their number is uniform, then they are)."""
        count, rng = len(self.scene.masks), draw.generator
        number = 1 if self.options.sampling == "separate" else int(torch.randint(1, count + 1, (), generator=rng))
        chosen = tuple(torch.randperm(count, generator=rng)[:number].tolist())
        return _Sample(chosen, bool(torch.rand((), generator=rng) < self.options.flip_probability))

    @contextmanager
    def __call__(self, draws: Sequence[Draw]) -> Iterator[dict[str, torch.Tensor]]:
        """Means over the draws: "loss", "reconstruction", "attention" (weighted), "inside", the mean attention of the
        instances within their masks, which must not go to 0, and "prior"."""
        device = next(self.unet.parameters()).device
        samples = [self.sample(draw) for draw in draws]
        moments = torch.stack([self.latents(sample.chosen, sample.is_flipped) for sample in samples]).to(device)
        prompts = [self.placeholders.prompt(sample.chosen) for sample in samples]
        if self.prior is not None:  # the class pictures come first in the batch
            picked = [int(torch.randint(len(self.prior[0]), (), generator=draw.generator)) for draw in draws]
            moments = torch.cat([self.prior[0][picked].to(moments), moments])
            prompts = [self.prior[1]] * len(draws) + prompts
        own = slice(-len(draws), None)
        clean, noise, noisy, timesteps = self._noisy(draws, moments)
        ids = self._ids(prompts).to(device)
        tokens = [
            self.placeholders.positions(row.tolist(), s.chosen) for row, s in zip(ids[own], samples, strict=True)
        ]
        probe = TokenMapProbe([sum(row, []) for row in tokens], self.layers, rows=own)
        probes = [] if self.options.attention_loss == "none" else [probe]
        with use_parts(self.unet, probes):
            with self.autocast():
                text = self.text_encoder(ids)[0]
                predicted = self.unet(noisy, timesteps, text, return_dict=False)[0].float()
            target = noise if self.prediction == "epsilon" else self.scheduler.get_velocity(clean, noise, timesteps)
            found = {"reconstruction": self._reconstruction(predicted[own], target[own], samples)}
            total = self.options.reconstruction_weight * found["reconstruction"]
            if self.prior is not None:
                found["prior"] = F.mse_loss(predicted[: len(draws)], target[: len(draws)])
                total = total + self.options.prior_weight * found["prior"]
            if probes:
                probe.hold()  # the backward pass may run the blocks again
                attention, found["inside"] = self._attention(draws, samples, tokens, probe.maps, timesteps[own])
                found["attention"] = attention
                total = total + attention
            yield {"loss": total, **found}
        probe.clear()

    def _noisy(self, draws: Sequence[Draw], moments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Clean latents, noise, noisy latents and timesteps, each row from its own draw."""
        repeated = [draw for draw in draws for _ in range(len(moments) // len(draws))]
        order = torch.arange(len(moments)).reshape(len(draws), -1).T.flatten()  # class rows, then instance rows
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        steps = range(self.scheduler.config.num_train_timesteps)
        posterior, noise, timesteps = (x[order] for x in draw_noise(repeated, shape, steps, moments.device))
        clean = draw_latent(moments, posterior, self.latents.scaling_factor)
        return clean, noise, self.scheduler.add_noise(clean, noise, timesteps), timesteps

    def _ids(self, prompts: Sequence[str]) -> torch.Tensor:
        tokenizer = self.placeholders.tokenizer
        return tokenizer(
            list(prompts), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids

    def _reconstruction(
        self, predicted: torch.Tensor, target: torch.Tensor, samples: Sequence[_Sample]
    ) -> torch.Tensor:
        masks = torch.stack([self._union(sample, predicted.shape[-2:]) for sample in samples]).to(predicted)
        squared = (predicted * masks[:, None] - target * masks[:, None]) ** 2
        if self.options.reconstruction_mean == "all":
            return squared.mean()
        return (squared.flatten(1).sum(1) / (masks.flatten(1).sum(1) * predicted.shape[1]).clamp_min(1)).mean()

    def _union(self, sample: _Sample, grid: Sequence[int]) -> torch.Tensor:
        """The chosen instances' masks together, at the latents' size, `(h, w)`."""
        masks = self.scene.flipped().masks if sample.is_flipped else self.scene.masks
        union = masks[list(sample.chosen)].amax(0)
        return F.interpolate(union[None, None], size=tuple(grid), mode=self.options.latent_mask)[0, 0]

    def _attention(
        self,
        draws: Sequence[Draw],
        samples: Sequence[_Sample],
        tokens: Sequence[Sequence[Sequence[int]]],
        maps: dict[str, torch.Tensor],
        timesteps: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted attention loss, and the mean attention inside of the masks."""
        options, device = self.options, timesteps.device
        widest = max(len(sample.chosen) for sample in samples)
        owners = torch.zeros(len(samples), max(sum(map(len, row)) for row in tokens), widest, device=device)
        present = torch.zeros(len(samples), widest, device=device)
        for row, positions in enumerate(tokens):
            column = 0
            for instance, own in enumerate(positions):  # the tokens of an instance lie side by side in the maps
                owners[row, column : column + len(own), instance] = 1
                present[row, instance], column = 1, column + len(own)
        with_heads = {name: layer[:, None] for name, layer in maps.items()}
        by_instance = {name: x[:, 0] for name, x in subject_token_mass(with_heads, owners).items()}
        masks = {
            n: self._grid_masks(samples, n, widest).to(device) for n in {x.shape[1] for x in by_instance.values()}
        }
        shares = _shares_inside(by_instance, masks).detach()

        steps = torch.tensor([draw.step for draw in draws], device=device)
        is_reward = {"reward": steps >= 0, "penalty": steps < 0}.get(
            options.attention_loss, steps < options.reward_steps
        )
        counted = present * (timesteps < options.gate)[:, None]
        self._watch(samples, shares.tolist(), counted.tolist())
        reward = mask_reward_loss(by_instance, masks, options.reward_target, counted * is_reward[:, None])
        penalty = mask_penalty_loss(by_instance, masks, counted * ~is_reward[:, None])
        inside = (shares * present).sum() / present.sum()
        return options.reward_weight * reward + options.penalty_weight * penalty, inside

    def _watch(
        self, samples: Sequence[_Sample], shares: Sequence[Sequence[float]], counted: Sequence[Sequence[float]]
    ) -> None:
        for sample, row, is_counted in zip(samples, shares, counted, strict=True):
            for column, instance in enumerate(sample.chosen):
                if is_counted[column]:
                    self.watch.add(instance, row[column])

    def _grid_masks(self, samples: Sequence[_Sample], num_tokens: int, widest: int) -> torch.Tensor:
        """The chosen instances' masks on a layer's grid, in their order, `(B, widest, h, w)`."""
        rows = []
        for sample in samples:
            row = [self._grid_mask(instance, num_tokens, sample.is_flipped) for instance in sample.chosen]
            rows.append(torch.stack(row + [torch.zeros_like(row[0])] * (widest - len(row))))
        return torch.stack(rows)

    def _grid_mask(self, instance: int, num_tokens: int, is_flipped: bool) -> torch.Tensor:
        key = (instance, num_tokens, is_flipped)
        if key not in self._masks:
            side = round(num_tokens**0.5)  # scenes are square
            mask = (self.scene.flipped() if is_flipped else self.scene).masks[instance]
            if self.options.mask_resize == "bilinear":
                grid = F.interpolate(mask[None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
            else:
                grid = rasterize(mask, (side, side), "area")
            self._masks[key] = grid
        return self._masks[key]


def _shares_inside(maps: dict[str, torch.Tensor], masks: dict[int, torch.Tensor]) -> torch.Tensor:
    """Attention of each instance within its mask, mean over cells and layers, `(B, N)`."""
    shares = []
    for columns in maps.values():
        mask = masks[columns.shape[1]].flatten(2).transpose(1, 2).to(columns)  # (B, HW, N)
        shares.append((columns * mask).sum(1) / mask.sum(1).clamp_min(1e-6))
    return torch.stack(shares).mean(0)


def check_placeholders_fit(placeholders: Placeholders) -> None:
    """Raise unless a prompt with all instances fits into the text encoder.

    Raises:
        PromptTooLongError: there are too many instances, or vectors of each.
    """
    tokenizer = placeholders.tokenizer
    prompt = placeholders.prompt(range(len(placeholders.names)))
    length, limit = len(tokenizer(prompt, truncation=False, verbose=False).input_ids), tokenizer.model_max_length
    if length > limit:
        raise PromptTooLongError(
            f"`masks` must be so few that a prompt with all placeholders has at most {limit} tokens, got {length} for"
            f" {len(placeholders.names)} instances of {placeholders.vectors_per_name} vectors."
        )
