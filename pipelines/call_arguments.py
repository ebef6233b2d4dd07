"""The arguments that the calls of all pipelines share, and what a running call keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch


_Call = TypeVar("_Call", bound=Callable[..., Any])
_REFERENCE_TO_SHARED = "All other arguments are those of `CallArguments`."


@dataclass(frozen=True, eq=False)
class CallArguments:
    """The arguments that the call of every pipeline takes.

    Attributes:
        prompt: one prompt or a list of B prompts; None with `prompt_embeds`.
        height: of the pictures, in pixels; a multiple of 8. Default: the given latents' size, else the UNet's.
        width: as `height`.
        num_inference_steps: number of denoising steps.
        timesteps: custom timesteps, descending, instead of `num_inference_steps`, for schedulers that take them.
        sigmas: custom noise levels, likewise.
        guidance_scale: strength of classifier-free guidance; up to 1 there is none, nor a `negative_prompt`.
        negative_prompt: what to steer away from; one text for all prompts or one each.
        num_images_per_prompt: pictures per prompt (n).
        eta: DDIM's noise share in [0, 1]; schedulers without it ignore it.
        generator: source of noise; one for all pictures or a list of B * n.
        latents: noise from N(0, 1), shape `(B * n, C, height / f, width / f)`, f the VAE's factor.
        prompt_embeds: encoded prompts `(B, L, C)` instead of `prompt`.
        negative_prompt_embeds: encoded negative prompts, same shape.
        ip_adapter_image: one picture (or list) per loaded IP-Adapter.
        ip_adapter_image_embeds: its embeddings instead, one tensor per IP-Adapter, negative rows first.
        output_type: "pil", "np", "pt" or "latent"; see `ComposeOutput.images`.
        return_dict: return the output as a dataclass, or as the tuple of its fields.
        cross_attention_kwargs: reach the attention processors; `{"scale": x}` is the strength of LoRA.
        guidance_rescale: how far the contrast that guidance adds is taken back: 0 not, 1 wholly (arXiv:2305.08891).
        clip_skip: how many of the text encoder's last layers to skip.
        callback_on_step_end: called as `callback(pipeline, step, timestep, callback_kwargs)` after each step; may
            return a dict of tensors that replace the loop's.
        callback_on_step_end_tensor_inputs: which tensors `callback_kwargs` holds, of "latents", "prompt_embeds" and
            "negative_prompt_embeds"; None: none.
        parts: attention parts of other methods, installed while the loop runs and removed after it.
        return_attention: return a map for each object's phrase.
        attention_layers: cross-attention layers to average over: a regex or a list of names. Default: the middle and
            the decoder.
        attention_steps: iterations of the loop to average over, from 0, as callbacks count them. Default: all.
    """

    prompt: str | list[str] | None
    height: int
    width: int
    num_inference_steps: int
    timesteps: list[int] | None
    sigmas: list[float] | None
    guidance_scale: float
    negative_prompt: str | list[str] | None
    num_images_per_prompt: int
    eta: float
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    ip_adapter_image: Any
    ip_adapter_image_embeds: list[torch.Tensor] | None
    output_type: str
    return_dict: bool
    cross_attention_kwargs: dict[str, Any] | None
    guidance_rescale: float
    clip_skip: int | None
    callback_on_step_end: Callable | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    parts: Sequence[Any]
    return_attention: bool
    attention_layers: str | Sequence[str] | None
    attention_steps: Sequence[int] | None

    @property
    def lora_scale(self) -> float | None:
        """Strength of LoRA layers, for the text encoder."""
        return None if self.cross_attention_kwargs is None else self.cross_attention_kwargs.get("scale")


def describes_shared_arguments(call: _Call) -> _Call:
    """Complete the docstring of a pipeline's `__call__`, so that `help` names all of its arguments.

    What `CallArguments` says of the shared ones takes the place of the sentence that refers to it. Without docstrings
    (`python -OO`) there is nothing to complete.
    """
    if call.__doc__ is not None:
        own, found, rest = inspect.cleandoc(call.__doc__).partition(f"\n\n{_REFERENCE_TO_SHARED}\n")
        assert found, f"{call} must refer to the shared arguments"
        shared = inspect.cleandoc(CallArguments.__doc__ or "").partition("Attributes:\n")[2]
        call.__doc__ = f"{own}\n{shared}\n{rest}"
    return call


@dataclass(eq=False)
class SamplingState:
    """What a running call has prepared and what its loop changes.

    Attributes:
        device: where the call runs.
        schedule: the scheduler's timesteps; one iteration of the loop each.
        num_inference_steps: steps they stand for, for the progress bar.
        prompt_embeds: encoded prompts, `(2 * M, L, C)` as [uncond, cond] under guidance, else `(M, L, C)`; M pictures.
        negative_prompt_embeds: the unconditional half, or None.
        latents: `(M, C, h, w)`, on the scheduler's scale.
        added_cond_kwargs: IP-Adapter's embeddings for the UNet, or None.
        timestep_cond: the guidance scale as a condition of distilled UNets, or None.
        extra_step_kwargs: of the scheduler's `step`.
        is_compiled: whether the UNet is; its parts are prepared before each pass then.
    """

    device: torch.device
    schedule: torch.Tensor
    num_inference_steps: int
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    latents: torch.Tensor
    added_cond_kwargs: dict[str, Any] | None
    timestep_cond: torch.Tensor | None
    extra_step_kwargs: dict[str, Any]
    is_compiled: bool
