"""What box control costs: MIFOPipeline with its full schedule beside plain sampling, and the plain way beside it.

    python -m benchmarks.mifo
    python -m benchmarks.mifo --full-memory              # also the peak memory on the full shape, and of learning
    python -m benchmarks.mifo --device cuda --width 320 --text-width 1024 --steps 50

A full schedule is 15 guided of 50 steps with 5 iterations each, none left out by the early stop, masks refined 7
times. Fewer steps keep that ratio (3 of 10), so that the ratios stay the same. The plain way takes minutes for that:
of it one step and one iteration are measured, and counted as often as a schedule has them. On a GPU the keys begin
with `gpu.`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.cost_file import cost_parser, parse_cost, write_cost
from benchmarks.measure import flops, measuring_unet, paired_ratio, peak_memory, ratio_metrics, ratio_of_pairs
from benchmarks.naive_box_control import NaiveBoxControl, naive_sampling
from objectcompose.attention_processors.box_layers import control_layers
from objectcompose.layout import SceneObject
from objectcompose.pipelines.pipeline_mifo import MIFOPipeline
from objectcompose.pipelines.placement import place_phrases
from objectcompose.pipelines.subject_tokens import prompt_subjects
from objectcompose.toybox.tokenizer import build_tokenizer
from objectcompose.training.loop import Draw
from objectcompose.training.mifo_losses import MIFOLosses, MIFOLossOptions, SceneLatents, learning_layers
from objectcompose.training.mifo_scene import InstanceScene
from objectcompose.training.placeholders import Placeholders
from objectcompose.training.trainable import select_trainable


PROMPT = "a photo of a dog and a cat"
BOXES = ((0.05, 0.3, 0.45, 0.9), (0.55, 0.3, 0.95, 0.9))
OBJECTS = tuple(SceneObject(phrase=name, box=box) for name, box in zip(("dog", "cat"), BOXES, strict=True))
SIDE, MEMORY_REPEATS, MEMORY_STEPS = 64, 3, 4
SIDES = ("plain", "ours", "naive")
SCHEDULE_STEPS, SCHEDULE_ITERATIONS = 50, 15 * 5
#: The text encoder of Stable Diffusion 2.1, for learning, which goes through it.
FULL_WIDTH, FULL_TEXT_WIDTH, FULL_TEXT_LAYERS = 320, 1024, 23
PROTOCOL = (
    "SD2-shaped UNet at 64x64 latents, float32, random weights, one picture with guidance, DDIM, to latents; text"
    " encoder of one layer on all sides. Ours: MIFOPipeline, two boxes, 15 guided of 50 steps (or as many in"
    " proportion), 5 iterations in each of them (no early stop), masks refined. Naive: whole tables with float masks"
    " in every layer, guidance on both halves through the whole UNet, no refinement; one step and one iteration"
    " measured, counted 50 and 75 times. Ratios over StableDiffusionPipeline with the same steps, sides alternated."
    f" Memory: {MEMORY_STEPS} steps, one guided (naive: one step, one iteration), in fresh processes, median of"
    f" {MEMORY_REPEATS}: CUDA peak with weights; on a CPU the peak above what was loaded. Full memory and learning: on"
    " the shape of Stable Diffusion 2.1 in float32, weights included, peak of a fresh process less what Python and its"
    f" libraries hold; sampling: {MEMORY_STEPS} steps, one guided; learning: one optimizer step of stage 1, and of"
    " stage 2 with LoRA and a class picture."
)


def measuring_components(width: int, text_width: int, device: str, text_layers: int = 1) -> dict[str, Any]:
    """Components of a Stable Diffusion 2 pipeline without a VAE; random weights, seeded."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return {
        "vae": None,
        "text_encoder": CLIPTextModel(config).eval().to(device),
        "tokenizer": tokenizer,
        "unet": measuring_unet("sd2", width=width, cross_attention_dim=text_width).to(device),
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }


