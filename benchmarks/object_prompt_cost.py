"""What ObjectPrompt costs beside plain sampling: unguided, and under compositional guidance.

    python -m benchmarks.object_prompt_cost

A UNet with the blocks, layers and heads of SD 1 at an eighth of its channels, and VAE, tiny VAE, CLIP, DINOv2 and
CLIPSeg at an eighth of theirs, so that what stands beside the UNet weighs as it does in the real models. Weights are
random: segments are given as quarters of the picture, one for each object, and any pair counts as a match.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    Dinov2Config,
    Dinov2Model,
)

from benchmarks.cost_file import cost_parser, parse_cost, write_cost
from benchmarks.measure import (
    measuring_encoder,
    measuring_inputs,
    measuring_unet,
    peak_memory,
    ratio_metrics,
    ratio_of_pairs,
)
from benchmarks.tokencompose_cost import measuring_scheduler
from objectcompose.adapters.object_prompt_adapter import ObjectPromptAdapter
from objectcompose.layout import SceneObject
from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline


SIDE, OBJECTS = 64, 4
#: What the ratios are of: of 8 updates two fall on one of the 20 steps. And what is run for it: all steps cost the
#: same, so three of them and one update tell.
STEPS, UPDATES = 20, 7
TIMED_STEPS, TIMED_UPDATES = 3, 1
MEMORY_STEPS = 2  # one of them refines; a peak needs no more
#: Of the unguided memory on the full shape. More than a call takes, as many as all methods are held to.
MEMORY_OBJECTS = 8
GUIDED: dict[str, Any] = {
    "compositional_guidance": True,
    "refinement_steps": TIMED_UPDATES,
    "similarity_threshold": -1,
}
CASES = ("unguided", "guided_exact", "guided_fast")
MEMORY_CASES = ("plain", "guided", "guided_checkpointed")
PROTOCOL = (
    "SD1-shaped UNet at 64x64 latents and an eighth of its channels (width 40), VAE, tiny VAE (TAESD's shape), CLIP"
    " ViT-H, DINOv2 B/14 and CLIPSeg at an eighth of theirs, float32, random weights, 4 objects of 16 tokens, from"
    " given text states to pixels, DDIM with guidance. A guided call of ObjectPromptPipeline with 3 steps in each"
    " run and one update of the appearance tokens, and one of StableDiffusionPipeline with 3 steps on the same"
    " components, sides alternated; callbacks tell the seconds of a step of either run, of an update, and of what"
    " happens once (object pictures to keys and values, decoding and matching, the last decoding). The ratios are"
    " sums of these for 20 steps and 7 updates: unguided: 20 steps of the first run; guided_exact: both runs with"
    " 20 steps; guided_fast: the first one with 10. Segments: quarters of the picture; the time of a CLIPSeg call"
    " with 4 phrases at 352 pixels is not in the ratios and listed as time_ratio.segmentation_n4. Memory, over plain"
    " sampling's, in a fresh process each: guided and guided_checkpointed (with gradient checkpointing of the UNet) on"
    " these models, peak of a call of 2 steps to latents, one of them refined, above weights;"
    f" unguided_n{MEMORY_OBJECTS}: peak of one guided step above what was loaded, {MEMORY_OBJECTS} objects, their"
    " pictures encoded in it, full width (320, text 768), an image encoder of ViT-H's widths with 2 layers. A call"
    " takes up to 6 objects, so that the branch of 8 is made by prompt_branch and given as one of the parts."
)


class TimedSegmenter:
    """A segmenter that keeps the seconds it takes.

    Args:
        segmenter: with `ground` or `segment`, called as it is.

    Attributes:
        seconds: of all calls within each run of `around`.
    """

    def __init__(self, segmenter: Any) -> None:
        self._segmenter = segmenter
        self.seconds: list[float] = []

    def around(self, run: Callable[[], Any]) -> Any:
        """Run something, and count the segmenter's seconds within it as one entry."""
        self.seconds.append(0.0)
        return run()

    def ground(self, *args: Any, **kwargs: Any) -> Any:
        """See `Grounder.ground`."""
        return self._timed(self._segmenter.ground, *args, **kwargs)

    def segment(self, picture: Image.Image) -> Any:
        """See `Grounder.segment`."""
        return self._timed(self._segmenter.segment, picture)

    def _timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        found = call(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[-1] += time.perf_counter() - started
        return found


class QuarterSegmenter:
    """Runs CLIPSeg on a picture with one phrase per object, and returns the quarters whatever it says."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        vision = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 12, "patch_size": 16}
        text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 8}
        config = CLIPSegConfig(
            text_config=text,
            vision_config={**vision, "image_size": 352},
            projection_dim=64,
            reduce_dim=8,
            decoder_intermediate_size=256,
        )
        self.model = CLIPSegForImageSegmentation(config).to(device).eval()
        self.text = torch.randint(1, 1000, (OBJECTS, 8), device=device)
        self.pixels = torch.zeros(OBJECTS, 3, 352, 352, device=device)

    @torch.no_grad()
    def segment(self, picture: Image.Image) -> list[torch.Tensor]:
        """Four masks of the picture's size."""
        self.model(input_ids=self.text, pixel_values=self.pixels)
        width, height = picture.size
        rows, columns = torch.arange(height)[:, None] < height // 2, torch.arange(width)[None] < width // 2
        return [(above & beside).float() for above in (rows, ~rows) for beside in (columns, ~columns)]


def small_models(device: str) -> dict[str, Any]:
    """Models beside UNet and VAE, an eighth of the real ones' channels."""
    torch.manual_seed(0)
    dino = Dinov2Config(
        hidden_size=96, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4, image_size=224, patch_size=14
    )
    blocks = (8, 8, 8, 8)
    models = {
        "image_encoder": measuring_encoder(160, 32, 16, 128),
        "dino": Dinov2Model(dino),
        "tiny_vae": AutoencoderTiny(encoder_block_out_channels=blocks, decoder_block_out_channels=blocks),
    }
    return {name: model.to(device).eval() for name, model in models.items()}


def small_vae(device: str) -> AutoencoderKL:
    """Stable Diffusion's VAE at an eighth of its channels."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=8 * SIDE,
    )
    return vae.to(device).eval()


def object_pictures(count: int = OBJECTS) -> list[dict[str, Any]]:
    """Cut-outs of noise, one for each object."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 224, 224, 4), generator=generator, dtype=torch.uint8)
    pixels[..., 3] = 255
    return [{"image": Image.fromarray(one.numpy(), "RGBA")} for one in pixels]


def make_pipeline(is_ours: bool, device: str) -> Any:
    """One side on components with the same random weights."""
    unet = measuring_unet().to(device)
    components = {
        "vae": small_vae(device),
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet,
        "scheduler": measuring_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if is_ours:
        models = small_models(device)
        adapter = ObjectPromptAdapter.from_unet(unet, image_encoder=models["image_encoder"]).to(device).eval()
        pipeline: Any = ObjectPromptPipeline(**components, **models, adapter=adapter)
    else:
        pipeline = StableDiffusionPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class TimedCall:
    """A call of one side, which returns the seconds from its start to the end of each step and of itself.

    Our side encodes its objects anew.
    """

    def __init__(
        self, is_ours: bool, arguments: dict[str, Any], device: str, steps: int = TIMED_STEPS, output_type: str = "pil"
    ) -> None:
        self.is_ours, self.pipeline = is_ours, make_pipeline(is_ours, device)
        text = measuring_inputs(self.pipeline.unet)["encoder_hidden_states"]
        self.arguments = {
            "prompt_embeds": text[:1],
            "negative_prompt_embeds": text[1:],
            "num_inference_steps": steps,
            "height": SIDE * 8,
            "width": SIDE * 8,
            "output_type": output_type,
            **({"objects": object_pictures()} if is_ours else {}),
            **arguments,
        }

    def __call__(self) -> list[float]:
        if self.is_ours:
            self.pipeline._caches.clear()
        started, ends = time.perf_counter(), []

        def note_end(*step: Any) -> dict[str, Any]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter() - started)
            return {}

        generator = torch.Generator().manual_seed(0)
        self.pipeline(**self.arguments, generator=generator, callback_on_step_end=note_end)
        note_end()
        return ends


def prepare_memory(case: str, device: str = "cpu") -> Callable[[], Any]:
    """For `peak_memory`: a short call of one of `MEMORY_CASES`."""
    arguments = {**GUIDED, "segmenter": QuarterSegmenter(device)} if case.startswith("guided") else {}
    call = TimedCall(case != "plain", arguments, device, MEMORY_STEPS, "latent")
    if case == "guided_checkpointed":
        call.pipeline.unet.enable_gradient_checkpointing()
    return call


def prepare_full_memory(count: int, device: str = "cpu") -> Callable[[], Any]:
    """For `peak_memory`: one step of SD 1.5's full shape with so many objects; 0: the plain pipeline's."""
    unet = measuring_unet(width=320, cross_attention_dim=768).to(device)
    components: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None}
    components |= {"unet": unet, "scheduler": measuring_scheduler(), "feature_extractor": None}
    if count:
        encoder = measuring_encoder(1280, 2, 16, 1024).to(device)
        adapter = ObjectPromptAdapter.from_unet(unet, image_encoder=encoder).to(device).eval()
        pipeline: Any = ObjectPromptPipeline(**components, image_encoder=encoder, adapter=adapter)
    else:
        pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    text = measuring_inputs(unet)["encoder_hidden_states"]
    objects = [SceneObject(**one) for one in object_pictures(count)]

    @torch.no_grad()
    def run() -> Any:
        parts = {"parts": [pipeline.prompt_branch([objects], [None], 1).part]} if count else {}
        return pipeline(
            prompt_embeds=text[:1],
            negative_prompt_embeds=text[1:],
            num_inference_steps=1,
            height=SIDE * 8,
            width=SIDE * 8,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **parts,
        )

    return run


