"""What the results page says of cost, compiling, and the models that measure: tables from the cost files."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.results_tables import Estimate, Metrics, estimate_of, markdown_table, shown, verdict


@dataclass(frozen=True)
class CostRow:
    """One figure of a cost file.

    Attributes:
        text: what it is.
        key: its name.
        at_most: the bar that was planned with; None: there is none.
        exact: counted or a peak, not a time.
        unit: behind the figure.
        decimals: of the figure.
    """

    text: str
    key: str
    at_most: float | None = None
    exact: bool = True
    unit: str = "x"
    decimals: int = 2


@dataclass(frozen=True)
class CostFile:
    """A cost file: heading, name without ending, command, rows. `optional`: says nothing where it is missing."""

    title: str
    name: str
    command: str
    rows: tuple[CostRow, ...]
    optional: bool = False


def _time(text: str, key: str, at_most: float | None = None) -> CostRow:
    return CostRow(text, key, at_most, exact=False)


def _mifo_rows(prefix: str, memory: str, bars: dict[str, float]) -> tuple[CostRow, ...]:
    """Rows of a device; `memory` says what its ratios of memory are of."""
    named = [
        ("FLOPs of a full schedule", "flops_ratio.ours", True),
        ("FLOPs, the plain way", "flops_ratio.naive", True),
        ("time of a full schedule", "time_ratio.ours", False),
        ("time, the plain way", "time_ratio.naive", False),
        (memory, "memory_ratio.ours", True),
        (f"{memory}, the plain way", "memory_ratio.naive", True),
        ("memory on Stable Diffusion 2.1's shape, weights included", "full_memory_ratio.ours", True),
    ]
    found = [CostRow(text, f"{prefix}{key}", bars.get(key), exact) for text, key, exact in named]
    peaks = (("stage 1", "stage1"), ("stage 2 with LoRA", "stage2_lora"))
    found += [
        CostRow(f"peak memory of learning on that shape, {text}", f"{prefix}learning_peak_gib.{key}", unit="GiB")
        for text, key in peaks
    ]
    return tuple(found)


COSTS = (
    CostFile(
        "TokenCompose and Separate-and-Enhance",
        "tokencompose_cost",
        "python -m benchmarks.tokencompose_cost",
        (
            _time("inference, time", "inference_time_ratio", 1.03),
            _time("training step over the same without token losses, time", "train_time_ratio", 1.25),
            CostRow("the same, memory", "train_memory_ratio", 1.15),
            CostRow("Separate-and-Enhance's pass over a denoising step, FLOPs", "sepen_flops_share"),
        ),
    ),
    CostFile(
        "LocRef",
        "locref_cost",
        "python -m benchmarks.locref_cost",
        (
            _time("4 objects, time", "time_ratio.n4", 1.15),
            _time("12 objects, time", "time_ratio.n12"),
            _time("20 objects, time", "time_ratio.n20", 1.3),
            CostRow("4 objects, FLOPs", "flops_ratio.n4"),
            CostRow("20 objects, FLOPs", "flops_ratio.n20"),
            CostRow("each further object (fitted line), time", "time_growth", decimals=4),
            CostRow("each further object (fitted line), FLOPs", "flops_growth", decimals=4),
            CostRow("8 objects, memory above weights", "memory_ratio.n8", 1.10),
        ),
    ),
    CostFile(
        "ObjectPrompt",
        "object_prompt_cost",
        "python -m benchmarks.object_prompt_cost",
        (
            _time("4 objects, without guidance, time", "time_ratio.unguided_n4", 1.10),
            _time("4 objects, guided (exact), time", "time_ratio.guided_exact_n4", 2.7),
            _time("4 objects, guided (fast), time", "time_ratio.guided_fast_n4", 2.2),
            CostRow("apart from these: segmenting once, time", "time_ratio.segmentation_n4", decimals=3),
            CostRow("in these: one update of the appearance tokens, time", "time_ratio.update_n4", decimals=3),
            CostRow("8 objects, without guidance, memory above weights", "memory_ratio.unguided_n8", 1.10),
            CostRow("4 objects, guided, memory above weights, small shape", "memory_ratio.guided"),
            CostRow("the same with gradient checkpointing", "memory_ratio.guided_checkpointed"),
        ),
    ),
    CostFile(
        "MIFO",
        "mifo_cost",
        "python -m benchmarks.mifo --full-memory",
        _mifo_rows(
            "",
            "memory above weights, small shape",
            {"flops_ratio.ours": 1.9, "time_ratio.ours": 2.3, "full_memory_ratio.ours": 1.3},
        ),
    ),
    CostFile(
        "MIFO on a GPU, full shape",
        "mifo_cost_gpu",
        "python -m benchmarks.mifo --device cuda --width 320 --text-width 1024 --steps 50",
        _mifo_rows(
            "gpu.",
            "memory, weights included",
            {"flops_ratio.ours": 1.9, "time_ratio.ours": 2.1, "memory_ratio.ours": 1.3},
        ),
        optional=True,
    ),
    CostFile(
        "The attention core",
        "attention_core",
        "python -m benchmarks.attention_core",
        (
            _time("maps of 4 tokens and mass of 4 regions, time", "probe_time_ratio"),
            CostRow("the same, FLOPs", "probe_flops_ratio"),
            CostRow("the same, memory over one explicit map", "probe_memory_share", decimals=3),
            _time("a branch of 4 objects, time", "branch_time_ratio.n4"),
            CostRow("the same, FLOPs", "branch_flops_ratio.n4"),
            CostRow("early exit after up_blocks.1, FLOPs", "early_exit_flops_share"),
        ),
    ),
)
#: Any figures on full shapes; listed as they are named, where there is such a file.
GPU_FILE = "gpu_cost"
COMPILE_FILE, COMPILE_COMMAND = "compile", "python -m benchmarks.compile"
COMPILE_SIDES = (
    ("token_maps", "maps of 4 tokens"),
    ("branch_n4", "a branch of 4 objects"),
    ("box_masks", "masks of 4 boxes"),
)
#: Figures of the models that measure, and of the base: (text, file, name, unit, factor, decimals).
WORLD_ROWS = (
    ("judge: is a category there?", "toybox", "judge.presence_accuracy", "%", 100, 1),
    ("judge: finds what is there", "toybox", "judge.recall", "%", 100, 1),
    ("judge: is right in what it finds", "toybox", "judge.precision", "%", 100, 1),
    ("judge: which of 20 identities", "toybox", "judge.identity_accuracy", "%", 100, 1),
    ("base: one object of one", "toybox", "base.one_object", "%", 100, 1),
    ("base: two objects of two", "toybox", "base.two_objects", "%", 100, 1),
    ("base: three or more of five", "toybox", "base.mg3", "%", 100, 1),
    ("base: seconds a picture", "toybox", "base.seconds_per_image", "s", 1, 2),
    ("grounding: masks of toybox's CLIPSeg, IoU", "grounding", "clipseg.mask_iou", "", 1, 3),
    ("grounding: is a category there?", "grounding", "clipseg.presence_accuracy", "%", 100, 1),
)


def cost_lines(file: CostFile, metrics: Metrics) -> list[str]:
    """A cost file's table: figure, measured, expected, verdict; rows without a figure keep empty cells."""
    rows = []
    for row in file.rows:
        found = estimate_of(metrics, row.key)
        expected = "" if row.at_most is None else f"at most {row.at_most:g}{row.unit}"
        outcome = ""
        if found is not None and row.at_most is not None:
            outcome = verdict(found, "at most", row.at_most, exact=row.exact)
        rows.append([row.text, "" if found is None else shown(found, row.decimals, row.unit), expected, outcome])
    return markdown_table(["figure", "measured", "expected", "verdict"], rows)


