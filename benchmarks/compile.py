"""What `torch.compile` makes of a UNet with parts: graphs, recompilations, and time beside the compiled plain UNet.

    python -m benchmarks.compile

One forward at 64 x 64 latents of a UNet with the blocks, layers and heads of SD 1 and few channels. Graphs may not
break (`fullgraph=True` raises where one would); new parts of the same kind must find the graph of the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.attention_core import TOKEN_LAYERS, Quadrants, branch_parts
from benchmarks.cost_file import cost_parser, parse_cost, write_cost
from benchmarks.measure import measuring_inputs, measuring_unet, paired_ratio, ratio_metrics, ratio_of_pairs
from objectcompose.attention_processors.compiled import prepare_parts
from objectcompose.attention_processors.install import use_parts
from objectcompose.attention_processors.mask import KeyMask, RegionKeyMask
from objectcompose.attention_processors.probe import TokenMapProbe


NUM_TOKENS = 77
PROTOCOL = (
    "One forward of an SD1-shaped UNet of width 40 at 64x64 latents, batch 2, no gradients, torch.compile with its"
    " default backend and fullgraph=True. token_maps: 4 tokens in the 10 cross-attention layers of middle and decoder;"
    " branch_n4: 4 objects of 16 tokens, replacing the text in their boxes in all 16 cross-attention layers;"
    " box_masks: the box rule of 4 boxes in all 16 self-attention layers and a table in all cross-attention layers."
    " graphs.<side>: compiled for the first call; recompiled.<side>: further ones for a second call with new parts;"
    " time_ratio.<side>: compiled with parts over compiled without, sides alternated; speedup.<side>: eager over"
    " compiled, both with parts."
)


def make_parts(side: str, unet: Any, batch_size: int) -> list[Any]:
    """New parts of a side."""
    if side == "token_maps":
        return [TokenMapProbe([1, 2, 3, 4], layers=TOKEN_LAYERS)]
    if side == "branch_n4":
        return branch_parts(unet, batch_size)
    visible = torch.arange(NUM_TOKENS, device=unet.device) % 5 != 4
    return [RegionKeyMask(Quadrants()), KeyMask(visible)]


SIDES = ("token_maps", "branch_n4", "box_masks")


class CompiledSide:
    """The compiled UNet with the parts of a side; counts the graphs that its calls need.

    Args:
        side: one of `SIDES`; "plain" is none.
        device: where it runs.
    """

    def __init__(self, side: str, device: str) -> None:
        self.side = side
        self.unet: Any = measuring_unet("sd1").to(device)
        self.inputs = measuring_inputs(self.unet)
        self.compiled = torch.compile(self.unet, fullgraph=True)

    def parts(self) -> list[Any]:
        return [] if self.side == "plain" else make_parts(self.side, self.unet, len(self.inputs["sample"]))

    @torch.no_grad()
    def run(self, parts: Sequence[Any], is_compiled: bool = True) -> None:
        """One forward."""
        unet = self.compiled if is_compiled else self.unet
        with use_parts(unet, parts):
            if is_compiled:
                prepare_parts(unet, self.inputs["sample"])
            unet(**self.inputs)
        for part in parts:
            if part.kind == "probe":
                part.clear()

    def count_graphs(self) -> int:
        """Graphs that a call with new parts compiles."""
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        self.run(self.parts())
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)


def measured_rows(device: str, pairs: int) -> list[dict[str, Any]]:
    """Graphs and paired times of all sides."""
    plain = CompiledSide("plain", device)
    plain.run([])
    rows = []
    for name in SIDES:
        side = CompiledSide(name, device)
        rows.append({"case": "graphs", "side": name, "first": side.count_graphs(), "second": side.count_graphs()})
        parts = side.parts()
        runs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            "time_ratio": (lambda: side.run(parts), lambda: plain.run([])),  # noqa: B023 (called in this turn only)
            "speedup": (lambda: side.run(parts, is_compiled=False), lambda: side.run(parts)),  # noqa: B023
        }
        for case, (first, second) in runs.items():
            rows += [{"case": case, "side": name, **row} for row in paired_ratio(first, second, pairs).rows()]
    return rows


def metrics_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, float | bool]:
    """All figures of the result file from its raw rows."""
    metrics: dict[str, float | bool] = {}
    for row in rows:
        if row["case"] == "graphs":
            metrics |= {f"graphs.{row['side']}": row["first"], f"recompiled.{row['side']}": row["second"]}
    for name in SIDES:
        for case in ("time_ratio", "speedup"):
            pairs = [row for row in rows if row["case"] == case and row["side"] == name]
            found = ratio_of_pairs([row["seconds_a"] for row in pairs], [row["seconds_b"] for row in pairs])
            key = f"{case}.{name}"
            metrics |= ratio_metrics(key, found)
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write `benchmarks/results/compile.json`."""
    args = parse_cost(cost_parser(__doc__, pairs=9), argv)
    return write_cost("compile", args, measured_rows(args.device, args.pairs), metrics_of_rows, PROTOCOL)


if __name__ == "__main__":
    raise SystemExit(main())