def time_rows(device: str, pairs: int) -> list[dict[str, Any]]:
    """Seconds of the parts of a guided call and of a plain one, in pairs."""
    segmenter = TimedSegmenter(QuarterSegmenter(device))
    plain, ours = TimedCall(False, {}, device), TimedCall(True, {**GUIDED, "segmenter": segmenter}, device)
    rows = []
    for pair in range(-1, pairs):  # the first one warms up
        found: dict[str, list[float]] = {}
        sides = {"plain": plain, "ours": lambda: segmenter.around(ours)}
        for side in sides if pair % 2 == 0 else reversed(sides):  # ABBA
            found[side] = sides[side]()
        if pair >= 0:
            parts = {**plain_parts(found["plain"]), **guided_parts(found["ours"], segmenter.seconds[-1])}
            rows.append({"case": "time", "pair": pair, **parts})
    return rows


def plain_parts(ends: Sequence[float]) -> dict[str, float]:
    """Seconds of a step of plain sampling, and of all that happens once."""
    *steps, whole = ends
    step = (steps[-1] - steps[0]) / (len(steps) - 1)
    return {"plain_step": step, "plain_once": whole - len(steps) * step}


def guided_parts(ends: Sequence[float], segmentation: float) -> dict[str, float]:
    """Seconds of the parts of a guided call with one update.

    Args:
        ends: of the steps of both runs, and of the call.
        segmentation: seconds of the segmenter, which lie between the runs.
    """
    *steps, whole = ends
    first, second = steps[:TIMED_STEPS], steps[TIMED_STEPS:]
    first_step = (first[-1] - first[0]) / (TIMED_STEPS - 1)
    later = [after - before for before, after in zip(second, second[1:], strict=False)]
    refined, confined = later  # of the timesteps 667, 334 and 1 the second is the one nearest to an update's 500
    between = second[0] - first[-1] - segmentation
    return {
        "first_step": first_step,
        "prepare": first[0] - first_step,
        "second_step": confined,
        "update": refined - confined,
        "match": between - confined,
        "decode": whole - second[-1],
        "segmentation": segmentation,
    }


