"""Checks of a pipeline call's arguments, run before any model does.

Plain functions, one per group of arguments, so that each pipeline's `check_inputs` reads as a list. Every
message names the argument, the rule and the value. All errors are `ObjectComposeError`, hence `ValueError`, as
diffusers users expect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from objectcompose.errors import CheckpointError, ImageInputError, LayoutError, NonFiniteError, ObjectComposeError
from objectcompose.pipelines.steps import accepts_argument


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_checkpoint(vae: Any, text_encoder: Any, unet: Any) -> None:
    """Raise `CheckpointError` unless the components fit together as in Stable Diffusion 1.x/2.x; None is left out."""
    if unet is None:
        return
    config = unet.config
    if config.addition_embed_type is not None:
        raise CheckpointError(
            "`unet` must be of the Stable Diffusion 1.x/2.x layout, got one that also wants"
            f" {config.addition_embed_type!r} embeddings, as SDXL's does."
        )
    if vae is not None and config.in_channels != vae.config.latent_channels:
        raise CheckpointError(
            f"`unet` must read the {vae.config.latent_channels} latent channels of `vae`, got one that reads"
            f" {config.in_channels} (a checkpoint for inpainting or depth?)."
        )
    width = config.cross_attention_dim
    if text_encoder is None or not isinstance(width, int) or config.encoder_hid_dim is not None:
        return
    if text_encoder.config.hidden_size != width:
        raise CheckpointError(
            f"`unet` must read text of width {text_encoder.config.hidden_size}, which `text_encoder` writes, got one"
            f" that reads {width}: they are of different checkpoints."
        )


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raise unless `value` is a whole number of at least `minimum` (booleans do not count)."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ObjectComposeError(f"`{name}` must be a whole number of at least {minimum}, got {value!r}.")


def check_number(name: str, value: Any, minimum: float | None = None) -> None:
    """Raise unless `value` is a finite number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ObjectComposeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise NonFiniteError(f"`{name}` must be finite, got {value!r}.")
    if minimum is not None and value < minimum:
        raise ObjectComposeError(f"`{name}` must be at least {minimum}, got {value!r}.")


