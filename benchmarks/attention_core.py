"""What the attention core costs: probes, branches and the early exit, beside the plain UNet.

    python -m benchmarks.attention_core

Times and FLOPs are of one forward at 64 x 64 latents of a UNet with the blocks, layers and heads of SD 1 and few
channels. Memory is of one self-attention layer of SD 1's widest grid (4096 cells, 8 heads of width 40) with
gradients, each in a fresh process, as a share of one explicit float32 map of that layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from benchmarks.cost_file import cost_parser, parse_cost, write_cost
from benchmarks.measure import (
    flops,
    measuring_inputs,
    measuring_unet,
    paired_ratio,
    peak_memory,
    ratio_metrics,
    ratio_of_pairs,
)
from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.early_exit import run_until
from objectcompose.attention_processors.install import attention_layers, match_layers, use_parts
from objectcompose.attention_processors.probe import RegionMassProbe, TokenMapProbe
from objectcompose.attention_processors.processor import ComposedAttnProcessor


NUM_OBJECTS = 4
TOKENS_PER_OBJECT = 16
LAYER = {"cells": 4096, "heads": 8, "head_width": 40}
MEMORY_REPEATS = 5
# The layers that methods read: decoder and middle for training on token maps, up to the 16 x 16 decoder for guidance.
TOKEN_LAYERS = r"(mid_block|up_blocks).*attn2$"
GUIDANCE_LAYERS = r"(mid_block|up_blocks\.1\.).*attn"
PROTOCOL = (
    "Times: one forward of an SD1-shaped UNet of width 40 at 64x64 latents, batch 2, no gradients, sides alternated."
    " Probe: 4 tokens in the 10 cross-attention layers of the middle and the decoder, and the mass of 4 regions in the"
    " 4 self-attention layers of the middle and up_blocks.1. Branch: 4 objects of 16 tokens, keys and values given,"
    " replacing, in all 16 cross-attention layers. Early exit: left after the middle and up_blocks.1. Memory: peak of"
    " a fresh process above what it had loaded, one self-attention layer (4096 cells, 8 heads of width 40) forward and"
    f" backward, with the probe less without, median of {MEMORY_REPEATS}, over the bytes of one float32 map."
)


class Quadrants:
    """Four boxes, each a quarter of the canvas."""

    def at_tokens(self, num_tokens: int, device: Any = None) -> torch.Tensor:
        side = int(num_tokens**0.5)
        half = torch.arange(side) * 2 // side
        number = 2 * half[:, None] + half[None, :]
        return torch.stack([(number == n).float() for n in range(NUM_OBJECTS)]).to(device)


def probe_parts() -> list[Any]:
    """Token maps of the ten supervised layers, and region mass where guidance reads it."""
    return [
        TokenMapProbe(list(range(1, 1 + NUM_OBJECTS)), layers=TOKEN_LAYERS),
        RegionMassProbe(Quadrants(), layers=GUIDANCE_LAYERS + "1$"),
    ]


def branch_parts(unet: Any, batch_size: int) -> list[Any]:
    """Image tokens of four objects in every cross-attention layer, replacing the text in their boxes."""
    generator = torch.Generator().manual_seed(0)
    modules = attention_layers(unet)
    keys_values = {
        name: tuple(
            torch.randn(
                batch_size, NUM_OBJECTS * TOKENS_PER_OBJECT, modules[name].to_q.out_features, generator=generator
            ).to(unet.device, unet.dtype)
            for _ in range(2)
        )
        for name in match_layers(unet, r"attn2$")
    }
    return [Branch(keys_values, Quadrants(), mode="replace")]


def prepare_layer(mode: str) -> Callable[[], Any]:
    """For `peak_memory`: one self-attention layer with gradients; `mode` is "plain", "probe" or "explicit"."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where `peak_memory` looks
    width = LAYER["heads"] * LAYER["head_width"]
    attn = Attention(query_dim=width, heads=LAYER["heads"], dim_head=LAYER["head_width"]).to(device)
    states = torch.randn(1, LAYER["cells"], width, device=device, requires_grad=True)
    probe = RegionMassProbe(Quadrants())
    processor = ComposedAttnProcessor("layer", [probe] if mode == "probe" else [])

    def run() -> None:
        out = processor(attn, states)
        scalar = out.square().mean()
        if mode == "probe":
            scalar = scalar + probe.mass["layer"].square().mean()
        if mode == "explicit":
            query, key = (
                project(states).unflatten(-1, (LAYER["heads"], -1)).transpose(1, 2)
                for project in (attn.to_q, attn.to_k)
            )
            probabilities = (query @ key.transpose(-1, -2) * LAYER["head_width"] ** -0.5).softmax(-1)
            indicators = Quadrants().at_tokens(LAYER["cells"], device).flatten(1).T
            scalar = scalar + (probabilities @ indicators).mean(1).square().mean()
        scalar.backward()

    return run