def memory_rows() -> list[dict[str, Any]]:
    """Peak memory of each memory case, on the small models and on the full shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for case in MEMORY_CASES:
        peak = peak_memory("benchmarks.object_prompt_cost:prepare_memory", case=case, device=device)
        rows.append({"case": "memory", "side": case, "device": peak.device, "extra_bytes": peak.extra_bytes})
    for count in (MEMORY_OBJECTS, 0):
        peak = peak_memory("benchmarks.object_prompt_cost:prepare_full_memory", count=count, device=device)
        facts = {"device": peak.device, "extra_bytes": peak.extra_bytes, "loaded_bytes": peak.loaded_bytes}
        rows.append({"case": "memory_full", "objects": count, **facts})
    return rows


def metrics_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, float | bool]:
    """All figures of the result file from its raw rows."""
    metrics: dict[str, float | bool] = {}
    times = [row for row in rows if row["case"] == "time"]
    plain = [row["plain_once"] + STEPS * row["plain_step"] for row in times]
    for case in CASES:
        found = ratio_of_pairs([_whole_call(case, row) for row in times], plain)
        name = f"time_ratio.{case}_n{OBJECTS}"
        metrics |= ratio_metrics(name, found)
    for part in ("segmentation", "match", "prepare", "update"):
        apart = [row[part] / whole for row, whole in zip(times, plain, strict=True)]
        metrics[f"time_ratio.{part}_n{OBJECTS}"] = statistics.median(apart)
    peaks = {row["side"]: row["extra_bytes"] for row in rows if row["case"] == "memory"}
    for side in MEMORY_CASES[1:]:
        metrics[f"memory_ratio.{side}"] = peaks[side] / peaks["plain"]
    whole = {row["objects"]: row["extra_bytes"] for row in rows if row["case"] == "memory_full"}
    metrics[f"memory_ratio.unguided_n{MEMORY_OBJECTS}"] = whole[MEMORY_OBJECTS] / whole[0]
    return metrics


def _whole_call(case: str, row: dict[str, Any]) -> float:
    """Seconds of a call of `STEPS` steps without segmentation."""
    once = row["prepare"] + row["decode"]
    if case == "unguided":
        return once + STEPS * row["first_step"]
    first_steps = STEPS if case == "guided_exact" else STEPS // 2
    return once + first_steps * row["first_step"] + row["match"] + STEPS * row["second_step"] + UPDATES * row["update"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write `benchmarks/results/object_prompt_cost.json`."""
    args = parse_cost(cost_parser(__doc__), argv)
    rows = memory_rows() + time_rows(args.device, args.pairs)
    return write_cost("object_prompt_cost", args, rows, metrics_of_rows, PROTOCOL)


if __name__ == "__main__":
    raise SystemExit(main())
