"""The steps that every pipeline on a Stable Diffusion 1.x/2.x layout shares: encode, prepare, guide, decode.

`StableDiffusionStepsMixin` is a plain mixin and no pipeline, because a module that diffusers loads as a custom
pipeline may show exactly one `DiffusionPipeline` subclass. With the same components and arguments each step
returns bit for bit what the step of the same name of `diffusers.StableDiffusionPipeline` returns. Input is
checked in `objectcompose.pipelines.call_checks`, before any of these steps runs.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND, logging, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from packaging import version

from objectcompose.errors import ObjectComposeError
from objectcompose.pipelines.image_prompts import ImagePromptStepsMixin
from objectcompose.pipelines.token_utils import expand_placeholders


steps_logger = logging.get_logger(__name__)


def modernize_scheduler(scheduler: Any) -> None:
    """Give a scheduler with a config from before diffusers 0.10 the two settings that Stable Diffusion means.

    `StableDiffusionPipeline` does the same to the scheduler it is given, so without this a pipeline that was built
    from the same old checkpoint would sample other pictures.
    """
    if scheduler is None:
        return
    wanted = {}
    if getattr(scheduler.config, "steps_offset", 1) != 1:
        wanted["steps_offset"] = 1
    if getattr(scheduler.config, "clip_sample", False) is True:
        wanted["clip_sample"] = False
    if wanted:
        steps_logger.warning(f"The scheduler's config is outdated for Stable Diffusion; using {wanted}.")
        scheduler.register_to_config(**wanted)


def rescale_guided_noise(noise_pred: torch.Tensor, noise_pred_text: torch.Tensor, rescale: float) -> torch.Tensor:
    """Bring the guided prediction's standard deviation back towards the conditional one's.

    "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891), section 3.4.

    Args:
        noise_pred: the guided prediction, shape `(B, C, h, w)`.
        noise_pred_text: the conditional prediction, same shape.
        rescale: 0 keeps `noise_pred`, 1 takes the rescaled one.
    """
    axes = list(range(1, noise_pred.ndim))
    std_text, std_guided = noise_pred_text.std(dim=axes, keepdim=True), noise_pred.std(dim=axes, keepdim=True)
    rescaled = noise_pred * (std_text / std_guided)
    return rescale * rescaled + (1 - rescale) * noise_pred


def accepts_argument(function: Any, name: str) -> bool:
    """Whether a function's signature names the argument `name`."""
    return name in inspect.signature(function).parameters


def _saved_before_diffusers_0_9(unet: Any) -> bool:
    saved = getattr(unet.config, "_diffusers_version", None)
    return saved is not None and version.parse(version.parse(saved).base_version) < version.parse("0.9.0.dev0")


