"""Separate-and-Enhance's training losses on drawn prompts (arXiv 2312.06712).

`loss = sep_weight * L_Sep + enhance_weight * L_En + norm_weight * L_norm`. No pictures are needed: latents are noise,
and the normalisation term holds the prediction for single concepts to that of the frozen model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.early_exit import run_until
from objectcompose.attention_processors.install import match_layers, use_parts
from objectcompose.attention_processors.losses import enhance_loss, mean_object_maps, separate_loss
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.pipelines.token_utils import find_phrases
from objectcompose.toybox.scenes import with_article
from objectcompose.training.loop import Draw, check_loss_weights, draw_noise


#: Standard deviation of Stable Diffusion's unscaled latents, inverted: the authors scale noise by it.
GAUSSIAN_SCALE = 0.18215


@dataclass(frozen=True)
class SeparateEnhanceOptions:
    """The losses and what they see.

    Attributes:
        sep_weight: of the overlap of objects' maps (`separate_loss`).
        enhance_weight: of the weakest object's loss (`enhance_loss`).
        norm_weight: of the distance to the frozen model's prediction; 0 leaves that forward out.
        head_mode: maxima over heads and cells ("per_head"), or over the "mean" of the heads.
        sep_reduce: of three and more objects the worst pair ("pairwise"), or all at once ("joint").
        sep_pixel: overlap in the worst cell ("max"), or over all cells ("soft_iou").
        sigma: smoothing of the maps for `enhance_loss`, in cells.
        objects: concepts in one prompt, at least 2.
        latent_source: clean latents are noise of standard deviation 0.18215 ("gaussian_scaled", the authors' code) or
            1 ("gaussian_unit").
        min_timestep, max_timestep: bounds of the uniform timesteps, the upper one exclusive; None is all.

    Raises:
        ObjectComposeError: a number is out of range or an option unknown.
    """

    sep_weight: float = 1.0
    enhance_weight: float = 0.5
    norm_weight: float = 0.0
    head_mode: Literal["per_head", "mean"] = "per_head"
    sep_reduce: Literal["pairwise", "joint"] = "pairwise"
    sep_pixel: Literal["max", "soft_iou"] = "max"
    sigma: float = 0.5
    objects: int = 2
    latent_source: Literal["gaussian_scaled", "gaussian_unit"] = "gaussian_scaled"
    min_timestep: int = 0
    max_timestep: int | None = None

    def __post_init__(self) -> None:
        check_loss_weights(
            sep_weight=self.sep_weight, enhance_weight=self.enhance_weight, norm_weight=self.norm_weight
        )
        if self.objects < 2:
            raise ObjectComposeError(f"`objects` must be at least 2, got {self.objects}.")
        if not 0 < self.sigma < float("inf"):
            raise ObjectComposeError(f"`sigma` must be finite and above 0, got {self.sigma}.")
        if self.min_timestep < 0 or (self.max_timestep is not None and self.max_timestep <= self.min_timestep):
            raise ObjectComposeError(
                "`min_timestep` must be at least 0 and below `max_timestep`, got"
                f" {self.min_timestep} and {self.max_timestep}."
            )
        if self.head_mode not in ("per_head", "mean"):
            raise ObjectComposeError(f'`head_mode` must be "per_head" or "mean", got {self.head_mode!r}.')
        if self.latent_source not in ("gaussian_scaled", "gaussian_unit"):
            raise ObjectComposeError(
                f'`latent_source` must be "gaussian_scaled" or "gaussian_unit", got {self.latent_source!r}.'
            )


@dataclass(frozen=True)
class ConceptPrompt:
    """A prompt.

    Attributes:
        text: the prompt.
        concepts: in its order.
        chosen: which of them alone is the prompt of the normalisation term.
    """

    text: str
    concepts: tuple[str, ...]
    chosen: int = 0

    @property
    def single(self) -> str:
        """Prompt of the chosen concept."""
        return f"a photo of {with_article(self.concepts[self.chosen])}"


def draw_prompt(concepts: Sequence[str], first: int, objects: int, generator: torch.Generator) -> ConceptPrompt:
    """A prompt of different concepts, joined by "and" or "with"; of just as many as `objects`, always the same text.

    Args:
        concepts: all of them.
        first: number of the chosen concept, which comes first where the text is drawn.
        objects: concepts in the prompt.
        generator: draws the others and the connective.
    """
    if len(concepts) == objects:
        return ConceptPrompt("a photo of " + " and ".join(map(with_article, concepts)), tuple(concepts), first)
    others = [number for number in torch.randperm(len(concepts), generator=generator).tolist() if number != first]
    chosen = [concepts[number] for number in (first, *others)][:objects]
    connective = (" and ", " with ")[int(torch.randint(0, 2, (), generator=generator))]
    return ConceptPrompt("a photo of " + connective.join(with_article(name) for name in chosen), tuple(chosen))


@torch.no_grad()
def layers_of_grid(unet: Any, latent_shape: tuple[int, int, int], text_length: int, cells: int) -> list[str]:
    """Cross-attention layers whose grid has so many cells, found by one forward.

    Args:
        unet: a UNet.
        latent_shape: (C, h, w).
        text_length: tokens of a prompt.
        cells: h * w of the grid.

    Raises:
        ObjectComposeError: there is none; the message lists the grids that there are.
    """
    parameter = next(unet.parameters())
    probe = TokenMapProbe([0])
    states = torch.zeros(1, text_length, unet.config.cross_attention_dim, device=parameter.device)
    latents = torch.zeros(1, *latent_shape, device=parameter.device)
    with use_parts(unet, [probe]):
        unet(latents.to(parameter.dtype), 0, states.to(parameter.dtype))
    sizes = {name: maps.shape[1] for name, maps in probe.maps.items()}
    found = [name for name in match_layers(unet, r"attn2$", "cross") if sizes[name] == cells]
    if not found:
        raise ObjectComposeError(
            f"`attention_grid` of {cells} cells does not exist in this UNet; its grids have"
            f" {', '.join(map(str, sorted(set(sizes.values()))))} cells."
        )
    return found


def _timesteps_of(options: SeparateEnhanceOptions, scheduler: Any) -> range:
    last = scheduler.config.num_train_timesteps
    timesteps = range(options.min_timestep, last if options.max_timestep is None else options.max_timestep)
    if not timesteps or timesteps.stop > last:
        raise ObjectComposeError(
            f"`min_timestep` and `max_timestep` must lie in the scheduler's {last} timesteps, got"
            f" {options.min_timestep} and {options.max_timestep}."
        )
    return timesteps


class SeparateEnhanceLosses:
    """Losses of a batch of draws, as `run_loop` wants them; a draw's index is the prompt's chosen concept.

    Args:
        unet: the UNet; only `trained` of it changes.
        trained: the trained parameters, whose values now are the frozen reference.
        scheduler: with `add_noise`.
        tokenizer: of the base.
        encode_prompt: prompt to text states (L, D).
        concepts: nouns.
        latent_shape: (C, h, w).
        attention_grid: (h, w) of the maps: 16 x 16 for Stable Diffusion 1.x, a quarter of the latent's sides.
        options: of the losses.
        autocast: makes the context in which the UNet runs.

    Raises:
        LayoutError: fewer concepts than `options.objects`, or one twice.
        PhraseNotFoundError: a concept that the tokenizer does not find again in its own prompt.
        ObjectComposeError: no layer has that grid, or the scheduler has fewer timesteps than the options name.
    """

    def __init__(
        self,
        unet: Any,
        trained: Mapping[str, torch.nn.Parameter],
        scheduler: Any,
        tokenizer: Any,
        encode_prompt: Callable[[str], torch.Tensor],
        concepts: Sequence[str],
        latent_shape: tuple[int, int, int],
        attention_grid: tuple[int, int],
        options: SeparateEnhanceOptions,
        autocast: Any = nullcontext,
    ) -> None:
        if len(set(concepts)) != len(concepts) or len(concepts) < options.objects:
            raise LayoutError(
                f"`concepts` must be at least {options.objects} different nouns, got {', '.join(concepts) or 'none'}."
            )
        self.unet, self.trained, self.scheduler, self.tokenizer = unet, dict(trained), scheduler, tokenizer
        self.concepts, self.latent_shape, self.grid = list(concepts), latent_shape, attention_grid
        self.timesteps = _timesteps_of(options, scheduler)
        self.supervised_tokens()  # raises before any step
        self.options, self.autocast = options, autocast
        self._encode, self._states = encode_prompt, dict[str, torch.Tensor]()
        self._frozen = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        text_length = self._text("a photo").shape[0]
        self.layers = layers_of_grid(unet, latent_shape, text_length, attention_grid[0] * attention_grid[1])

    def supervised_tokens(self) -> dict[str, list[str]]:
        """The tokens of each concept in a prompt, as the text encoder reads them."""
        found = {}
        for concept in self.concepts:
            prompt = ConceptPrompt("", (concept,)).single
            ids = self.tokenizer(prompt).input_ids
            places = find_phrases(self.tokenizer, prompt, [concept])[0]
            found[concept] = self.tokenizer.convert_ids_to_tokens([ids[place] for place in places])
        return found

    @contextmanager
    def __call__(self, draws: Sequence[Draw]) -> Iterator[dict[str, torch.Tensor]]:
        """Means over the draws: "loss", "separate", "enhance", "norm"."""
        options, device = self.options, next(self.unet.parameters()).device
        prompts = [draw_prompt(self.concepts, draw.index, options.objects, draw.generator) for draw in draws]
        noisy, timesteps = self._noisy_latents(draws, device)
        places = [find_phrases(self.tokenizer, prompt.text, prompt.concepts) for prompt in prompts]
        rows = [[position for noun in row for position in noun] for row in places]
        owners = torch.zeros(len(rows), max(map(len, rows)), options.objects, device=device)
        for number, row in enumerate(places):
            owner_of_token = [noun for noun, positions in enumerate(row) for _ in positions]
            owners[number, torch.arange(len(owner_of_token)), owner_of_token] = 1
        losses, target, singles = {}, None, None
        if options.norm_weight:
            singles = torch.stack([self._text(prompt.single) for prompt in prompts]).to(device)
            target = self._frozen_prediction(noisy, timesteps, singles)
        probe = TokenMapProbe(rows, self.layers, head_mean=options.head_mode == "mean")
        with use_parts(self.unet, [probe]):
            text = torch.stack([self._text(prompt.text) for prompt in prompts]).to(device)
            with self.autocast():
                run_until(self.unet, self.layers, noisy, timesteps, text)
            probe.hold()  # the backward pass may run the blocks again
            maps = mean_object_maps(probe.maps, owners)
            losses["separate"] = separate_loss(maps, options.sep_reduce, options.sep_pixel)
            losses["enhance"] = enhance_loss(maps, self.grid, options.sigma)
            total = options.sep_weight * losses["separate"] + options.enhance_weight * losses["enhance"]
            if target is not None:
                # with the parts in place, since checkpointed blocks are computed again with them in place
                with self.autocast():
                    prediction = self.unet(noisy, timesteps, singles, return_dict=False)[0]
                losses["norm"] = F.mse_loss(prediction.float(), target.float())
                total = total + options.norm_weight * losses["norm"]
            yield {"loss": total, **losses}
        probe.clear()

    def _noisy_latents(self, draws: Sequence[Draw], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        options = self.options
        scale = GAUSSIAN_SCALE if options.latent_source == "gaussian_scaled" else 1.0
        clean, noise, steps = draw_noise(draws, self.latent_shape, self.timesteps, device)
        return self.scheduler.add_noise(clean * scale, noise, steps), steps

    def _text(self, prompt: str) -> torch.Tensor:
        """Text states, kept: a run has few prompts or short ones."""
        if prompt not in self._states:
            self._states[prompt] = self._encode(prompt)
        return self._states[prompt]

    def _frozen_prediction(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """What the model predicted before training: it differs in the trained tensors only, which are swapped."""
        trained = {name: parameter.data for name, parameter in self.trained.items()}
        try:
            for name, parameter in self.trained.items():
                parameter.data = self._frozen[name]
            with torch.no_grad(), self.autocast():
                return self.unet(noisy, timesteps, text, return_dict=False)[0]
        finally:
            for name, parameter in self.trained.items():
                parameter.data = trained[name]
