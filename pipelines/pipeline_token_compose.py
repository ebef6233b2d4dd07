"""TokenComposePipeline: a prompt with several objects to a picture, and where each phrase was looked at.

TokenCompose (Wang et al., 2024, arXiv:2312.03626) fine-tunes the UNet of Stable Diffusion so that the
cross-attention of a noun's tokens falls on the noun's object. Nothing is added at inference: a TokenCompose
checkpoint is a Stable Diffusion checkpoint with another UNet, and so this pipeline samples bit for bit as
`StableDiffusionPipeline` does, at the same cost. On top of that it finds phrases in the prompt, returns their
attention maps, and takes attention parts of other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders import (
    FromSingleFileMixin,
    IPAdapterMixin,
    StableDiffusionLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from objectcompose.attention_processors.install import use_parts
from objectcompose.errors import MissingFieldError, ObjectComposeError
from objectcompose.pipelines.attention_maps import (
    PhraseMapRecorder,
    check_installable,
    check_still_installed,
    phrase_map_layers,
)
from objectcompose.pipelines.call_checks import (
    check_attention_steps,
    check_callback,
    check_checkpoint,
    check_clip_skip,
    check_count,
    check_image_prompt,
    check_noise,
    check_number,
    check_output_type,
    check_parts,
    check_picture_size,
    check_prompts,
    check_schedule,
)
from objectcompose.pipelines.pipeline_output import ComposeOutput, PlacedObject
from objectcompose.pipelines.placement import place_phrases, warn_unused_fields
from objectcompose.pipelines.saving import HubSavingMixin
from objectcompose.pipelines.steps import StableDiffusionStepsMixin, modernize_scheduler


class TokenComposePipeline(
    HubSavingMixin,
    StableDiffusionStepsMixin,
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """Text to picture with any checkpoint of the Stable Diffusion 1.x/2.x layout, in particular TokenCompose's.

    Without `objects`, `parts` and `return_attention` a call returns bit for bit what `StableDiffusionPipeline` returns
    with the same components, arguments and generator.

    Args:
        vae: decodes latents to pictures.
        text_encoder: CLIP text model; None when calls give `prompt_embeds`.
        tokenizer: CLIP tokenizer; None when calls give `prompt_embeds`.
        unet: predicts noise (epsilon) or velocity, as the scheduler's `prediction_type` says.
        scheduler: any of diffusers' Karras schedulers.
        safety_checker: blacks out pictures; needs `feature_extractor`.
        feature_extractor: prepares pictures for the safety checker and IP-Adapter.
        image_encoder: embeds pictures for IP-Adapter.
        requires_safety_checker: kept so that checkpoints of `StableDiffusionPipeline` load; nothing is enforced.

    Raises:
        CheckpointError: the components are not those of one Stable Diffusion 1.x/2.x checkpoint.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ):
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ObjectComposeError("`safety_checker` needs `feature_extractor`; give both or set both to None.")
        check_checkpoint(vae, text_encoder, unet)
        modernize_scheduler(scheduler)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._warned_unused: set[str] = set()

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        *,
        objects: Any = None,
        parts: Sequence[Any] = (),
        return_attention: bool = False,
        attention_layers: str | Sequence[str] | None = None,
        attention_steps: Sequence[int] | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        clip_skip: int | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> tuple[list[list[PlacedObject]], list[str]]:
        """Refuse what a call cannot use, before any model runs. Arguments as in `__call__`.

        Returns:
            Per prompt the placed objects (empty lists without `objects`), and the names of the layers whose attention
            is recorded (an empty list without `return_attention`).

        Raises:
            ObjectComposeError: or one of its subclasses, all of them `ValueError`; the message names the argument.
        """
        check_number("guidance_scale", guidance_scale)
        check_number("guidance_rescale", guidance_rescale, minimum=0.0)
        check_number("eta", eta, minimum=0.0)
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_picture_size(height, width, self.vae_scale_factor)
        check_output_type(output_type)
        check_schedule(self.scheduler, num_inference_steps, timesteps, sigmas)
        use_guidance = guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
        batch_size = check_prompts(self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, use_guidance)
        check_clip_skip(clip_skip, self.text_encoder)
        check_image_prompt(self, ip_adapter_image, ip_adapter_image_embeds, use_guidance)
        num_images = batch_size * num_images_per_prompt
        check_noise(self, generator, latents, num_images, self.latent_size(height, width))
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        if cross_attention_kwargs is not None and not isinstance(cross_attention_kwargs, dict):
            raise ObjectComposeError(f"`cross_attention_kwargs` must be a dict, got {cross_attention_kwargs!r}.")

        check_parts(parts)
        placed: list[list[PlacedObject]] = [[] for _ in range(batch_size)]
        if objects is not None:
            placed = place_phrases(self.tokenizer, prompt, objects, (height, width), ("phrase",), type(self).__name__)
        if not return_attention:
            for name, value in (("attention_layers", attention_layers), ("attention_steps", attention_steps)):
                if value is not None:
                    raise ObjectComposeError(f"`{name}` needs `return_attention=True`, got {value!r} without it.")
            check_installable(self.unet, parts)
            return placed, []
        if not any(placed):
            raise MissingFieldError("`return_attention=True` needs `objects` with a `phrase` each, got no object.")
        map_layers = phrase_map_layers(self.unet, attention_layers)
        check_installable(self.unet, parts, map_layers)
        return placed, map_layers

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        objects: Any = None,
        parts: Sequence[Any] = (),
        return_attention: bool = False,
        attention_layers: str | Sequence[str] | None = None,
        attention_steps: Sequence[int] | None = None,
    ) -> Any:
        """Sample pictures.

        Args:
            prompt: one prompt or a list of B prompts.
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
            return_dict: return a `ComposeOutput`, or the tuple (images, nsfw, objects, attention).
            cross_attention_kwargs: reach the attention processors; `{"scale": x}` is the strength of LoRA.
            guidance_rescale: see `rescale_guided_noise`.
            clip_skip: how many of the text encoder's last layers to skip.
            callback_on_step_end: called as `callback(pipeline, step, timestep, callback_kwargs)` after each step; may
                return tensors that replace the loop's.
            callback_on_step_end_tensor_inputs: which tensors `callback_kwargs` holds.
            objects: `SceneObject`s or dicts, one list for all prompts or one per prompt. Each needs a `phrase` that
                occurs in the prompt; a box is kept for plots; everything else is listed as unused.
            parts: attention parts of other methods, installed while the loop runs and removed after it.
            return_attention: return a map for each object's phrase.
            attention_layers: cross-attention layers to average over: a regex or a list of names. Default: the middle
                and the decoder.
            attention_steps: iterations of the loop to average over, from 0, as callbacks count them. Default: all.

        Returns:
            `ComposeOutput`, or a tuple of its four fields with `return_dict=False`.

        Raises:
            ObjectComposeError: (a `ValueError`) for input it cannot use, before any model runs.
        """
        # 0. Defaults
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        num_images_per_prompt = 1 if num_images_per_prompt is None else num_images_per_prompt
        if height is None or width is None:
            if isinstance(latents, torch.Tensor) and latents.ndim == 4:
                default_height, default_width = (side * self.vae_scale_factor for side in latents.shape[-2:])
            else:
                default_height, default_width = self.default_size()
            height = default_height if height is None else height
            width = default_width if width is None else width

        # 1. Refuse bad input; find the phrases
        placed, map_layers = self.check_inputs(
            prompt,
            height,
            width,
            objects=objects,
            parts=parts,
            return_attention=return_attention,
            attention_layers=attention_layers,
            attention_steps=attention_steps,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
            clip_skip=clip_skip,
            cross_attention_kwargs=cross_attention_kwargs,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        warn_unused_fields(placed, type(self).__name__, self._warned_unused)
        self.set_call_state(guidance_scale, guidance_rescale, clip_skip, cross_attention_kwargs)
        device = self._execution_device
        placed = [row for row in placed for _ in range(num_images_per_prompt)]  # per prompt -> per picture
        num_images = len(placed)

        # 2. Timesteps, before any model runs, since only the scheduler knows how many iterations the loop has
        schedule, num_inference_steps = self.prepare_timesteps(num_inference_steps, device, timesteps, sigmas)
        num_warmup_steps = len(schedule) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(schedule)
        check_attention_steps(attention_steps, len(schedule))

        # 3. Encode prompts and image prompts; under guidance the batch is [uncond, cond]
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=None if cross_attention_kwargs is None else cross_attention_kwargs.get("scale"),
            clip_skip=clip_skip,
        )
        if self.do_classifier_free_guidance:
            assert negative_prompt_embeds is not None
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        added_cond_kwargs = None
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, num_images, self.do_classifier_free_guidance
            )
            added_cond_kwargs = {"image_embeds": image_embeds}

        # 4. Latents, and what scheduler and UNet want besides
        latents = self.prepare_latents(
            num_images, self.unet.config.in_channels, height, width, prompt_embeds.dtype, device, generator, latents
        )
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        timestep_cond = self.prepare_timestep_cond(num_images, device, latents.dtype)

        # 5. Attention parts: the caller's, and the probe behind `return_attention`
        recorder = PhraseMapRecorder(placed, map_layers, self.latent_size(height, width)) if return_attention else None
        all_parts = [*parts] if recorder is None else [*parts, recorder.probe]
        recorded_steps = None if attention_steps is None else set(attention_steps)

        # 6. Denoising loop
        with (
            use_parts(self.unet, all_parts) as installed,
            self.progress_bar(total=num_inference_steps) as progress_bar,
        ):
            for i, t in enumerate(schedule):
                if self.interrupt:
                    continue

                # a callback may have changed the guidance scale, hence asked anew in each step
                latent_model_input = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)
                if recorder is not None:
                    recorder.measure_rows(is_guided=self.do_classifier_free_guidance)

                noise_pred = self.unet(
                    latent_model_input,
                    t,
                    encoder_hidden_states=prompt_embeds,
                    timestep_cond=timestep_cond,
                    cross_attention_kwargs=self.cross_attention_kwargs,
                    added_cond_kwargs=added_cond_kwargs,
                    return_dict=False,
                )[0]
                if recorder is not None:
                    if recorded_steps is None or i in recorded_steps:
                        recorder.record()
                    else:
                        recorder.discard()

                noise_pred = self.guide(noise_pred)
                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                    prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds)
                    check_still_installed(self.unet, installed)

                if i == len(schedule) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        # 7. Decode, and let the models go back to where offloading keeps them
        images, nsfw = self.decode_to_output(latents, output_type, generator, device, prompt_embeds.dtype)
        self.maybe_free_model_hooks()

        output = ComposeOutput(
            images=images,
            nsfw_content_detected=nsfw,
            objects=None if objects is None else placed,
            attention=None if recorder is None else recorder.mean_maps(),
        )
        if not return_dict:
            return output.images, output.nsfw_content_detected, output.objects, output.attention
        return output