def prepare_call(
    side: str, steps: int, width: int = 40, text_width: int = 96, device: str | None = None
) -> Callable[[], Any]:
    """One picture to latents, as `side` does it; also for `peak_memory`.

    "naive" is `steps` steps, of which the first is guided by one iteration; "naive_step" is without it.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    components = measuring_components(width, text_width, place)
    common: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    if side.startswith("naive"):
        return _prepare_naive(components, steps, int(side == "naive"), place)
    if side == "ours":
        pipeline: Any = MIFOPipeline(**components)
        common |= {"objects": list(OBJECTS), "box_control": {"stop_below": 0.0}}
    else:
        pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **common)


def _prepare_naive(components: dict[str, Any], steps: int, guided_steps: int, device: str) -> Callable[[], Any]:
    pipeline = MIFOPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    placed = place_phrases(pipeline.tokenizer, PROMPT, list(OBJECTS), (8 * SIDE, 8 * SIDE), ("phrase",), "naive")[0]
    subjects = prompt_subjects(pipeline.tokenizer, PROMPT, OBJECTS, placed)
    control = NaiveBoxControl(subjects, BOXES, control_layers(pipeline.unet, (SIDE, SIDE)).loss)

    def run() -> torch.Tensor:
        with torch.no_grad():
            embeds, negative = pipeline.encode_prompt(PROMPT, device, 1, True)
        assert negative is not None
        noise = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)
        text = torch.cat([negative, embeds])
        return naive_sampling(
            pipeline.unet, pipeline.scheduler, noise, text, control, steps, guided_steps, iterations=1
        )

    return run


def prepare_learning(
    stage: Literal[1, 2], width: int, text_width: int, text_layers: int, device: str | None = None
) -> Callable[[], Any]:
    """For `peak_memory`: one optimizer step of learning two instances; stage 2 with LoRA and a class picture."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parts = measuring_components(width, text_width, place, text_layers)
    unet, encoder = parts["unet"].requires_grad_(False), parts["text_encoder"].requires_grad_(False)
    # Only its shapes count: the real one encodes the picture once, before anything is trained.
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
    ).to(place)
    masks = torch.zeros(2, 8 * SIDE, 8 * SIDE)
    for mask, (x0, y0, x1, y1) in zip(masks, BOXES, strict=True):
        mask[int(y0 * 8 * SIDE) : int(y1 * 8 * SIDE), int(x0 * 8 * SIDE) : int(x1 * 8 * SIDE)] = 1
    scene = InstanceScene(torch.zeros(3, 8 * SIDE, 8 * SIDE), masks)
    placeholders = Placeholders(parts["tokenizer"], encoder, ["<asset0>", "<asset1>"])
    trained = [placeholders.vectors]
    prior = None
    if stage == 2:
        trained += select_trainable(unet, "lora").values()
        prior = (torch.zeros(1, 8, SIDE, SIDE, device=place), "a photo at the beach")
    options = MIFOLossOptions(reward_steps=0, gate=1000, prior_weight=float(stage == 2))
    losses = MIFOLosses(
        unet,
        encoder,
        DDPMScheduler.from_config(parts["scheduler"].config),
        scene,
        SceneLatents(scene, vae, options.sampling),
        placeholders,
        learning_layers(unet, (SIDE, SIDE), stage),
        options,
        prior,
    )
    optimizer = torch.optim.AdamW(trained)

    def run() -> None:
        with placeholders.in_place(), losses([Draw(0, torch.Generator().manual_seed(0))]) as found:
            found["loss"].backward()
        optimizer.step()

    return run


def prepare_nothing() -> Callable[[], Any]:
    """For `peak_memory`: what Python and the libraries hold."""
    return lambda: None


def flops_rows(steps: int, width: int, text_width: int, device: str) -> list[dict[str, Any]]:
    """Floating-point operations of plain sampling and of ours, and of the naive way's step and iteration."""
    counted = (("plain", steps), ("ours", steps), ("naive", 1), ("naive_step", 1))
    return [
        {
            "case": "flops",
            "side": side,
            "steps": number,
            "flops": flops(prepare_call(side, number, width, text_width, device)),
        }
        for side, number in counted
    ]


def time_rows(pairs: int, steps: int, width: int, text_width: int, device: str) -> list[dict[str, Any]]:
    """Paired times of ours and plain sampling, and of the naive way with and without an iteration."""
    rows = []
    for side, other, number in (("ours", "plain", steps), ("naive", "naive_step", 1)):
        run, beside = (prepare_call(name, number, width, text_width, device) for name in (side, other))
        found = paired_ratio(run, beside, pairs=pairs).rows()
        rows += [{"case": "time", "side": side, "steps": number, **row} for row in found]
    return rows


def memory_rows(width: int, text_width: int) -> list[dict[str, Any]]:
    """Peak memory of each side in fresh processes."""
    rows = []
    for side in SIDES * MEMORY_REPEATS:
        steps = 1 if side == "naive" else MEMORY_STEPS
        arguments = {"side": side, "steps": steps, "width": width, "text_width": text_width}
        rows.append({"case": "memory", "side": side, **_peak("prepare_call", **arguments)})
    return rows


