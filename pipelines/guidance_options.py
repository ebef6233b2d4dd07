"""The options of compositional guidance, and what it needs of a pipeline and a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from objectcompose.errors import CheckpointError, ObjectComposeError
from objectcompose.pipelines.call_arguments import CallArguments
from objectcompose.pipelines.call_checks import check_count, check_number
from objectcompose.pipelines.gradient_passes import check_gradients_allowed, check_weights_stay
from objectcompose.pipelines.object_matching import SIMILARITY_THRESHOLD, check_segmenter, dino_side
from objectcompose.pipelines.token_refinement import PREDICTION_TYPES, REFINEMENT_STEPS, signal_share


GUIDANCE_MODES = ("exact", "fast")


@dataclass(frozen=True, eq=False)
class GuidanceOptions:
    """How to guide; see `ObjectPromptPipeline.__call__`.

    Attributes:
        segmenter: finds segments; see `check_segmenter`.
        mode: one of `GUIDANCE_MODES`.
        similarity_threshold: least cosine of a pair, in [-1, 1].
        refinement_steps: number of updates; 0 only confines.
        num_restarts: how many further seeds may be tried where an object is unmatched.
    """

    segmenter: Any = None
    mode: str = "exact"
    similarity_threshold: float = SIMILARITY_THRESHOLD
    refinement_steps: int = REFINEMENT_STEPS
    num_restarts: int = 0

    def changed(self) -> list[str]:
        """Names of the options that were set, for calls without guidance."""
        default = vars(GuidanceOptions())
        return [name for name, value in vars(self).items() if value is not default[name] and value != default[name]]


def check_guidance(
    pipeline: Any, call: CallArguments, options: GuidanceOptions, has_phrases: bool, num_images: int
) -> None:
    """Refuse guidance that cannot be given, before any model runs.

    Args:
        pipeline: with the components that guidance needs.
        call: the arguments, which passed `check_call`.
        options: of the call.
        has_phrases: whether every object has a phrase.
        num_images: M, pictures of the call.

    Raises:
        CheckpointError: `dino` or `vae` is missing, or `dino` or `tiny_vae` does not fit.
        ObjectComposeError: an option breaks its rule.
    """
    if options.mode not in GUIDANCE_MODES:
        raise ObjectComposeError(f"`mode` must be one of {', '.join(GUIDANCE_MODES)}, got {options.mode!r}.")
    check_number("similarity_threshold", options.similarity_threshold, minimum=-1.0)
    check_count("refinement_steps", options.refinement_steps, minimum=0)
    check_count("num_restarts", options.num_restarts, minimum=0)
    check_segmenter(options.segmenter, has_phrases)
    dino_side(pipeline.dino, pipeline.dino_processor)
    if pipeline.vae is None:
        raise CheckpointError("`vae` is needed for `compositional_guidance=True`, got None.")
    if options.num_restarts and call.latents is not None:
        raise ObjectComposeError("`num_restarts` draws new noise and cannot be used with `latents`.")
    if options.num_restarts and num_images > 1 and not isinstance(call.generator, list):
        raise ObjectComposeError(
            f"`num_restarts` for {num_images} pictures needs a list of `generator`s, one per picture, since each"
            " picture keeps the noise of its best run."
        )
    if options.refinement_steps:
        _check_refinable(pipeline, call.parts)


def _check_refinable(pipeline: Any, parts: Sequence[Any]) -> None:
    remedy = "use `refinement_steps=0` to confine objects only"
    kind = pipeline.scheduler.config.prediction_type
    if kind not in PREDICTION_TYPES:
        raise ObjectComposeError(f"`scheduler` must predict one of {', '.join(PREDICTION_TYPES)}, got {kind!r}.")
    signal_share(pipeline.scheduler, 0)
    check_gradients_allowed(pipeline.unet, "refinement_steps", remedy)
    decoder = "vae" if pipeline.tiny_vae is None else "tiny_vae"
    through = {name: getattr(pipeline, name) for name in ("unet", decoder, "dino", "adapter")}
    check_weights_stay(through, "refinement_steps", remedy)
    if any(parameter.device.type == "meta" for parameter in pipeline.unet.parameters()):
        raise ObjectComposeError(f"`refinement_steps` cannot work under sequential offloading; {remedy}.")
    for index, part in enumerate(parts):
        if part.kind in ("mask", "branch") and getattr(part, "rows", None) is not None:
            raise ObjectComposeError(
                f"`parts[{index}]` names batch rows ({part.rows}), which mean others where refinement runs the"
                f" conditional half alone; {remedy}."
            )
    if pipeline.tiny_vae is not None:
        config = pipeline.tiny_vae.config
        factor = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
        found = (config.latent_channels, factor)
        wanted = (pipeline.unet.config.in_channels, pipeline.vae_scale_factor)
        if found != wanted:
            raise CheckpointError(
                f"`tiny_vae` must decode what `vae` does, {wanted[0]} channels, {wanted[1]} pixels per cell, got"
                f" {found}."
            )
    if hasattr(pipeline.unet, "_hf_hook") and pipeline.tiny_vae is None:
        raise ObjectComposeError(
            "`refinement_steps` under model offloading needs `tiny_vae` (an AutoencoderTiny), because decoding with"
            f" `vae` moves the UNet away before the gradient is back; or {remedy}."
        )