def check_switch(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ObjectComposeError(f"`{name}` must be True or False, got {value!r}.")


def check_picture_size(height: int, width: int, vae_scale_factor: int) -> None:
    """Raise unless both sides are multiples of 8 and of the VAE's factor."""
    multiple = math.lcm(8, vae_scale_factor)
    for name, value in (("height", height), ("width", width)):
        check_count(name, value)
        if value % multiple:
            raise ObjectComposeError(f"`{name}` must be divisible by {multiple}, got {value}.")


def check_output_type(output_type: Any, vae: Any) -> None:
    """Raise unless `output_type` is one of `OUTPUT_TYPES`, and there is a VAE for all but "latent"."""
    if output_type not in OUTPUT_TYPES:
        raise ObjectComposeError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
    if vae is None and output_type != "latent":
        raise CheckpointError(f'`vae` is needed for `output_type` {output_type!r}, got None; "latent" does without.')


def check_object_count(rows: Sequence[Sequence[Any]], maximum: int) -> None:
    """Raise `LayoutError` unless each prompt has at most `maximum` objects."""
    largest = max(map(len, rows))
    if largest > maximum:
        raise LayoutError(f"`objects` must hold at most {maximum} objects per prompt, got {largest}.")


def check_embeds(name: str, embeds: Any, unet: Any) -> None:
    """Raise unless `embeds` is a finite tensor `(B, L, C)` whose C is the width of the UNet's cross-attention."""
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3:
        found = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise ObjectComposeError(f"`{name}` must be a tensor of shape (batch, tokens, width), got {found}.")
    width = unet.config.cross_attention_dim
    if isinstance(width, int) and unet.config.encoder_hid_dim is None and embeds.shape[-1] != width:
        raise ObjectComposeError(f"`{name}` must have width {width}, as the UNet expects, got {embeds.shape[-1]}.")
    if not torch.isfinite(embeds).all():
        raise NonFiniteError(f"`{name}` holds NaN or infinite values.")


def check_call_text(name: str, text: Any) -> None:
    """Raise unless `text` is a string or a non-empty list of strings."""
    if isinstance(text, str):
        return
    if not isinstance(text, list) or not text or not all(isinstance(item, str) for item in text):
        raise ObjectComposeError(f"`{name}` must be a string or a non-empty list of strings, got {text!r}.")


def check_prompts(
    pipeline: Any,
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: Any,
    negative_prompt_embeds: Any,
    use_guidance: bool,
) -> int:
    """Check prompts and embeddings against each other and the pipeline's text encoder; returns the batch size B."""
    for text_name, text, embeds_name, embeds in (
        ("prompt", prompt, "prompt_embeds", prompt_embeds),
        ("negative_prompt", negative_prompt, "negative_prompt_embeds", negative_prompt_embeds),
    ):
        if text is not None and embeds is not None:
            raise ObjectComposeError(f"Give either `{text_name}` or `{embeds_name}`, not both.")
        if text is not None:
            check_call_text(text_name, text)
        if embeds is not None:
            check_embeds(embeds_name, embeds, pipeline.unet)
    if prompt is None and prompt_embeds is None:
        raise ObjectComposeError("Give either `prompt` or `prompt_embeds`, got neither.")
    batch_size = prompt_embeds.shape[0] if prompt is None else 1 if isinstance(prompt, str) else len(prompt)

    if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
        raise ObjectComposeError(
            f"`negative_prompt` must be one string or one per prompt: got {len(negative_prompt)} for {batch_size}."
        )
    if negative_prompt_embeds is not None and prompt_embeds is not None:
        if prompt_embeds.shape != negative_prompt_embeds.shape:
            raise ObjectComposeError(
                f"`prompt_embeds` and `negative_prompt_embeds` must have the same shape, got"
                f" {tuple(prompt_embeds.shape)} and {tuple(negative_prompt_embeds.shape)}."
            )
    elif negative_prompt_embeds is not None and pipeline.tokenizer is not None:
        expected = (batch_size, pipeline.tokenizer.model_max_length)
        if tuple(negative_prompt_embeds.shape[:2]) != expected:
            raise ObjectComposeError(
                f"`negative_prompt_embeds` must have shape {expected} (prompts, tokens) before the width to go with"
                f" `prompt`, got {tuple(negative_prompt_embeds.shape[:2])}."
            )
    needs_encoder = prompt is not None or (use_guidance and negative_prompt_embeds is None)
    if needs_encoder and (pipeline.text_encoder is None or pipeline.tokenizer is None):
        raise ObjectComposeError(
            "`prompt_embeds` (and `negative_prompt_embeds` under guidance) must be given: the pipeline has no text"
            " encoder or no tokenizer."
        )
    return batch_size


def check_clip_skip(clip_skip: Any, text_encoder: Any) -> None:
    """Raise unless `clip_skip` is None or leaves the text encoder at least its embeddings."""
    if clip_skip is None:
        return
    check_count("clip_skip", clip_skip, minimum=0)
    layers = getattr(getattr(text_encoder, "config", None), "num_hidden_layers", None)
    if layers is not None and clip_skip > layers:
        raise ObjectComposeError(f"`clip_skip` must be at most {layers}, the text encoder's layers, got {clip_skip}.")


def check_image_prompt(pipeline: Any, image: Any, image_embeds: Any, use_guidance: bool) -> None:
    """Check the two arguments of IP-Adapter against each other and the adapters that are loaded."""
    loaded = pipeline.unet.config.encoder_hid_dim_type == "ip_image_proj"
    if image is None and image_embeds is None:
        if loaded:
            raise ObjectComposeError(
                "An IP-Adapter is loaded: give `ip_adapter_image` or `ip_adapter_image_embeds`, or unload it."
            )
        return
    if image is not None and image_embeds is not None:
        raise ObjectComposeError("Give either `ip_adapter_image` or `ip_adapter_image_embeds`, not both.")
    if not loaded:
        raise ObjectComposeError("`ip_adapter_image` needs an IP-Adapter: call `load_ip_adapter` first.")
    adapters = len(pipeline.unet.encoder_hid_proj.image_projection_layers)
    if image is not None:
        count = len(image) if isinstance(image, list) else 1
        if count != adapters:
            raise ObjectComposeError(
                f"`ip_adapter_image` must hold one entry per IP-Adapter: got {count}, {adapters} loaded."
            )
        if pipeline.image_encoder is None:
            raise ObjectComposeError(
                "`ip_adapter_image` needs an `image_encoder`; give `ip_adapter_image_embeds` instead."
            )
        return
    if not isinstance(image_embeds, list) or len(image_embeds) != adapters:
        raise ObjectComposeError(
            f"`ip_adapter_image_embeds` must be a list of {adapters} tensors, one per IP-Adapter, got"
            f" {len(image_embeds) if isinstance(image_embeds, list) else type(image_embeds).__name__}."
        )
    for embeds in image_embeds:
        if not isinstance(embeds, torch.Tensor) or embeds.ndim not in (3, 4):
            raise ImageInputError("`ip_adapter_image_embeds` must hold 3D or 4D tensors.")
        if use_guidance and embeds.shape[0] % 2:
            raise ImageInputError(
                "`ip_adapter_image_embeds` must hold negative rows, then positive ones, under guidance: got"
                f" {embeds.shape[0]} rows."
            )


def check_schedule(scheduler: Any, num_inference_steps: Any, timesteps: Any, sigmas: Any) -> None:
    """Raise unless one schedule is asked for and the scheduler takes its kind."""
    if timesteps is not None and sigmas is not None:
        raise ObjectComposeError("Give either `timesteps` or `sigmas`, not both.")
    for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is None:
            continue
        if not hasattr(values, "__len__") or isinstance(values, str) or len(values) == 0:
            raise ObjectComposeError(f"`{name}` must be a list of at least one value, got {values!r}.")
        if not accepts_argument(scheduler.set_timesteps, name):
            raise ObjectComposeError(f"`{name}` cannot be used: {type(scheduler).__name__} takes no custom {name}.")
        return
    check_count("num_inference_steps", num_inference_steps)


def check_noise(pipeline: Any, generator: Any, latents: Any, num_images: int, latent_shape: tuple[int, ...]) -> None:
    """Check that there is one generator, or one per picture, and that given latents fit the pictures asked for."""
    if isinstance(generator, list):
        if len(generator) != num_images:
            raise ObjectComposeError(
                f"`generator` must hold one generator per picture: got {len(generator)} for {num_images} pictures."
            )
        wrong = [item for item in generator if not isinstance(item, torch.Generator)]
    else:
        wrong = [] if generator is None or isinstance(generator, torch.Generator) else [generator]
    if wrong:
        raise ObjectComposeError(f"`generator` must be a torch.Generator or a list of them, got {wrong[0]!r}.")
    if latents is None:
        return
    expected = (num_images, pipeline.unet.config.in_channels, *latent_shape)
    if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != expected:
        found = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ObjectComposeError(f"`latents` must be a tensor of shape {expected}, got {found}.")
    if not torch.isfinite(latents).all():
        raise NonFiniteError("`latents` holds NaN or infinite values.")


def check_callback(callback: Callable | None, tensor_inputs: Any, allowed: Sequence[str]) -> None:
    """Raise unless the callback can be called and asks only for tensors that the loop has."""
    if callback is not None and not callable(callback):
        raise ObjectComposeError(f"`callback_on_step_end` must be callable, got {callback!r}.")
    unknown = [name for name in tensor_inputs if name not in allowed]
    if unknown:
        raise ObjectComposeError(
            f"`callback_on_step_end_tensor_inputs` may only name {', '.join(allowed)}, got"
            f" {', '.join(map(str, unknown))}."
        )


def _is_step_index(value: Any, num_steps: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < num_steps


def check_attention_steps(attention_steps: Any, num_steps: int) -> None:
    """Raise unless `attention_steps` is None or a non-empty collection of step indices in [0, num_steps)."""
    if attention_steps is None:
        return
    if isinstance(attention_steps, str) or not hasattr(attention_steps, "__iter__"):
        raise ObjectComposeError(f"`attention_steps` must be a list of step indices, got {attention_steps!r}.")
    steps = list(attention_steps)
    wrong = [step for step in steps if not _is_step_index(step, num_steps)]
    if not steps or wrong:
        raise ObjectComposeError(
            f"`attention_steps` must be step indices from 0 to {num_steps - 1}, got {wrong[0] if wrong else steps!r}."
        )


def check_parts(parts: Any) -> None:
    """Raise unless `parts` is a sequence of attention parts, each with `kind` and `layers`, or groups of parts."""
    if not isinstance(parts, (list, tuple)):
        raise ObjectComposeError(f"`parts` must be a list of attention parts, got {type(parts).__name__}.")
    for index, part in enumerate(parts):
        # by attribute, never by class: code flattened for the Hub holds second copies of our classes
        if getattr(part, "kind", None) == "group" and hasattr(part, "bind"):
            continue
        if getattr(part, "kind", None) not in ("mask", "branch", "probe") or not hasattr(part, "layers"):
            raise ObjectComposeError(
                f"`parts[{index}]` must be an attention part (mask, branch or probe), got {part!r}."
            )