def full_rows() -> list[dict[str, Any]]:
    """Peak memory of sampling and learning on the full shape, in fresh processes."""
    shape = {"width": FULL_WIDTH, "text_width": FULL_TEXT_WIDTH}
    rows = [{"case": "full", "side": "nothing", **_peak("prepare_nothing")}]
    for side in ("plain", "ours"):
        rows.append({"case": "full", "side": side, **_peak("prepare_call", side=side, steps=MEMORY_STEPS, **shape)})
    shape["text_layers"] = FULL_TEXT_LAYERS
    for stage, side in ((1, "stage1"), (2, "stage2_lora")):
        rows.append({"case": "full", "side": side, **_peak("prepare_learning", stage=stage, **shape)})
    return rows


def _peak(function: str, **arguments: Any) -> dict[str, Any]:
    return asdict(peak_memory(f"benchmarks.mifo:{function}", **arguments))


def metrics_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, float | bool]:
    """All figures of the result file from its raw rows."""
    metrics: dict[str, float | bool] = {}
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    count = {row["side"]: row["flops"] / row["steps"] for row in cases.get("flops", [])}  # per step
    if count:
        metrics["flops_ratio.ours"] = count["ours"] / count["plain"]
        naive = _schedule(count["naive"], count["naive_step"])
        metrics["flops_ratio.naive"] = naive / (SCHEDULE_STEPS * count["plain"])
    ours, naive_rows = ([row for row in cases.get("time", []) if row["side"] == side] for side in SIDES[1:])
    if ours:
        plain = [row["seconds_b"] / row["steps"] * SCHEDULE_STEPS for row in ours]
        whole = {
            "ours": [row["seconds_a"] / row["steps"] * SCHEDULE_STEPS for row in ours],
            "naive": [_schedule(row["seconds_a"], row["seconds_b"]) for row in naive_rows],
        }
        for side, seconds in whole.items():
            found, name = ratio_of_pairs(seconds, plain), f"time_ratio.{side}"
            metrics |= ratio_metrics(name, found)
    if memory := cases.get("memory", []):
        peaks = {
            side: statistics.median(_counted_bytes(row) for row in memory if row["side"] == side) for side in SIDES
        }
        metrics |= {f"memory_ratio.{side}": peaks[side] / peaks["plain"] for side in ("ours", "naive")}
    if full := cases.get("full", []):
        held = {row["side"]: row["loaded_bytes"] + row["extra_bytes"] for row in full}
        peak = {side: size - held["nothing"] for side, size in held.items()}
        metrics["full_memory_ratio.ours"] = peak["ours"] / peak["plain"]
        metrics |= {f"learning_peak_gib.{side}": peak[side] / 2**30 for side in ("stage1", "stage2_lora")}
    is_gpu = any(row.get("device") == "cuda" for row in rows)
    return {f"gpu.{name}" if is_gpu else name: value for name, value in metrics.items()}


def _schedule(with_iteration: float, step: float) -> float:
    """A full schedule of the naive way, from a step with one iteration before it and a step alone."""
    return SCHEDULE_STEPS * step + SCHEDULE_ITERATIONS * (with_iteration - step)


def _counted_bytes(row: dict[str, Any]) -> int:
    """On CUDA weights count; on a CPU only what the call adds, since a process holds much else."""
    return row["extra_bytes"] + (row["loaded_bytes"] if row["device"] == "cuda" else 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write `benchmarks/results/mifo_cost.json`, on a GPU `mifo_cost_gpu.json`."""
    parser = cost_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="of the timed calls, a multiple of 10")
    parser.add_argument("--width", type=int, default=40, help="channels of the first level; 320 is the full shape")
    parser.add_argument("--text-width", type=int, default=96, help="1024 is the full shape")
    parser.add_argument("--full-memory", action="store_true", help="also peaks on the full shape, and of learning")
    parser.add_argument("--flops-only", action="store_true", help="print ratios of FLOPs; no file")
    args = parse_cost(parser, argv)
    rows = flops_rows(args.steps, args.width, args.text_width, args.device)
    if args.flops_only:
        for name, value in metrics_of_rows(rows).items():
            print(f"{name}: {value:.4f}")
        return 0
    rows += time_rows(args.pairs, args.steps, args.width, args.text_width, args.device)
    rows += memory_rows(args.width, args.text_width)
    if args.full_memory:
        rows += full_rows()
    name = "mifo_cost_gpu" if args.device.startswith("cuda") else "mifo_cost"
    return write_cost("mifo", args, rows, metrics_of_rows, PROTOCOL, name)


if __name__ == "__main__":
    raise SystemExit(main())
