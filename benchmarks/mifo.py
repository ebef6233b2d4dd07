"""What box control costs: MIFOPipeline with its full schedule beside plain sampling, and the plain way beside it.

    python -m benchmarks.mifo
    python -m benchmarks.mifo --device cuda --width 320 --text-width 1024 --steps 50

A full schedule is 15 guided of 50 steps with 5 iterations each, none left out by the early stop, masks refined 7
times. Fewer steps keep that ratio (3 of 10), so that the ratios stay the same. On a GPU the keys begin with `gpu.`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.measure import flops, measuring_unet, paired_ratio, peak_memory, ratio_of_pairs
from benchmarks.naive_box_control import NaiveBoxControl, naive_sampling
from objectcompose.attention_processors.box_layers import control_layers
from objectcompose.attention_processors.box_loss import scaled_steps
from objectcompose.evaluation.results import write_result
from objectcompose.layout import SceneObject
from objectcompose.pipelines.pipeline_mifo import MIFOPipeline
from objectcompose.pipelines.placement import place_phrases
from objectcompose.pipelines.subject_tokens import prompt_subjects
from objectcompose.toybox.tokenizer import build_tokenizer


PROMPT = "a photo of a dog and a cat"
BOXES = ((0.05, 0.3, 0.45, 0.9), (0.55, 0.3, 0.95, 0.9))
OBJECTS = tuple(SceneObject(phrase=name, box=box) for name, box in zip(("dog", "cat"), BOXES, strict=True))
SIDE, MEMORY_REPEATS, MEMORY_STEPS = 64, 3, 4
SIDES = ("plain", "ours", "naive")
PROTOCOL = (
    "SD2-shaped UNet at 64x64 latents, float32, random weights, one picture with guidance, DDIM, to latents; text"
    " encoder of one layer on all sides. Ours: MIFOPipeline, two boxes, 15 guided of 50 steps (or as many in"
    " proportion), 5 iterations in each of them (no early stop), masks refined. Naive: whole tables with float masks"
    " in every layer, guidance on both halves through the whole UNet, no refinement. Ratios over"
    " StableDiffusionPipeline with the same steps, sides alternated. FLOPs at 50 steps. Memory:"
    f" {MEMORY_STEPS} steps, one guided, in fresh processes, median of {MEMORY_REPEATS}: CUDA peak with weights; on a"
    " CPU the peak above what was loaded."
)


def measuring_components(width: int, text_width: int, device: str) -> dict[str, Any]:
    """Components of a Stable Diffusion 2 pipeline without a VAE; random weights, seeded."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=text_width,
        num_hidden_layers=1,
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
    """One picture to latents, as `side` does it; also for `peak_memory`."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    components = measuring_components(width, text_width, place)
    common: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    if side == "naive":
        return _prepare_naive(components, steps, place)
    if side == "ours":
        pipeline: Any = MIFOPipeline(**components)
        common |= {"objects": list(OBJECTS), "box_control": {"stop_below": 0.0}}
    else:
        pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **common)


def _prepare_naive(components: dict[str, Any], steps: int, device: str) -> Callable[[], Any]:
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
        return naive_sampling(pipeline.unet, pipeline.scheduler, noise, text, control, steps, scaled_steps(15, steps))

    return run


def flops_rows(sides: Sequence[str], steps: int, width: int, text_width: int, device: str) -> list[dict[str, Any]]:
    """Floating-point operations of whole calls."""
    return [
        {"case": "flops", "side": side, "flops": flops(prepare_call(side, steps, width, text_width, device))}
        for side in sides
    ]


def time_rows(pairs: int, steps: int, width: int, text_width: int, device: str) -> list[dict[str, Any]]:
    """Paired times of ours and of the naive way against plain sampling."""
    plain, ours, naive = (prepare_call(side, steps, width, text_width, device) for side in SIDES)
    rows = []
    for side, run in (("ours", ours), ("naive", naive)):
        rows += [{"case": "time", "side": side, **row} for row in paired_ratio(run, plain, pairs=pairs).rows()]
    return rows


def memory_rows(width: int, text_width: int) -> list[dict[str, Any]]:
    """Peak memory of each side in fresh processes."""
    rows = []
    for side in SIDES * MEMORY_REPEATS:
        arguments = {"side": side, "steps": MEMORY_STEPS, "width": width, "text_width": text_width}
        peak = peak_memory("benchmarks.mifo:prepare_call", **arguments)
        row = {"case": "memory", "side": side, "device": peak.device}
        rows.append({**row, "loaded_bytes": peak.loaded_bytes, "extra_bytes": peak.extra_bytes})
    return rows


def metrics_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, float | bool]:
    """All figures of the result file from its raw rows."""
    metrics: dict[str, float | bool] = {}
    count = {row["side"]: row["flops"] for row in rows if row["case"] == "flops"}
    for side in ("ours", "naive"):
        if side in count:
            metrics[f"flops_ratio.{side}"] = count[side] / count["plain"]
        pairs = [row for row in rows if row["case"] == "time" and row["side"] == side]
        if pairs:
            found = ratio_of_pairs([row["seconds_a"] for row in pairs], [row["seconds_b"] for row in pairs])
            name = f"time_ratio.{side}"
            metrics |= {name: found.ratio, f"{name}.iqr": found.iqr, f"{name}.valid": found.valid}
    memory = [row for row in rows if row["case"] == "memory"]
    if memory:
        peaks = {
            side: statistics.median(_counted_bytes(row) for row in memory if row["side"] == side) for side in SIDES
        }
        metrics |= {f"memory_ratio.{side}": peaks[side] / peaks["plain"] for side in ("ours", "naive")}
    is_gpu = any(row.get("device") == "cuda" for row in memory)
    return {f"gpu.{name}" if is_gpu else name: value for name, value in metrics.items()}


def _counted_bytes(row: dict[str, Any]) -> int:
    """On CUDA weights count; on a CPU only what the call adds, since a process holds much else."""
    return row["extra_bytes"] + (row["loaded_bytes"] if row["device"] == "cuda" else 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write `benchmarks/results/mifo_cost.json`, on a GPU `mifo_cost_gpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="of times and FLOPs; memory uses CUDA where there is one")
    parser.add_argument("--pairs", type=int, default=7, help="timed runs of each side")
    parser.add_argument("--steps", type=int, default=10, help="of the timed calls, a multiple of 10")
    parser.add_argument("--width", type=int, default=40, help="channels of the first level; 320 is the full shape")
    parser.add_argument("--text-width", type=int, default=96, help="1024 is the full shape")
    parser.add_argument("--flops-only", action="store_true", help="print FLOPs of plain sampling and ours; no file")
    parser.add_argument("--folder", default="benchmarks/results", help="where the result goes")
    args = parser.parse_args(argv)
    if args.flops_only:
        rows = flops_rows(("plain", "ours"), args.steps, args.width, args.text_width, args.device)
    else:
        rows = flops_rows(SIDES, 50, args.width, args.text_width, args.device)
        rows += time_rows(args.pairs, args.steps, args.width, args.text_width, args.device)
        rows += memory_rows(args.width, args.text_width)
    metrics = metrics_of_rows(rows)
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    if args.flops_only:
        return 0
    options = f"--device {args.device} --pairs {args.pairs} --steps {args.steps}"
    write_result(
        "mifo_cost_gpu" if args.device.startswith("cuda") else "mifo_cost",
        metrics,
        rows,
        command=f"python -m benchmarks.mifo {options} --width {args.width} --text-width {args.text_width}",
        seeds=[0],
        protocol=PROTOCOL,
        recompute="benchmarks.mifo:metrics_of_rows",
        folder=args.folder,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
