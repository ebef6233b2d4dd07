"""ObjectPromptPipeline: a prompt and pictures of objects to a picture with these objects, in a layout of its own.

VisualComposer (arXiv:2501.01424): the user says what a scene holds and shows how each object looks; where it goes is
the model's choice. An adapter turns each picture into keys from a narrow encoding (where) and values from a wide one
(how it looks), which one softmax over all objects adds to the text's attention (`object_prompts`). Compositional
guidance samples a second time with what the first picture shows (`composition_guidance`). The paper's text leaves
sizes, thresholds and schedules open; where a number is ours its name says what it is, and the modules say why.
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
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Dinov2Model,
)

from objectcompose.adapters.object_prompt_adapter import ObjectPromptAdapter
from objectcompose.errors import LayoutError, MissingFieldError, ObjectComposeError
from objectcompose.layout import SceneObject, as_scene_objects, require_object_fields
from objectcompose.layout_fields import check_picture
from objectcompose.pipelines.adapter_loading import AdapterLoaderMixin
from objectcompose.pipelines.call_arguments import CallArguments, describes_shared_arguments
from objectcompose.pipelines.call_checks import check_object_count
from objectcompose.pipelines.composition_guidance import GuidedRun
from objectcompose.pipelines.gradient_passes import has_model_hook
from objectcompose.pipelines.guidance_options import GuidanceOptions, check_guidance
from objectcompose.pipelines.object_matching import SIMILARITY_THRESHOLD
from objectcompose.pipelines.object_prompts import ObjectPromptBranch, pack_tokens, prompt_tokens
from objectcompose.pipelines.pipeline_output import PlacedObject
from objectcompose.pipelines.placement import place_objects, warn_unused_fields
from objectcompose.pipelines.sampling import SamplingMixin
from objectcompose.pipelines.saving import HubSavingMixin
from objectcompose.pipelines.token_refinement import REFINEMENT_STEPS


MAX_PROMPTED_OBJECTS = 6


class ObjectPromptPipeline(
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
    """Text and object pictures to picture, with any checkpoint of the Stable Diffusion 1.x/2.x layout.

    Without `parts` and `return_attention`, and without `objects` or with every `scale` 0 and no `background`, a call
    returns bit for bit what `StableDiffusionPipeline` returns with the same components, arguments and generator.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker: as in `StableDiffusionPipeline`.
        feature_extractor: of the image encoder, for its mean and standard deviation (None: CLIP's), and of the safety
            checker.
        image_encoder: embeds the object pictures, and those for IP-Adapter.
        requires_safety_checker: kept so that checkpoints of `StableDiffusionPipeline` load; nothing is enforced.
        adapter: object pictures to keys and values; made for this UNet.
        dino: compares prompts and segments; needed by compositional guidance.
        dino_processor: its mean, standard deviation and side; None: ImageNet's and 224.
        tiny_vae: decodes while tokens are refined, much cheaper than `vae`, which does so without one.

    Raises:
        CheckpointError: the components are not those of one Stable Diffusion 1.x/2.x checkpoint, or the adapter was
            made for another.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->adapter->unet->vae"
    _optional_components = [
        "safety_checker",
        "feature_extractor",
        "image_encoder",
        "adapter",
        "dino",
        "dino_processor",
        "tiny_vae",
    ]

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
        adapter: ObjectPromptAdapter | None = None,
        dino: Dinov2Model | None = None,
        dino_processor: BitImageProcessor | None = None,
        tiny_vae: AutoencoderTiny | None = None,
    ):
        super().__init__()
        self.check_adapter(adapter, unet)
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
        self.register_modules(adapter=adapter, dino=dino, dino_processor=dino_processor, tiny_vae=tiny_vae)
        self._caches: dict[str, dict[str, Any]] = {}  # features, keys and values of the last objects

    # ---- checks

    def check_inputs(
        self,
        call: CallArguments,
        objects: Any = None,
        background: Any = None,
        compositional_guidance: bool = False,
        options: GuidanceOptions | None = None,
    ) -> tuple[list[list[SceneObject]], list[Any], list[list[PlacedObject]], list[str]]:
        """Refuse what a call cannot use, before any model runs.

        Args:
            call: the arguments of a call.
            objects, background, compositional_guidance: as in `__call__`.
            options: of the guidance.

        Returns:
            Per prompt its objects (empty lists without `objects`), its background picture or None, and the placed
            objects; and the names of the layers whose attention is recorded.

        Raises:
            ObjectComposeError: or one of its subclasses, all of them `ValueError`; the message names the argument.
        """
        batch_size = self.check_call(call)
        options = GuidanceOptions() if options is None else options
        rows = as_scene_objects(objects, batch_size)
        backgrounds = _background_pictures(background, batch_size)
        own_layers: list[str] = []
        check_object_count(rows, MAX_PROMPTED_OBJECTS)
        for row in rows:
            require_object_fields(row, ["image"], type(self).__name__)
        if not any(rows) and (any(backgrounds) or compositional_guidance):
            name = "compositional_guidance" if compositional_guidance else "background"
            raise MissingFieldError(f"`{name}` needs `objects` with an `image` each, got none.")
        shown = [[item for item in row if item.scale] for row in rows]
        if any(shown) or any(backgrounds):
            own_layers = self.check_encoders()
            if has_model_hook(self.adapter, "group_offloading"):
                raise ObjectComposeError(
                    "`adapter` runs in parts and cannot be offloaded in blocks: leave it out, with"
                    ' `enable_group_offload(..., exclude_modules=["adapter"])`.'
                )
        placed = place_objects(
            self.tokenizer, call.prompt, rows, (call.height, call.width), lambda item: ("phrase", "image", "scale")
        )
        map_layers = self.check_attention(call, placed, own_layers)
        if compositional_guidance:
            if not any(shown):
                raise ObjectComposeError("`compositional_guidance` needs an object with a `scale` above 0.")
            has_phrases = all(item.phrase is not None for row in shown for item in row)
            check_guidance(self, call, options, has_phrases, batch_size * call.num_images_per_prompt)
        elif options.changed():
            raise ObjectComposeError(f"`{options.changed()[0]}` needs `compositional_guidance=True`.")
        return rows, backgrounds, placed, map_layers

    # ---- the method

    def unload_adapter(self) -> None:
        """Detach the adapter, and what was computed with it; the pipeline is the plain one then."""
        super().unload_adapter()
        self._caches.clear()

    def prompt_branch(
        self, rows: Sequence[Sequence[SceneObject]], backgrounds: Sequence[Any], num_images_per_prompt: int
    ) -> ObjectPromptBranch | None:
        """The branch of a call's object pictures; None where there is none, or all of them have scale 0.

        Args:
            rows: per prompt its objects; those of scale 0 take no part.
            backgrounds: per prompt a PIL image or None; it takes the slot after the objects.
            num_images_per_prompt: pictures per prompt.
        """
        rows = [[item for item in row if item.scale] for row in rows]
        if not any(rows) and not any(backgrounds):
            return None
        device, adapter = self._execution_device, self.adapter
        # prompts often share their objects: each picture is encoded once
        images = {id(item.image): item.image for row in rows for item in row}
        scenes = {id(image): image for image in backgrounds if image is not None}
        (key_tokens, value_tokens), null = prompt_tokens(
            adapter,
            self.image_encoder,
            self.feature_extractor,
            [*images.values()],
            [*scenes.values()],
            device,
            self._caches,
        )
        image_places = {name: place for place, name in enumerate(images)}
        scene_places = {name: len(images) + place for place, name in enumerate(scenes)}
        slots = [
            [(image_places[id(item.image)], item.scale) for item in row]
            + [(scene_places[id(scene)], 1.0) for _ in range(scene is not None)]
            for row, scene in zip(rows, backgrounds, strict=True)
            for _ in range(num_images_per_prompt)
        ]
        return ObjectPromptBranch(adapter, pack_tokens(key_tokens, value_tokens, null, slots), self._caches)

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
        background: Any = None,
        compositional_guidance: bool = False,
        segmenter: Any = None,
        mode: str = "exact",
        similarity_threshold: float = SIMILARITY_THRESHOLD,
        refinement_steps: int = REFINEMENT_STEPS,
        num_restarts: int = 0,
        parts: Sequence[Any] = (),
        return_attention: bool = False,
        attention_layers: str | Sequence[str] | None = None,
        attention_steps: Sequence[int] | None = None,
    ) -> Any:
        """Sample pictures.

        Args:
            objects: `SceneObject`s or dicts, one list for all prompts or one per prompt, at most 6 each. Each needs
                an `image`, best an RGBA cut-out; `scale` is its strength, 0 is as if it were not there; a `phrase`, if
                given, must occur in the prompt.
            background: a picture (PIL or path) of the scene behind them, or a list with one or None per prompt.
            compositional_guidance: sample twice. What the first picture shows is matched to the objects; the second
                one confines each object to its segment and refines how it looks there. Callbacks see both runs.
            segmenter: with `segment(picture)`, which returns masks, or with `ground(picture, phrases, on_missing)`,
                used where every object has a phrase; a `Grounder` for example.
            mode: "exact", or "fast": the first run takes half the steps.
            similarity_threshold: least cosine of DINO features between an object's picture and its segment.
            refinement_steps: how often tokens are refined; 0 only confines. Activations of one forward with gradients
                are held; `unet.enable_gradient_checkpointing()` trades them for time.
            num_restarts: how many further seeds the first run may try while an object is unmatched.

        All other arguments are those of `CallArguments`.

        Returns:
            `ComposeOutput`, or a tuple of its four fields with `return_dict=False`. With guidance its `objects` say
            what was matched, where, and how well. Where nothing matches it is the picture without guidance.

        Raises:
            ObjectComposeError: (a `ValueError`) for input it cannot use, before any model runs.
        """
        # 1. Refuse bad input; find the phrases
        call = self.take_arguments(locals())
        options = GuidanceOptions(segmenter, mode, similarity_threshold, refinement_steps, num_restarts)
        rows, backgrounds, placed, map_layers = self.check_inputs(
            call, objects, background, compositional_guidance, options
        )
        warn_unused_fields(placed, type(self).__name__, self._warned_unused)
        num_per_prompt = call.num_images_per_prompt
        placed = [list(row) for row in placed for _ in range(num_per_prompt)]  # per prompt -> per picture

        # 2. Timesteps, text, noise
        state = self.start_sampling(call, len(placed))

        # 3. Object pictures to tokens, keys and values: the branch beside the text's attention
        branch = self.prompt_branch(rows, backgrounds, num_per_prompt)

        # 4. One run; or two, the second one guided by what the first one shows
        if compositional_guidance:
            assert branch is not None  # some object has a scale above 0
            of_pictures = [row for row in rows for _ in range(num_per_prompt)]
            num_backgrounds = [int(scene is not None) for scene in backgrounds for _ in range(num_per_prompt)]
            guided = GuidedRun(self, call, options, branch, of_pictures, placed, map_layers, num_backgrounds)
            state, recorder = guided.run(state)
        else:
            recorder = self.make_recorder(call, placed, map_layers)
            self.denoise(call, state, [*call.parts, *([] if branch is None else [branch.part])], recorder)

        # 5. Pictures
        return self.finish_sampling(call, state, None if objects is None else placed, recorder)


def _background_pictures(background: Any, batch_size: int) -> list[Any]:
    """Per prompt a PIL image or None."""
    if not isinstance(background, (list, tuple)):
        picture = None if background is None else check_picture(background, "background")
        return [picture] * batch_size
    if len(background) != batch_size:
        raise LayoutError(
            f"`background` must hold one picture (or None) per prompt: {batch_size} prompts, got {len(background)}."
        )
    return [
        None if one is None else check_picture(one, f"background[{index}]") for index, one in enumerate(background)
    ]
