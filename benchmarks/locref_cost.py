"""What LocRef costs beside plain sampling: time by number of objects, peak memory.

    python -m benchmarks.locref_cost
    python -m benchmarks.locref_cost --device cuda

Times and FLOPs are of whole calls, references encoded in them, on a UNet with the blocks, layers and heads of SD 1 and
few channels, at 64 x 64 latents; memory is of SD 1.5's full shape.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from benchmarks.cost_file import cost_parser, parse_cost, write_cost
from benchmarks.measure import (
    flops,
    measuring_encoder,
    measuring_inputs,
    measuring_unet,
    peak_memory,
    ratio_metrics,
    ratio_of_pairs,
)
from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.layout import SceneObject
from objectcompose.pipelines.pipeline_locref import LocRefPipeline


SIDE, STEPS = 64, 2
#: Objects of the timed calls, and of those whose FLOPs are counted; 0 is the plain pipeline.
TIMED, COUNTED = (0, 4, 12, 20), (0, 1, 4, 12, 20)
MEMORY_OBJECTS, MEMORY_REPEATS = 8, 1
#: ViT-H/14 costs 0.42 of a forward of SD 1.5 for each picture, and a call has 50 guided steps. So that calls of
#: `STEPS` steps have the same share, the encoder here is as much smaller.
ENCODER_SHARE = 0.42 * STEPS / 50
PROTOCOL = (
    "SD1-shaped UNet at 64x64 latents, width 40, float32, random weights, with guidance, to latents, from given text"
    f" states, {STEPS} DDIM steps; LocRefPipeline (16 tokens a picture, composite image, boxes in rows) beside"
    " StableDiffusionPipeline on the same UNet. Whole calls: references prepared and encoded, adapter, keys and"
    f" values, steps; the image encoder is of such a size that its share in {STEPS} steps is that of ViT-H/14 in 50"
    " steps of SD 1.5; preparing pictures is not made smaller. All sides in turn, order reversed every round, ratios"
    f" within a round. Lines: least squares over {', '.join(map(str, TIMED[1:]))} (time) and"
    f" {', '.join(map(str, COUNTED[1:]))} objects (FLOPs). Memory: peak of one guided step above what was loaded,"
    f" {MEMORY_OBJECTS} objects, full width (320, text 768), each in a fresh process, over the plain pipeline's."
)


def row_of_objects(count: int) -> list[SceneObject]:
    """Objects in rows and columns with small gaps, each a picture of one colour."""
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    objects = []
    for number in range(count):
        row, column = divmod(number, columns)
        box = ((column + 0.05) / columns, (row + 0.05) / rows, (column + 0.95) / columns, (row + 0.95) / rows)
        objects.append(SceneObject(image=Image.new("RGB", (256, 256), (12 * number, 90, 200)), box=box))
    return objects


def prepare_call(
    count: int, steps: int = STEPS, device: str | None = None, width: int = 40, text_width: int = 96
) -> Callable[[], Any]:
    """A call with so many objects; 0: the plain pipeline's. Also for `peak_memory`."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    unet = measuring_unet(width=width, cross_attention_dim=text_width).to(place)
    components: dict[str, Any] = {
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet,
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }
    arguments: dict[str, Any] = {}
    if count:
        encoder = measuring_encoder().to(place)
        adapter = LocRefAdapter.from_unet(unet, "measured", encoder).eval().to(place)
        pipeline: Any = LocRefPipeline(**components, image_encoder=encoder, adapter=adapter)
        arguments["objects"] = row_of_objects(count)
    else:
        pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    text = measuring_inputs(unet)["encoder_hidden_states"]

    def run() -> Any:
        return pipeline(
            prompt_embeds=text[:1],
            negative_prompt_embeds=text[1:],
            num_inference_steps=steps,
            height=SIDE * 8,
            width=SIDE * 8,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **arguments,
        )

    return run


def time_rows(device: str, rounds: int) -> list[dict[str, Any]]:
    """Seconds of every side in every round, after one call of each that does not count."""
    calls = {count: prepare_call(count, device=device) for count in TIMED}
    for call in calls.values():
        call()
    rows = []
    for number in range(rounds):
        for count in TIMED if number % 2 == 0 else TIMED[::-1]:
            rows.append({"case": "time", "round": number, "objects": count, "seconds": _seconds_of(calls[count])})
    return rows


def _seconds_of(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def flops_rows(device: str) -> list[dict[str, Any]]:
    """FLOPs of the same calls."""
    return [
        {"case": "flops", "objects": count, "flops": flops(prepare_call(count, device=device))} for count in COUNTED
    ]


def memory_rows() -> list[dict[str, Any]]:
    """Peak memory of one guided step at full width, and what was loaded before."""
    rows = []
    for _ in range(MEMORY_REPEATS):
        for count in (MEMORY_OBJECTS, 0):
            peak = peak_memory("benchmarks.locref_cost:prepare_call", count=count, steps=1, width=320, text_width=768)
            rows.append(
                {
                    "case": "memory", "objects": count, "device": peak.device, "extra_bytes": peak.extra_bytes,
                    "loaded_bytes": peak.loaded_bytes,
                }
            )  # fmt: skip
    return rows


def metrics_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, float | bool]:
    """All figures of the result file from its raw rows.

    `time_ratio.n<k>`, `flops_ratio.n<k>`: of a call with k objects over the plain one; `time_growth`, `flops_growth`:
    what one more object adds to that ratio, by a line, and `..._growth.start`, where the line begins;
    `memory_ratio.n8`, and `memory_loaded_ratio.n8` of what is loaded before.
    """
    seconds: dict[int, list[float]] = {}
    for row in (row for row in rows if row["case"] == "time"):
        seconds.setdefault(row["objects"], []).append(row["seconds"])
    metrics: dict[str, float | bool] = {}
    for count in TIMED[1:]:
        found, name = ratio_of_pairs(seconds[count], seconds[0]), f"time_ratio.n{count}"
        metrics |= ratio_metrics(name, found)
    counted = {row["objects"]: row["flops"] for row in rows if row["case"] == "flops"}
    metrics |= {f"flops_ratio.n{count}": counted[count] / counted[0] for count in COUNTED[1:]}
    for kind, counts in (("time", TIMED[1:]), ("flops", COUNTED[1:])):
        slope, start = np.polyfit(counts, [metrics[f"{kind}_ratio.n{count}"] for count in counts], 1)
        metrics |= {f"{kind}_growth": float(slope), f"{kind}_growth.start": float(start)}
    for key, name in (("extra_bytes", "memory_ratio"), ("loaded_bytes", "memory_loaded_ratio")):
        ours, plain = (
            statistics.median(row[key] for row in rows if row["case"] == "memory" and row["objects"] == count)
            for count in (MEMORY_OBJECTS, 0)
        )
        metrics[f"{name}.n{MEMORY_OBJECTS}"] = ours / plain
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write `benchmarks/results/locref_cost.json`."""
    args = parse_cost(cost_parser(__doc__), argv)
    rows = flops_rows(args.device) + memory_rows() + time_rows(args.device, args.pairs)
    return write_cost("locref_cost", args, rows, metrics_of_rows, PROTOCOL)


if __name__ == "__main__":
    raise SystemExit(main())
