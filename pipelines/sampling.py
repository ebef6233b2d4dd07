"""What the calls of all pipelines share: their arguments, the checks of these, the denoising loop, the output.

A pipeline's `__call__` is its method's story in four steps:

    call = self.take_arguments(locals())                   # the shared arguments, with defaults filled in
    placed = ...                                           # own checks, beside `check_call` and `check_attention`
    state = self.start_sampling(call, num_images)          # timesteps, text, latents
    latents = self.denoise(call, state, parts, ...)        # with the method's own attention parts
    return self.finish_sampling(call, state, ...)          # pictures

Without parts, every step computes bit for bit what `diffusers.StableDiffusionPipeline` computes there. A plain mixin
and no pipeline: see `objectcompose.pipelines.steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor

from objectcompose.attention_processors.compiled import is_compiled, prepare_parts
from objectcompose.attention_processors.install import use_parts
from objectcompose.errors import MissingFieldError, ObjectComposeError
from objectcompose.pipelines.attention_maps import (
    PhraseMapRecorder,
    check_installable,
    check_still_installed,
    phrase_map_layers,
)
from objectcompose.pipelines.call_arguments import CallArguments, SamplingState
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
from objectcompose.pipelines.steps import StableDiffusionStepsMixin, modernize_scheduler


#: `(step, timestep, latents, prompt_embeds) -> latents`, called before each prediction; see `SamplingMixin.denoise`.
BeforeStep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class SamplingMixin(StableDiffusionStepsMixin):
    """Sampling with attention parts; expects the components of `StableDiffusionPipeline`."""

    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    # of `DiffusionPipeline`
    register_modules: Any
    register_to_config: Any
    progress_bar: Any
    maybe_free_model_hooks: Any
    _execution_device: torch.device

    def register_stable_diffusion(self, requires_safety_checker: bool, **modules: Any) -> None:
        """Check and register the components of `StableDiffusionPipeline`, for `__init__`.

        Raises:
            CheckpointError: they are not those of one Stable Diffusion 1.x/2.x checkpoint.
            ObjectComposeError: a safety checker without a feature extractor.
        """
        if modules["safety_checker"] is not None and modules["feature_extractor"] is None:
            raise ObjectComposeError("`safety_checker` needs `feature_extractor`; give both or set both to None.")
        vae = modules["vae"]
        check_checkpoint(vae, modules["text_encoder"], modules["unet"])
        modernize_scheduler(modules["scheduler"])
        self.register_modules(**modules)
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._warned_unused: set[str] = set()

    # ---- before sampling

    def take_arguments(self, arguments: Mapping[str, Any]) -> CallArguments:
        """The shared ones among a call's arguments, with what depends on the pipeline filled in.

        Args:
            arguments: name to value; `locals()`, where it is the first thing in `__call__`.
        """
        call = CallArguments(**{field.name: arguments[field.name] for field in fields(CallArguments)})
        height, width = call.height, call.width
        if height is None or width is None:
            if isinstance(call.latents, torch.Tensor) and call.latents.ndim == 4:
                default_height, default_width = (side * self.vae_scale_factor for side in call.latents.shape[-2:])
            else:
                default_height, default_width = self.default_size()
            height = default_height if height is None else height
            width = default_width if width is None else width
        callback, tensor_inputs = call.callback_on_step_end, call.callback_on_step_end_tensor_inputs
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        num_images = 1 if call.num_images_per_prompt is None else call.num_images_per_prompt
        steps = call.attention_steps
        if isinstance(steps, Iterable) and not isinstance(steps, str):
            steps = tuple(steps)  # an iterator can be read once
        return replace(
            call,
            height=height,
            width=width,
            num_images_per_prompt=num_images,
            callback_on_step_end_tensor_inputs=tensor_inputs or (),
            attention_steps=steps,
        )

    def check_call(self, call: CallArguments) -> int:
        """Refuse shared arguments that cannot be used, before any model runs; returns the number of prompts B.

        Raises:
            ObjectComposeError: or one of its subclasses, all of them `ValueError`; the message names the argument.
        """
        check_number("guidance_scale", call.guidance_scale)
        check_number("guidance_rescale", call.guidance_rescale, minimum=0.0)
        check_number("eta", call.eta, minimum=0.0)
        check_count("num_images_per_prompt", call.num_images_per_prompt)
        check_picture_size(call.height, call.width, self.vae_scale_factor)
        check_output_type(call.output_type, self.vae)
        check_schedule(self.scheduler, call.num_inference_steps, call.timesteps, call.sigmas)
        use_guidance = call.guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
        embeds, negative_embeds = call.prompt_embeds, call.negative_prompt_embeds
        batch_size = check_prompts(self, call.prompt, call.negative_prompt, embeds, negative_embeds, use_guidance)
        check_clip_skip(call.clip_skip, self.text_encoder)
        check_image_prompt(self, call.ip_adapter_image, call.ip_adapter_image_embeds, use_guidance)
        num_images = batch_size * call.num_images_per_prompt
        check_noise(self, call.generator, call.latents, num_images, self.latent_size(call.height, call.width))
        tensor_inputs = call.callback_on_step_end_tensor_inputs
        check_callback(call.callback_on_step_end, tensor_inputs, self._callback_tensor_inputs)
        if call.cross_attention_kwargs is not None and not isinstance(call.cross_attention_kwargs, dict):
            raise ObjectComposeError(f"`cross_attention_kwargs` must be a dict, got {call.cross_attention_kwargs!r}.")
        check_parts(call.parts)
        for part in call.parts:
            if part.kind == "group":
                part.check(self, call)
        return batch_size

    def check_attention(
        self, call: CallArguments, placed: Sequence[Sequence[PlacedObject]], own_layers: Sequence[str] = ()
    ) -> list[str]:
        """Check that the parts of a call can be installed, and what its attention maps ask for.

        Args:
            call: the arguments, which passed `check_call`.
            placed: per prompt its objects.
            own_layers: cross-attention layers that the method's own parts are going to act on.

        Returns:
            Names of the layers whose attention is recorded; none without `return_attention`.

        Raises:
            MissingFieldError: maps are asked for, and no object has a phrase.
            LayerNotFoundError, PartConflictError: what `use_parts` raises, here before any long work.
            ObjectComposeError: `attention_layers` or `attention_steps` without `return_attention`.
        """
        map_layers: list[str] = []
        if call.return_attention:
            if not any(item.token_indices for row in placed for item in row):
                raise MissingFieldError("`return_attention=True` needs `objects` with a `phrase` each, got no object.")
            map_layers = phrase_map_layers(self.unet, call.attention_layers)
        else:
            for name in ("attention_layers", "attention_steps"):
                value = getattr(call, name)
                if value is not None:
                    raise ObjectComposeError(f"`{name}` needs `return_attention=True`, got {value!r} without it.")
        single = [part for part in call.parts if part.kind != "group"]  # groups have checked themselves
        check_installable(self.unet, single, [*dict.fromkeys([*map_layers, *own_layers])])
        return map_layers

    # ---- sampling

    def start_sampling(self, call: CallArguments, num_images: int) -> SamplingState:
        """Set the timesteps, encode text and image prompts, draw the noise.

        Args:
            call: the arguments, which passed `check_call`.
            num_images: M, prompts times `num_images_per_prompt`.

        Raises:
            ObjectComposeError: `attention_steps` beyond the loop, or a schedule that the scheduler refuses; before any
                model runs.
        """
        self.set_call_state(call.guidance_scale, call.guidance_rescale, call.clip_skip, call.cross_attention_kwargs)
        device = self._execution_device
        # Before any model runs, since only the scheduler knows how many iterations the loop has.
        schedule, num_steps = self.prepare_timesteps(call.num_inference_steps, device, call.timesteps, call.sigmas)
        self._num_timesteps = len(schedule)
        check_attention_steps(call.attention_steps, len(schedule))

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            call.prompt,
            device,
            call.num_images_per_prompt,
            self.do_classifier_free_guidance,
            call.negative_prompt,
            prompt_embeds=call.prompt_embeds,
            negative_prompt_embeds=call.negative_prompt_embeds,
            lora_scale=call.lora_scale,
            clip_skip=call.clip_skip,
        )
        if self.do_classifier_free_guidance:  # one forward for both halves, [uncond, cond]
            assert negative_prompt_embeds is not None
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        added_cond_kwargs = None
        if call.ip_adapter_image is not None or call.ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                call.ip_adapter_image,
                call.ip_adapter_image_embeds,
                device,
                num_images,
                self.do_classifier_free_guidance,
            )
            added_cond_kwargs = {"image_embeds": image_embeds}

        channels, dtype = self.unet.config.in_channels, prompt_embeds.dtype
        latents = self.prepare_latents(
            num_images, channels, call.height, call.width, dtype, device, call.generator, call.latents
        )
        return SamplingState(
            device,
            schedule,
            num_steps,
            prompt_embeds,
            negative_prompt_embeds,
            latents,
            added_cond_kwargs,
            timestep_cond=self.prepare_timestep_cond(num_images, device, latents.dtype),
            extra_step_kwargs=self.prepare_extra_step_kwargs(call.generator, call.eta),
            is_compiled=is_compiled(self.unet),
        )

    def make_recorder(
        self, call: CallArguments, placed: Sequence[Sequence[PlacedObject]], map_layers: Sequence[str]
    ) -> PhraseMapRecorder | None:
        """What records the maps of `return_attention`; None where none are asked for.

        Args:
            call: the arguments.
            placed: per picture its objects; those without a phrase have no map.
            map_layers: what `check_attention` returned.
        """
        if not call.return_attention:
            return None
        named = [[item for item in row if item.token_indices] for row in placed]
        return PhraseMapRecorder(named, map_layers, self.latent_size(call.height, call.width))

    def denoise(
        self,
        call: CallArguments,
        state: SamplingState,
        parts: Sequence[Any] = (),
        recorder: PhraseMapRecorder | None = None,
        before_step: BeforeStep | None = None,
    ) -> torch.Tensor:
        """The denoising loop; returns the latents `(M, C, h, w)`, which are `state.latents` too.

        Args:
            call: the arguments.
            state: what `start_sampling` returned; the loop changes it.
            parts: all attention parts, `call.parts` included. A group (`part.kind == "group"`) becomes, by `bind(self,
                call, state)`, parts of this call and a `before_step` of its own (or None), which runs after the
                method's.
            recorder: records attention maps.
            before_step: changes the latents before each prediction: `(step, timestep, latents, prompt_embeds)` to
                latents, `prompt_embeds` as in `state`. It runs with the parts installed; forwards of its own are for
                the conditional half, and are not recorded.
        """
        bound = [part.bind(self, call, state) for part in parts if part.kind == "group"]
        hooks = [] if before_step is None else [before_step]
        hooks += [group.before_step for group in bound if group.before_step is not None]
        all_parts = [part for part in parts if part.kind != "group"]
        all_parts += [part for group in bound for part in group.parts]
        if recorder is not None:
            all_parts.append(recorder.probe)
        num_warmup_steps = len(state.schedule) - state.num_inference_steps * self.scheduler.order
        with (
            use_parts(self.unet, all_parts) as installed,
            self.progress_bar(total=state.num_inference_steps) as progress_bar,
        ):
            if sum(part.kind == "branch" and part.mode == "replace" for part in all_parts) > 1:
                halves = 2 if self.do_classifier_free_guidance else 1
                prepare_parts(self.unet, state.latents.repeat(halves, 1, 1, 1))  # conflicts show before any step
            for i, t in enumerate(state.schedule):
                if self.interrupt:
                    continue
                if hooks and recorder is not None:
                    recorder.measure_rows(is_guided=False)
                for hook in hooks:
                    state.latents = hook(i, t, state.latents, state.prompt_embeds)

                if recorder is not None:
                    recorder.measure_rows(is_guided=self.do_classifier_free_guidance)
                noise_pred = self.predict_noise(state, t)
                if recorder is not None:
                    is_wanted = call.attention_steps is None or i in call.attention_steps
                    if is_wanted:
                        recorder.record()
                    else:
                        recorder.discard()

                state.latents = self.scheduler.step(
                    self.guide(noise_pred), t, state.latents, **state.extra_step_kwargs, return_dict=False
                )[0]
                if call.callback_on_step_end is not None:
                    self._call_back(call, state, i, t)
                    check_still_installed(self.unet, installed)
                if i == len(state.schedule) - 1 or (
                    (i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                ):
                    progress_bar.update()
        return state.latents

    def predict_noise(self, state: SamplingState, timestep: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction for `state.latents`: `(2 * M, C, h, w)` as [uncond, cond] under guidance, else M."""
        # a callback may have changed the guidance scale, hence asked anew in each step
        latents = torch.cat([state.latents] * 2) if self.do_classifier_free_guidance else state.latents
        if state.is_compiled:
            prepare_parts(self.unet, latents)
        return self.unet(
            self.scheduler.scale_model_input(latents, timestep),
            timestep,
            encoder_hidden_states=state.prompt_embeds,
            timestep_cond=state.timestep_cond,
            cross_attention_kwargs=self.cross_attention_kwargs,
            added_cond_kwargs=state.added_cond_kwargs,
            return_dict=False,
        )[0]

    def _call_back(self, call: CallArguments, state: SamplingState, step: int, timestep: torch.Tensor) -> None:
        assert call.callback_on_step_end is not None
        tensors = {name: getattr(state, name) for name in call.callback_on_step_end_tensor_inputs}
        returned = call.callback_on_step_end(self, step, timestep, tensors)
        if returned is None:
            return
        for name in ("latents", "prompt_embeds", "negative_prompt_embeds"):
            setattr(state, name, returned.pop(name, getattr(state, name)))

    def finish_sampling(
        self,
        call: CallArguments,
        state: SamplingState,
        placed: list[list[PlacedObject]] | None,
        recorder: PhraseMapRecorder | None = None,
        output_class: type[ComposeOutput] = ComposeOutput,
        **own_fields: Any,
    ) -> Any:
        """Decode `state.latents`, let the models go back to where offloading keeps them, and form the output.

        Args:
            call: the arguments.
            state: after `denoise`.
            placed: per picture its objects; None when none were given.
            recorder: of `make_recorder`.
            output_class: the method's output, if it is not the common one.
            own_fields: its further fields.

        Returns:
            The output, or a tuple of all its fields without `return_dict`.
        """
        images, nsfw = self.decode_to_output(
            state.latents, call.output_type, call.generator, state.device, state.prompt_embeds.dtype
        )
        self.maybe_free_model_hooks()
        attention = None if recorder is None else recorder.mean_maps()
        output = output_class(
            images=images, nsfw_content_detected=nsfw, objects=placed, attention=attention, **own_fields
        )
        return output if call.return_dict else tuple(getattr(output, field.name) for field in fields(output))