def memory_rows() -> list[dict[str, Any]]:
    """Peak memory of each mode, in fresh processes; the explicit map once, for comparison."""
    rows = []
    for mode in ("plain", "probe") * MEMORY_REPEATS + ("explicit",):
        peak = peak_memory("benchmarks.attention_core:prepare_layer", mode=mode)
        rows.append({"case": "memory", "mode": mode, "device": peak.device, "extra_bytes": peak.extra_bytes})
    return rows


@torch.no_grad()
def time_and_flops_rows(device: str, pairs: int) -> list[dict[str, Any]]:
    """Paired times of probes and branches against the plain forward, and the FLOPs of all of them."""
    unet = measuring_unet("sd1").to(device)
    inputs = measuring_inputs(unet)

    def plain() -> Any:
        return unet(**inputs).sample

    def with_parts(parts: list[Any]) -> Callable[[], Any]:
        def run() -> Any:
            with use_parts(unet, parts):
                return plain()

        return run

    rows = [{"case": "flops", "side": "plain", "flops": flops(plain)}]
    sides = {"probe": with_parts(probe_parts()), "branch_n4": with_parts(branch_parts(unet, len(inputs["sample"])))}
    for side, run in sides.items():
        rows += [{"case": side, **row} for row in paired_ratio(run, plain, pairs=pairs).rows()]
        rows.append({"case": "flops", "side": side, "flops": flops(run)})
    rows.append(
        {"case": "flops", "side": "early_exit", "flops": flops(lambda: run_until(unet, GUIDANCE_LAYERS, **inputs))}
    )
    return rows


def metrics_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, float | bool]:
    """All figures of the result file from its raw rows."""
    metrics: dict[str, float | bool] = {}
    for case, name in (("probe", "probe_time_ratio"), ("branch_n4", "branch_time_ratio.n4")):
        pairs = [row for row in rows if row["case"] == case]
        found = ratio_of_pairs([row["seconds_a"] for row in pairs], [row["seconds_b"] for row in pairs])
        metrics |= ratio_metrics(name, found)
    count = {row["side"]: row["flops"] for row in rows if row["case"] == "flops"}
    metrics["early_exit_flops_share"] = count["early_exit"] / count["plain"]
    metrics["probe_flops_ratio"] = count["probe"] / count["plain"]
    metrics["branch_flops_ratio.n4"] = count["branch_n4"] / count["plain"]
    extra = {
        mode: statistics.median(row["extra_bytes"] for row in rows if row["case"] == "memory" and row["mode"] == mode)
        for mode in ("plain", "probe", "explicit")
    }
    one_map = LAYER["heads"] * LAYER["cells"] ** 2 * 4
    metrics["probe_memory_share"] = (extra["probe"] - extra["plain"]) / one_map
    metrics["explicit_memory_share"] = (extra["explicit"] - extra["plain"]) / one_map
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write `benchmarks/results/attention_core.json`."""
    args = parse_cost(cost_parser(__doc__, pairs=9), argv)
    rows = memory_rows() + time_and_flops_rows(args.device, args.pairs)
    return write_cost("attention_core", args, rows, metrics_of_rows, PROTOCOL)


if __name__ == "__main__":
    raise SystemExit(main())
