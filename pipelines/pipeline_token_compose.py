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

from objectcompose.pipelines.call_arguments import CallArguments, describes_shared_arguments
from objectcompose.pipelines.pipeline_output import PlacedObject
from objectcompose.pipelines.placement import place_phrases, warn_unused_fields
from objectcompose.pipelines.sampling import SamplingMixin
from objectcompose.pipelines.saving import HubSavingMixin


class TokenComposePipeline(
    HubSavingMixin,
    SamplingMixin,
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
    #: Of `SceneObject`; a method on top of this one may use more.
    used_fields: tuple[str, ...] = ("phrase",)

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

    def check_inputs(self, call: CallArguments, objects: Any = None) -> tuple[list[list[PlacedObject]], list[str]]:
        """Refuse what a call cannot use, before any model runs.

        Args:
            call: the arguments of a call.
            objects: as in `__call__`.

        Returns:
            Per prompt the placed objects (empty lists without `objects`), and the names of the layers whose attention
            is recorded (an empty list without `return_attention`).

        Raises:
            ObjectComposeError: or one of its subclasses, all of them `ValueError`; the message names the argument.
        """
        batch_size = self.check_call(call)
        placed: list[list[PlacedObject]] = [[] for _ in range(batch_size)]
        if objects is not None:
            canvas, method = (call.height, call.width), type(self).__name__
            placed = place_phrases(self.tokenizer, call.prompt, objects, canvas, self.used_fields, method)
        return placed, self.check_attention(call, placed)

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
        parts: Sequence[Any] = (),
        return_attention: bool = False,
        attention_layers: str | Sequence[str] | None = None,
        attention_steps: Sequence[int] | None = None,
    ) -> Any:
        """Sample pictures.

        Args:
            objects: `SceneObject`s or dicts, one list for all prompts or one per prompt. Each needs a `phrase` that
                occurs in the prompt; a box is kept for plots; everything else is listed as unused.

        All other arguments are those of `CallArguments`.

        Returns:
            `ComposeOutput`, or a tuple of its four fields with `return_dict=False`.

        Raises:
            ObjectComposeError: (a `ValueError`) for input it cannot use, before any model runs.
        """
        # 1. Refuse bad input; find the phrases
        call = self.take_arguments(locals())
        placed, map_layers = self.check_inputs(call, objects)
        warn_unused_fields(placed, type(self).__name__, self._warned_unused)
        placed = [row for row in placed for _ in range(call.num_images_per_prompt)]  # per prompt -> per picture

        # 2. Timesteps, text, noise
        state = self.start_sampling(call, len(placed))

        # 3. The method adds nothing at inference: the caller's parts, and the probe behind `return_attention`
        recorder = self.make_recorder(call, placed, map_layers)
        self.denoise(call, state, call.parts, recorder)

        # 4. Pictures
        return self.finish_sampling(call, state, None if objects is None else placed, recorder)
