"""LocRefPipeline: a prompt, and objects with a box and a reference picture, to a picture; nothing is tuned per object.

LocRef-Diffusion (arXiv:2411.15252): each object appears in its box, looking like its reference, and nowhere else. The
references, and a composite image in which they lie in their boxes, become keys and values (`LocRefAdapter`) that take
the place of text inside the boxes (`fusion_parts`). Outside, and without references, the base paints alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
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

from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.attention_processors.reference_fusion import FusionSettings
from objectcompose.errors import ObjectComposeError
from objectcompose.layout import as_scene_objects
from objectcompose.pipelines.adapter_loading import AdapterLoaderMixin
from objectcompose.pipelines.call_arguments import CallArguments, describes_shared_arguments
from objectcompose.pipelines.call_checks import check_number, check_object_count, check_switch
from objectcompose.pipelines.pipeline_output import LocRefOutput, PlacedObject
from objectcompose.pipelines.placement import place_objects, warn_unused_fields
from objectcompose.pipelines.reference_scenes import (
    MAX_LOCREF_OBJECTS,
    ReferenceScene,
    check_locref_objects,
    composite_pictures,
    encode_scenes,
    has_reference,
    locref_fields,
    reference_scene,
    scene_parts,
)
from objectcompose.pipelines.sampling import SamplingMixin
from objectcompose.pipelines.saving import HubSavingMixin


class LocRefPipeline(
    HubSavingMixin,
    AdapterLoaderMixin,
    SamplingMixin,
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """Text, boxes and reference pictures to a picture, with a checkpoint of the Stable Diffusion 1.x/2.x layout.

    Without an object that has a picture and a `scale` above 0, a call returns bit for bit what
    `StableDiffusionPipeline` returns.

    Args:
        vae: decodes latents to pictures.
        text_encoder: CLIP text model; None when calls give `prompt_embeds`.
        tokenizer: CLIP tokenizer; None when calls give `prompt_embeds`.
        unet: predicts noise (epsilon) or velocity, as the scheduler's `prediction_type` says.
        scheduler: any of diffusers' Karras schedulers.
        safety_checker: blacks out pictures; needs `feature_extractor`.
        feature_extractor: says how the image encoder's pixels are normalised; CLIP's own way without it.
        image_encoder: reads references and composite image; of the width that the adapter was made for.
        requires_safety_checker: kept so that checkpoints of `StableDiffusionPipeline` load; nothing is enforced.
        adapter: the trained part; None leaves the plain pipeline.

    Raises:
        CheckpointError: the components do not belong together.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->adapter->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder", "adapter"]

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
        adapter: LocRefAdapter | None = None,
    ):
        super().__init__()
        self.register_stable_diffusion(
            requires_safety_checker,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.check_adapter(adapter, unet)
        self.register_modules(adapter=adapter)

    def check_inputs(
        self, call: CallArguments, objects: Any, options: Mapping[str, Any], return_composite: bool = False
    ) -> tuple[list[list[PlacedObject]], list[ReferenceScene], list[str]]:
        """Refuse what a call cannot use, before any model runs.

        Args:
            call: the shared arguments.
            objects: as in `__call__`.
            options: those of the fusion that the call gives, of `FusionSettings` and `null_references`.
            return_composite: as in `__call__`.

        Returns:
            Per prompt the placed objects (empty lists without `objects`) and the references; and the names of the
            layers whose attention is recorded.

        Raises:
            ObjectComposeError: or one of its subclasses, all of them `ValueError`; the message names the argument.
        """
        batch_size = self.check_call(call)
        for name, value in options.items():
            if name in ("region_mask", "null_references"):
                check_switch(name, value)
            else:
                check_number(name, value, minimum=0.0)
        rows = as_scene_objects(objects, batch_size)
        check_object_count(rows, MAX_LOCREF_OBJECTS)
        for row in rows:
            check_locref_objects(row, type(self).__name__)
        if options and all(item.image is None for row in rows for item in row):
            raise ObjectComposeError(f"`{next(iter(options))}` needs `objects` with an `image`, got none.")
        has_references = any(has_reference(item) for row in rows for item in row)
        own_layers = self.check_encoders() if has_references else []
        if return_composite and (self.adapter is None or self.adapter.config.composite != "image"):
            raise ObjectComposeError("`return_composite=True` needs an `adapter` that reads a composite image.")
        canvas = (call.height, call.width)
        placed = place_objects(self.tokenizer, call.prompt, rows, canvas, locref_fields)
        scenes = [reference_scene(row, self.latent_size(*canvas)) for row in rows]
        return placed, scenes, self.check_attention(call, placed, own_layers)

    def fusion_settings(self, options: Mapping[str, Any]) -> FusionSettings:
        """Strengths and switches of a call: what it gives, else what the adapter was trained for."""
        names = [field.name for field in fields(FusionSettings)]
        return FusionSettings(**{name: options.get(name, getattr(self.adapter.config, name)) for name in names})

    @torch.no_grad()
    @describes_shared_arguments
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
        ci_scale: float | None = None,
        ri_scale: float | None = None,
        gamma: float | None = None,
        region_mask: bool | None = None,
        null_references: bool | None = None,
        return_composite: bool = False,
        parts: Sequence[Any] = (),
        return_attention: bool = False,
        attention_layers: str | Sequence[str] | None = None,
        attention_steps: Sequence[int] | None = None,
    ) -> Any:
        """Sample pictures.

        Args:
            objects: at most 20 `SceneObject`s or dicts, one list for all prompts or one per prompt. With `image`
                (alpha is its cut-out) and `box`, an object is shown by its reference, in front by `order`; its
                `phrase` is needed only for attention maps. Without `image` it is left to the prompt, and needs a
                `phrase` of it. `scale` 0 is as if there were no `image`; any other multiplies the attention to the
                object's own reference (with `ri_scale`), and neither its part of the composite image nor how much of
                the text stays in its box (`gamma`).
            ci_scale: strength of the composite image, at least 0. Default, here and below: the adapter's. This and the
                four below need an object with an `image`.
            ri_scale: strength of the references, at least 0.
            gamma: share of the text that stays inside the boxes, at least 0.
            region_mask: whether each reference acts in its own box only; False is an ablation.
            null_references: under guidance, whether the unconditional half sees null pictures in the boxes, or is the
                base's alone, as for weights that were not trained with dropped pictures.
            return_composite: also return the composite images.

        All other arguments are those of `CallArguments`.

        Returns:
            `LocRefOutput`, or a tuple of its five fields with `return_dict=False`.

        Raises:
            ObjectComposeError: (a `ValueError`) for input it cannot use, before any model runs.
        """
        # 1. Refuse bad input; place the objects
        call = self.take_arguments(locals())
        options = {
            "ci_scale": ci_scale,
            "ri_scale": ri_scale,
            "gamma": gamma,
            "region_mask": region_mask,
            "null_references": null_references,
        }
        options = {name: value for name, value in options.items() if value is not None}
        placed, scenes, map_layers = self.check_inputs(call, objects, options, return_composite)
        warn_unused_fields(placed, type(self).__name__, self._warned_unused)
        placed = [row for row in placed for _ in range(call.num_images_per_prompt)]  # per prompt -> per picture

        # 2. Timesteps, text, noise
        state = self.start_sampling(call, len(placed))

        # 3. References and composite images to attention parts
        canvas, own_parts = (call.height, call.width), []
        if any(scene.references for scene in scenes):
            vectors = encode_scenes(
                scenes, canvas, self.image_encoder, self.feature_extractor, self.adapter, state.device
            )
            with_nulls = options.get("null_references", self.adapter.config.null_references)
            with_nulls = with_nulls and self.do_classifier_free_guidance
            settings = self.fusion_settings(options)
            own_parts = scene_parts(self.adapter, scenes, vectors, settings, call.num_images_per_prompt, with_nulls)
        composite = None
        if return_composite:
            composite = composite_pictures(scenes, canvas, self.feature_extractor, call.num_images_per_prompt)

        # 4. Denoising loop, pictures
        recorder = self.make_recorder(call, placed, map_layers)
        self.denoise(call, state, [*own_parts, *call.parts], recorder)
        found = None if objects is None else placed
        return self.finish_sampling(call, state, found, recorder, LocRefOutput, composite=composite)
