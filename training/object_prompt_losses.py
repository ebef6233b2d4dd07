"""ObjectPrompt's training loss: plain denoising with object pictures beside the text (arXiv 2501.01424, section 3.3).

What a step leaves out of its conditions is drawn per sample: object pictures, text, or both (as IP-Adapter does, for
guidance at inference), single objects (so that a scene may show more than its prompts), order and view of the objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.install import use_parts
from objectcompose.errors import ObjectComposeError
from objectcompose.pipelines.object_prompts import ObjectPromptBranch, pack_tokens
from objectcompose.pipelines.reference_images import null_features
from objectcompose.training.caption_encoding import CaptionEncoder, encode_caption
from objectcompose.training.denoising import denoising_task
from objectcompose.training.loop import Draw
from objectcompose.training.object_prompt_data import ObjectFeatures


#: What is trained first after a warm start: all that keys are made of. The value side speaks the right language then.
KEY_SIDE = ("layout_adapter.", "projections.key_maps.")


@dataclass(frozen=True)
class ConditionOptions:
    """What a step leaves out, as chances per sample, or per object where it says so.

    Attributes:
        drop_image: of training with the null picture and the text.
        drop_text: of training with the object pictures and empty text.
        drop_both: of training with neither.
        drop_object: of leaving out an object, for each by itself; the only one, or the last one left, stays.
        background_share: of a background prompt, the scene without its objects.

    Raises:
        ObjectComposeError: a chance is outside [0, 1], or the first three sum to more than 1.
    """

    drop_image: float = 0.05
    drop_text: float = 0.05
    drop_both: float = 0.05
    drop_object: float = 0.10
    background_share: float = 0.3

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not 0 <= getattr(self, name) <= 1:
                raise ObjectComposeError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if self.drop_image + self.drop_text + self.drop_both > 1:
            raise ObjectComposeError(
                "`drop_image`, `drop_text` and `drop_both` must sum to at most 1, got"
                f" {self.drop_image} + {self.drop_text} + {self.drop_both}."
            )


@dataclass(frozen=True)
class SampleConditions:
    """What one sample of a step is painted from.

    Attributes:
        has_text: False stands for the empty prompt.
        objects: (number, view) of the objects that are prompts, in their order; empty stands for the null picture.
        has_background: whether a background prompt follows the objects.
    """

    has_text: bool
    objects: tuple[tuple[int, int], ...]
    has_background: bool


def draw_conditions(generator: torch.Generator, count: int, views: int, options: ConditionOptions) -> SampleConditions:
    """Draw what a sample is painted from.

    Args:
        generator: of the sample; it moves on by the same number of draws for any outcome.
        count: objects of the scene; with none the null picture stands for them.
        views: of each object.
        options: the chances.
    """
    what, background = torch.rand(2, generator=generator).tolist()
    order = torch.randperm(count, generator=generator).tolist()
    of_object = torch.randint(views, (count,), generator=generator).tolist()
    is_kept = (torch.rand(count, generator=generator) >= options.drop_object).tolist()
    no_image = options.drop_image
    no_text = no_image + options.drop_text
    neither = no_text + options.drop_both
    has_images = bool(count) and (no_image <= what < no_text or what >= neither)
    kept = [number for number in order if is_kept[number] or count == 1] or order[:1]
    return SampleConditions(
        has_text=what < no_image or what >= neither,
        objects=tuple((number, of_object[number]) for number in kept) if has_images else (),
        has_background=has_images and background < options.background_share,
    )


class ObjectPromptLosses:
    """The loss of a batch of draws, as `run_loop` wants it.

    Args:
        unet: the base's, frozen.
        adapter: in training.
        scheduler: a diffusers scheduler with `add_noise`.
        encoder: encoded captions by number.
        features: of the object pictures of the same scenes.
        scaling_factor: of the latents.
        options: what is left out.
        key_side_steps: for so many steps from the start only `KEY_SIDE` is trained.
        autocast: makes the context in which adapter and UNet run, such as `accelerator.autocast`; the loss is float32.
    """

    def __init__(
        self,
        unet: Any,
        adapter: Any,
        scheduler: Any,
        encoder: CaptionEncoder,
        features: ObjectFeatures,
        scaling_factor: float,
        options: ConditionOptions,
        key_side_steps: int = 0,
        autocast: Any = nullcontext,
    ) -> None:
        self.unet, self.adapter, self.scheduler = unet, adapter, scheduler
        self.encoder, self.features, self.scaling_factor = encoder, features, scaling_factor
        self.options, self.key_side_steps, self.autocast = options, key_side_steps, autocast
        self.empty_text = encode_caption(encoder.tokenizer, encoder.text_encoder, "")
        with torch.no_grad():  # the tokens of the null picture change while its features do not
            null = null_features(features.image_encoder)
        self.null = null.embeds.float(), null.grid.float()

    @contextmanager
    def __call__(self, draws: Sequence[Draw]) -> Iterator[dict[str, torch.Tensor]]:
        """Means over the draws: "loss", "objects" (object prompts per sample) and "dropped_text" (share)."""
        self._choose_trained(draws[0].step)
        device = next(self.unet.parameters()).device
        samples = [self.encoder[draw.index] for draw in draws]
        conditions = [
            draw_conditions(draw.generator, self.features.scenes.count(draw.index), self.features.views, self.options)
            for draw in draws
        ]
        moments = torch.stack([sample.moments for sample in samples]).to(device)
        task = denoising_task(draws, moments, self.scheduler, self.scaling_factor)
        text = torch.stack(
            [one.text if shown.has_text else self.empty_text for one, shown in zip(samples, conditions, strict=True)]
        ).to(device)
        with self.autocast():
            branch = self._branch([draw.index for draw in draws], conditions, device)
        counts = torch.tensor([float(len(shown.objects)) for shown in conditions], device=device)
        dropped = torch.tensor([float(not shown.has_text) for shown in conditions], device=device)
        with use_parts(self.unet, [branch.part]):
            with self.autocast():
                prediction = self.unet(task.noisy, task.timesteps, text, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), task.target)
            yield {"loss": loss, "objects": counts.mean(), "dropped_text": dropped.mean()}

    def _branch(
        self, indices: Sequence[int], conditions: Sequence[SampleConditions], device: torch.device
    ) -> ObjectPromptBranch:
        """The branch of a batch, made as at inference; scenes without object prompts hold the null object."""
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        slots: list[list[int]] = []
        for index, shown in zip(indices, conditions, strict=True):
            pairs = [self.features.of_object(index, number, view) for number, view in shown.objects]
            pairs += [self.features.of_background(index)] * shown.has_background
            slots.append([*range(len(found), len(found) + len(pairs))])
            found += pairs
        embeds, grid = (
            torch.cat([*(pair[side][None].to(device) for pair in found), self.null[side]]) for side in (0, 1)
        )
        key_tokens, value_tokens = self.adapter.object_tokens(embeds, grid)
        null_place = len(found)
        rows = [[(place, 1.0) for place in row or [null_place]] for row in slots]
        null_tokens = key_tokens[null_place:], value_tokens[null_place:]
        return ObjectPromptBranch(self.adapter, pack_tokens(key_tokens, value_tokens, null_tokens, rows), {})

    def _choose_trained(self, step: int) -> None:
        """After a warm start the first steps leave the value side alone."""
        for name, parameter in self.adapter.named_parameters():
            parameter.requires_grad_(step >= self.key_side_steps or name.startswith(KEY_SIDE))