def compile_lines(metrics: Metrics) -> list[str]:
    """Graphs, recompilations and times of the compiled UNet with parts."""
    rows = []
    for side, text in COMPILE_SIDES:
        counts = [metrics.get(f"{name}.{side}") for name in ("graphs", "recompiled")]
        ratios = [estimate_of(metrics, f"{name}.{side}") for name in ("time_ratio", "speedup")]
        cells = ["" if count is None else str(count) for count in counts]
        cells += ["" if found is None else shown(found, 2, "x") for found in ratios]
        is_whole = "" if None in counts else ("holds" if counts == [1, 0] else "does not hold")
        rows.append([text, *cells, is_whole])
    header = [
        "parts",
        "graphs",
        "recompiled",
        "time over compiled without parts",
        "speedup over eager",
        "one graph, none more",
    ]
    return markdown_table(header, rows)


def gpu_lines(metrics: Metrics) -> list[str]:
    """All figures of the GPU's file by their names."""
    endings = (".iqr", ".valid", ".lo", ".hi")
    rows = []
    for name, value in metrics.items():
        if not name.endswith(endings):
            found = None if isinstance(value, str) else estimate_of(metrics, name)
            rows.append([f"`{name}`", str(value) if found is None else shown(found, 3)])
    return markdown_table(["figure", "measured"], rows)


def world_lines(files: dict[str, Metrics]) -> list[str]:
    """Figures of judge, base and grounding, those that are there."""
    rows = []
    for text, name, key, unit, factor, decimals in WORLD_ROWS:
        found = estimate_of(files.get(name, {}), key)
        if found is not None:
            lo, hi = (None if bound is None else factor * bound for bound in (found.lo, found.hi))
            rows.append([text, shown(Estimate(factor * found.value, lo, hi), decimals, unit)])
    return markdown_table(["figure", "measured"], rows) if rows else []
