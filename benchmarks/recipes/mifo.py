"""MIFO on the toybox: which losses learn look-alikes apart, and which control keeps them in their boxes.

    make reproduce-mifo PRESET=smoke        # 4 minutes on two cores: do maps move into masks, objects into boxes?
    make reproduce-mifo PRESET=cpu          # about 3 hours on two cores; run it again to go on
    make reproduce-mifo PRESET=gpu          # several scenes at once, `ARGS="--jobs 8"`

Eight scenes of two recolourings of one drawing and four of two categories, all in colours that no training shows.
Every learning arm starts from the same placeholders and, all but "separate", sees the same draws; what it learned is
painted by the same prompts from the same noise under full box control. The synthesis arms paint what
`reward_penalty_stage2` learned. Outcomes go to `<out>/report.json` and `sheet.png`, with `--record` also to
`benchmarks/results/mifo_toybox.json`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from benchmarks.recipes.common import GUIDANCE, STEPS, Row, best_device, parse_recipe, recipe_parser, record_outcome
from benchmarks.recipes.mifo_metrics import LEARNING, SYNTHESIS, metrics_of_rows
from benchmarks.recipes.mifo_parts import (
    CONTROLS,
    LEARNING_ARMS,
    SECOND_STAGES,
    SYNTHESISED,
    TOYBOX_LEARNING,
    Part,
    Size,
    chosen_scenes,
    parts_of,
    run_part,
    split_arm,
)
from objectcompose.evaluation.report import write_report
from objectcompose.examples.gallery import GalleryRow, save_gallery
from objectcompose.toybox.weights import toybox_path


SIZES = {
    "smoke": Size(("none", "reward_penalty", SYNTHESISED), ("no_control", "full"), 1, 0, 90, 60, 4, 2),
    "cpu": Size(LEARNING_ARMS, tuple(CONTROLS), 8, 4, 300, 600, 10, 1),
    "gpu": Size(LEARNING_ARMS, tuple(CONTROLS), 8, 4, 400, 1200, 10, 4),
}
#: Parts at once on a GPU: one alone leaves it waiting for the next kernel.
GPU_JOBS = 6
PROTOCOL = (
    "Toybox, scenes of two instances, one picture each: alike are recolourings of one drawing, unlike of two"
    " categories, all in hues that training never shows. Learning arms: stage 1 moves the placeholders only, without"
    " attention loss (none), with the reward (Break-a-Scene's kind), the penalty, or the one and then the other;"
    " separate: the same, one instance alone on grey per step; _stage2: LoRA on the UNet beside them, without class"
    " pictures; _prior: LoRA with class pictures, half the steps at half the rate. Pictures: toybox's ten prompts"
    " under full box control. Synthesis arms paint the instances of reward_penalty_stage2: without control, with the"
    " in-box reward alone (as Bounded Attention's, without its factor S), full, with a constant penalty, without"
    " refined masks, and with control of self- or of cross-attention alone."
    f" {STEPS} DDIM steps, guidance {GUIDANCE:g}, the same noise for all arms. Crops at the boxes against the cut-outs"
    " of the learned picture: sim_d and nsim_d by toybox's DINO, identity by the judge; sim_c: toybox's CLIP against"
    " rendered scenes of the caption. leakage: share of the area that the judge sees as instances outside of all"
    " boxes, of pictures in which it sees any (shown); mixed_up: boxes more like another instance; map_inside: share"
    " of a placeholder's attention in its mask, t = 200, 400. Cosines raw, shares in per cent. Intervals: 95 %"
    " bootstrap over scenes. Learning:"
    f" {dict(TOYBOX_LEARNING)}, stage 2 {SECOND_STAGES}; all chosen on one or two dev scenes for all arms alike, not"
    " arm by arm, _prior after _stage2 was measured."
)


class Recipe:
    """A run.

    Args:
        name: of the size.
        out: folder of all parts.
        arms: of learning and synthesis; None: those of the size.
        jobs: parts at once; None: one on a CPU, `GPU_JOBS` on a GPU.
    """

    def __init__(self, name: str, out: Path, arms: Sequence[str] | None = None, jobs: int | None = None) -> None:
        self.size, self.out = SIZES[name], out
        known = (*self.size.arms, *self.size.controls)
        unknown = sorted(set(arms or ()) - set(known))
        if unknown:
            raise SystemExit(f"`--arms` must be some of {', '.join(known)}, got {', '.join(unknown)}.")
        chosen = set(arms or known)
        if chosen & set(self.size.controls):
            chosen.add(SYNTHESISED)  # what they paint
        chosen |= {split_arm(arm)[0] for arm in chosen}  # what stage 2 goes on from
        self.arms = [arm for arm in self.size.arms if arm in chosen]
        self.controls = [control for control in self.size.controls if control in chosen]
        self.jobs = (GPU_JOBS if best_device() == "cuda" else 1) if jobs is None else jobs
        if self.jobs < 1:
            raise SystemExit(f"`--jobs` must be at least 1, got {jobs}.")

    def rows(self) -> list[Row]:
        """All rows; parts that are done are read."""
        threads = max((os.cpu_count() or 1) // self.jobs, 1) if self.jobs > 1 else 0
        rows: list[Row] = []
        for parts in parts_of(self.size, self.out, self.arms, self.controls, threads):
            rows += [row for found in self._run(parts) for row in found]
        if "full" in self.controls:  # painted already, as a learning arm
            full = [row for row in rows if row["case"] == LEARNING and row["arm"] == SYNTHESISED]
            rows += [{**row, "case": SYNTHESIS, "arm": "full"} for row in full]
        return rows

    def _run(self, parts: Sequence[Part]) -> list[list[Row]]:
        if self.jobs == 1:
            return [run_part(part) for part in parts]
        with ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn")) as pool:
            return list(pool.map(run_part, parts))


def save_sheet(recipe: Recipe, rows: Sequence[Row], columns: int = 6) -> Path:
    """The learned pictures, and the same pictures of every arm below one another."""
    scenes = chosen_scenes(recipe.size)[:columns]
    galleries = [GalleryRow("learned from", [one.picture for one in scenes], [one.name for one in scenes])]
    arms = [(LEARNING, arm) for arm in recipe.arms] + [(SYNTHESIS, arm) for arm in recipe.controls if arm != "full"]
    for case, arm in arms:
        by_scene: dict[str, list[Row]] = {}
        for row in rows:
            if (row["case"], row["arm"]) == (case, arm):
                by_scene.setdefault(row["scene"], []).append(row)
        own = [by_scene[scene.name] for scene in scenes]
        shown = [row for number in range(columns) for of_scene in own for row in of_scene[number : number + 1]][
            :columns
        ]
        folder = arm if case == LEARNING else f"{case}-{arm}"
        files = [
            recipe.out / row["scene"] / folder / "pictures" / f"{row['prompt']}_{row['round']}.png" for row in shown
        ]
        galleries.append(
            GalleryRow(f"{case}: {arm}", [Image.open(file) for file in files], [_caption(row) for row in shown])
        )
    path = recipe.out / "sheet.png"
    save_gallery(galleries, path, headline="MIFO on the toybox: the same prompts and noise for all arms")
    return path


def _caption(row: Row) -> str:
    own = [table[number] for number, table in enumerate(row["identity"])]
    return f"{row['prompt']}\nidentity {', '.join(f'{value:.2f}' for value in own)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    parser = recipe_parser(__doc__.splitlines()[0], "mifo")
    parser.add_argument("--jobs", type=int, default=None, help=f"parts at once; default: 1, on a GPU {GPU_JOBS}")
    args = parse_recipe(parser, "mifo", argv)
    out = args.out
    recipe = Recipe(args.preset, out, args.arms, args.jobs)
    rows = recipe.rows()
    metrics = metrics_of_rows(rows)
    protocol = f"{PROTOCOL} {recipe.size}"
    write_report(out, "reproduce-mifo", metrics, protocol, rows, {"size": repr(recipe.size)})
    print(f"sheet: {(sheet := save_sheet(recipe, rows))}")
    if args.record:
        arms = [out / scene.name / arm for scene in chosen_scenes(recipe.size) for arm in recipe.arms]
        learned = [
            file
            for arm in arms
            for part in ("embeddings", "weights")
            for file in sorted((arm / part).glob("*.safetensors"))
        ]
        record_outcome(
            args,
            metrics,
            rows,
            protocol,
            sheet,
            seeds=list(range(recipe.size.rounds)),
            weights={"base": toybox_path("base"), **{str(file.relative_to(out)): file for file in learned}},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
