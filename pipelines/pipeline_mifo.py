"""MIFOPipeline: a prompt whose objects stay in their boxes, and apart from one another.

MIFO (arXiv 2511.00542) learns several instances from one picture as placeholders of the prompt, and composes them
under box control. This is the second half; the first is `objectcompose.training.learn_mifo`, which leaves embeddings
that `load_textual_inversion` reads, or a fine-tuned checkpoint. Ordinary phrases are controlled the same way.

Without boxes the pipeline samples bit for bit as `StableDiffusionPipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from objectcompose.pipelines.mifo_control import MIFOBoxControl
from objectcompose.pipelines.pipeline_output import PlacedObject
from objectcompose.pipelines.placement import warn_unused_fields
from objectcompose.pipelines.sampling import SamplingMixin
from objectcompose.pipelines.saving import HubSavingMixin


class MIFOPipeline(
    HubSavingMixin,
    SamplingMixin,
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """Text to picture under box control, with any checkpoint of the Stable Diffusion 1.x/2.x layout.

    Learned instances are loaded with `load_textual_inversion` (and `load_lora_weights`), or come with the checkpoint.

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

    def check_inputs(
        self, call: CallArguments, control: MIFOBoxControl | None, use_box_control: bool = True
    ) -> tuple[list[list[PlacedObject]], list[str]]:
        """Refuse what a call cannot use, before any model runs.

        Args:
            call: the arguments of a call.
            control: box control of the call's objects; None without objects.
            use_box_control: whether it is to act.

        Returns:
            Per prompt the placed objects (empty lists without objects), and the names of the layers whose attention is
            recorded (an empty list without `return_attention`).

        Raises:
            ObjectComposeError: or one of its subclasses, all of them `ValueError`; the message names the argument.
        """
        batch_size = self.check_call(call)
        placed: list[list[PlacedObject]] = [[] for _ in range(batch_size)]
        if control is not None:
            placed = [prompt.placed for prompt in control.controlled_prompts(self, call)]
            if use_box_control:
                control.check(self, call)
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
        box_control: Mapping[str, Any] | None = None,
        use_box_control: bool = True,
        loss_layers: str | Sequence[str] | None = None,
        map_layers: str | Sequence[str] | None = None,
        parts: Sequence[Any] = (),
        return_attention: bool = False,
        attention_layers: str | Sequence[str] | None = None,
        attention_steps: Sequence[int] | None = None,
    ) -> Any:
        """Sample pictures.

        Args:
            objects: `SceneObject`s or dicts, one list for all prompts or one per prompt. Each needs a learned `token`
                or a `phrase`, that occurs in the prompt, and a `box` or `mask`. Several may share one place: "dogs"
                twice, with two boxes, in "a photo of two dogs".
            box_control: `BoxControlOptions`, or a dict with some of its and `RefinementOptions`' fields, such as
                `{"penalty": "none"}`, `{"attention": "self"}`, `{"refine": False}` or `{"guided_steps": 0}`.
            use_box_control: False paints the prompt alone; the objects are still found and checked.
            loss_layers: attention layers that the loss reads, a regex or a list of names; default: `control_layers`.
            map_layers: those whose maps refine the masks, all of one grid; default likewise.

        All other arguments are those of `CallArguments`.

        Returns:
            `ComposeOutput`, or a tuple of its four fields with `return_dict=False`.

        Raises:
            ObjectComposeError: (a `ValueError`) for input it cannot use, before any model runs; NonFiniteError also
                while sampling.
        """
        # 1. Refuse bad input; find the objects
        call = self.take_arguments(locals())
        control = None if objects is None else MIFOBoxControl(objects, box_control, loss_layers, map_layers)
        placed, map_names = self.check_inputs(call, control, use_box_control)
        warn_unused_fields(placed, type(self).__name__, self._warned_unused)
        placed = [row for row in placed for _ in range(call.num_images_per_prompt)]  # per prompt -> per picture

        # 2. Timesteps, text, noise
        state = self.start_sampling(call, len(placed))

        # 3. Box control, where there is anything to control, beside the caller's parts
        recorder = self.make_recorder(call, placed, map_names)
        own_parts = [control] if use_box_control and any(placed) else []
        self.denoise(call, state, [*call.parts, *own_parts], recorder)

        # 4. Pictures
        return self.finish_sampling(call, state, None if objects is None else placed, recorder)