class StableDiffusionStepsMixin(ImagePromptStepsMixin):
    """Steps of a Stable Diffusion call, each one usable alone. Expects the components of `StableDiffusionPipeline`."""

    # components that the pipeline registers; `Any` because each of them may be None
    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    safety_checker: Any
    image_processor: Any
    vae_scale_factor: int
    _num_timesteps: int  # set by each pipeline once it knows its timesteps

    # ---- what a running call can be asked

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """The guidance rescale of the running call."""
        return self._guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        """How many of the text encoder's last layers the running call skips."""
        return self._clip_skip

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call predicts an unconditional half too."""
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """The extra arguments that reach the attention processors."""
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """The number of iterations of the running call's denoising loop."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True once a callback has asked the running call to stop."""
        return self._interrupt

    def set_call_state(
        self,
        guidance_scale: float,
        guidance_rescale: float,
        clip_skip: int | None,
        cross_attention_kwargs: dict[str, Any] | None,
    ) -> None:
        """Store what the properties above read; called once at the start of a call."""
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False

    # ---- text

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode prompts, or repeat embeddings that are given.

        Args:
            prompt: one prompt or a list of B prompts; None when `prompt_embeds` is given.
            device: where the embeddings go.
            num_images_per_prompt: how often each row is repeated (n); the copies of a prompt lie side by side.
            do_classifier_free_guidance: whether the negative half is needed.
            negative_prompt: one prompt for all rows or a list of B; None stands for the empty prompt.
            prompt_embeds: shape `(B, L, C)`.
            negative_prompt_embeds: shape `(B, L, C)`.
            lora_scale: strength of LoRA layers in the text encoder.
            clip_skip: how many of the text encoder's last layers to skip.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, both `(B * n, L, C)`; the second is what was given, or None,
            when there is no guidance.
        """
        if lora_scale is not None:
            self._lora_scale = lora_scale
            if USE_PEFT_BACKEND and self.text_encoder is not None:
                scale_lora_layers(self.text_encoder, lora_scale)
        try:
            if prompt_embeds is None:
                prompts = [prompt] if isinstance(prompt, str) else prompt
                prompt_embeds = self._encode_texts(prompts, device, clip_skip=clip_skip, warn_truncation=True)
            batch_size = prompt_embeds.shape[0]
            dtype = self._prompt_embeds_dtype(prompt_embeds)
            prompt_embeds = prompt_embeds.to(dtype=dtype, device=device)

            if do_classifier_free_guidance:
                if negative_prompt_embeds is None:
                    negatives = "" if negative_prompt is None else negative_prompt
                    negatives = [negatives] * batch_size if isinstance(negatives, str) else negatives
                    # the unconditional half keeps the last layer whatever `clip_skip` says, as in diffusers
                    negative_prompt_embeds = self._encode_texts(negatives, device, max_length=prompt_embeds.shape[1])
                negative_prompt_embeds = negative_prompt_embeds.to(dtype=dtype, device=device)
                negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        finally:
            if USE_PEFT_BACKEND and self.text_encoder is not None:
                unscale_lora_layers(self.text_encoder, lora_scale)
        return prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0), negative_prompt_embeds

    def _prompt_embeds_dtype(self, prompt_embeds: torch.Tensor) -> torch.dtype:
        if self.text_encoder is not None:
            return self.text_encoder.dtype
        return self.unet.dtype if self.unet is not None else prompt_embeds.dtype

    def _encode_texts(
        self,
        texts: Any,
        device: torch.device | str,
        max_length: int | None = None,
        clip_skip: int | None = None,
        warn_truncation: bool = False,
    ) -> torch.Tensor:
        """Hidden states `(len(texts), max_length, C)` of the text encoder; longer texts are cut."""
        max_length = self.tokenizer.model_max_length if max_length is None else max_length
        texts = [expand_placeholders(self.tokenizer, text) for text in texts]
        inputs = self.tokenizer(
            texts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
        )
        if warn_truncation:
            self._warn_truncation(texts)
        # only some of SD 2.x's text encoders were trained with a mask
        use_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        attention_mask = inputs.attention_mask.to(device) if use_mask else None
        output = self.text_encoder(
            inputs.input_ids.to(device), attention_mask=attention_mask, output_hidden_states=clip_skip is not None
        )
        if clip_skip is None:
            return output[0]
        # an inner layer has not passed the final norm that the UNet was trained behind
        final_layer_norm = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm
        return final_layer_norm(output.hidden_states[-(clip_skip + 1)])

    def _warn_truncation(self, texts: list[str]) -> None:
        limit = self.tokenizer.model_max_length
        for text in texts:
            ids = self.tokenizer(text, truncation=False).input_ids
            if len(ids) > limit:
                removed = self.tokenizer.decode(ids[limit - 1 : -1])
                steps_logger.warning(
                    f"The text encoder reads {limit} tokens; this part of the prompt was cut off: {removed!r}."
                )

    # ---- latents and scheduler

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures that the UNet was trained on."""
        size = self.unet.config.sample_size
        if size is None:
            raise ObjectComposeError(
                "`height` and `width` (in training `resolution`) are needed: the UNet's config has no `sample_size`."
            )
        if isinstance(size, int) and size < 64 and _saved_before_diffusers_0_9(self.unet):
            size = 64  # those versions wrote a wrong size into the UNet's config
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of a picture of `height` x `width` pixels."""
        return int(height) // self.vae_scale_factor, int(width) // self.vae_scale_factor

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `(batch_size, C, h, w)`, scaled as the scheduler wants it. Given latents are N(0, 1) noise."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ObjectComposeError(
                f"`generator` must hold one generator per picture: got {len(generator)} for {batch_size} pictures."
            )
        if latents is None:
            shape = (batch_size, num_channels_latents, *self.latent_size(height, width))
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype)
        else:
            latents = latents.to(device)
        return latents * self.scheduler.init_noise_sigma

    def prepare_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Set the scheduler's timesteps; returns them and the number of steps they stand for.

        Raises:
            ObjectComposeError: the scheduler cannot follow them, for example more steps than it was trained with.
        """
        name: str = "num_inference_steps"
        asked: int | list[int] | list[float] = num_inference_steps
        if timesteps is not None:
            name, asked = "timesteps", timesteps
        elif sigmas is not None:
            name, asked = "sigmas", sigmas
        try:
            self.scheduler.set_timesteps(**{name: asked}, device=device)
        except ValueError as error:
            kind = type(self.scheduler).__name__
            raise ObjectComposeError(f"`{name}` cannot be used with {kind}: {error}") from error
        is_custom = name != "num_inference_steps"
        return self.scheduler.timesteps, len(self.scheduler.timesteps) if is_custom else num_inference_steps

    def prepare_extra_step_kwargs(
        self, generator: torch.Generator | list[torch.Generator] | None, eta: float
    ) -> dict[str, Any]:
        """`eta` and `generator`, each only where the scheduler's `step` takes it (DDIM takes both)."""
        extra = {"eta": eta, "generator": generator}
        return {name: value for name, value in extra.items() if accepts_argument(self.scheduler.step, name)}

    def get_guidance_scale_embedding(
        self, w: torch.Tensor, embedding_dim: int = 512, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Sinusoidal embedding `(B, embedding_dim)` of guidance scales `w` `(B,)`, for distilled UNets (LCM)."""
        half = embedding_dim // 2
        decay = torch.log(torch.tensor(10000.0)) / (half - 1)
        frequencies = torch.exp(torch.arange(half, dtype=dtype) * -decay)
        angles = (w * 1000.0).to(dtype)[:, None] * frequencies[None, :]
        embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        return torch.nn.functional.pad(embedding, (0, embedding_dim % 2))

    def prepare_timestep_cond(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The guidance scale as a condition of the UNet, or None for UNets that take none (all but distilled ones)."""
        embedding_dim = self.unet.config.time_cond_proj_dim
        if embedding_dim is None:
            return None
        scales = torch.tensor(self.guidance_scale - 1).repeat(batch_size)
        return self.get_guidance_scale_embedding(scales, embedding_dim=embedding_dim).to(device=device, dtype=dtype)

    def guide(self, noise_pred: torch.Tensor) -> torch.Tensor:
        """Join the two halves `[uncond, cond]` of a prediction by classifier-free guidance; without it, return it."""
        if not self.do_classifier_free_guidance:
            return noise_pred
        uncond, text = noise_pred.chunk(2)
        guided = uncond + self.guidance_scale * (text - uncond)
        return rescale_guided_noise(guided, text, self.guidance_rescale) if self.guidance_rescale > 0.0 else guided

    # ---- pictures

    def run_safety_checker(
        self, image: torch.Tensor, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[torch.Tensor, list[bool] | None]:
        """Let the safety checker, if there is one, black out pictures `(B, 3, H, W)` in [-1, 1]."""
        if self.safety_checker is None:
            return image, None
        pictures = self.image_processor.postprocess(image, output_type="pil")
        clip_input = self.feature_extractor(pictures, return_tensors="pt").to(device).pixel_values
        return self.safety_checker(images=image, clip_input=clip_input.to(dtype))

    def decode_to_output(
        self,
        latents: torch.Tensor,
        output_type: str,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> tuple[Any, list[bool] | None]:
        """Latents `(B, C, h, w)` to what `output_type` asks for, and the safety checker's verdicts.

        Returns:
            Pictures as a list of PIL images ("pil"), an array `(B, H, W, 3)` in [0, 1] ("np"), a tensor `(B, 3, H, W)`
            in [0, 1] ("pt"), or the latents themselves ("latent"); and a list of B verdicts or None.
        """
        if output_type == "latent":
            return latents, None
        scaled = latents / self.vae.config.scaling_factor
        image = self.vae.decode(scaled, return_dict=False, generator=generator)[0]
        image, nsfw = self.run_safety_checker(image, device, dtype)
        # a blacked-out picture is already in [0, 1]
        do_denormalize = [True] * image.shape[0] if nsfw is None else [not flagged for flagged in nsfw]
        return self.image_processor.postprocess(image, output_type=output_type, do_denormalize=do_denormalize), nsfw
