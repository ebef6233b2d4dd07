"""LocRef-Diffusion on the toybox: what masks, composite image, projection and loss weights do, beside two rivals.

    make reproduce-locref PRESET=smoke        # 3 minutes on two cores: does the object move with its box?
    make reproduce-locref PRESET=cpu          # about 2.5 hours on one core; run it again to go on
    make reproduce-locref PRESET=ablations    # about as long: what the cpu preset leaves out, beside its full
    make reproduce-locref PRESET=gpu          # all arms

Every trained arm, the rival IP-Adapter among them, sees the same scenes for the same number of steps at the same
learning rate (gpu: is tuned on the dev layouts by the same number of trials). The pictures of all arms start from the
same noise. Outcomes go to `<out>/report.json` and `sheet.png`, with `--record` also to
`benchmarks/results/locref_toybox.json`, those of the ablations to `locref_ablations_toybox.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.recipes.common import (
    GUIDANCE,
    STEPS,
    Arm,
    Options,
    Row,
    best_device,
    check_arms,
    choices,
    choose_candidate,
    command_line,
    left_out,
    measured_weights,
    parse_recipe,
    recipe_parser,
    record_outcome,
    train_once,
)
from benchmarks.recipes.locref_metrics import TEST, metrics_of_rows, slim_rows, unique_rows
from benchmarks.recipes.locref_rival import IP_ADAPTER_OPTIONS, write_ip_adapter
from objectcompose.__main__ import main as objectcompose_main
from objectcompose.evaluation.layout_metrics import layout_metrics
from objectcompose.evaluation.report import ROWS_FILE, write_report
from objectcompose.evaluation.toybox_layouts import LEFT, RIGHT, toybox_layouts
from objectcompose.examples.gallery import GalleryRow, on_white, save_gallery
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.pipelines.plot import draw_layout
from objectcompose.toybox.weights import active_preset, toybox_path
from objectcompose.training import train_locref


FULL, TEXT, RIVAL, SWITCH = "full", "text", "ip_adapter_masks", "no_mask_switch"


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        arms: what is compared.
        committed: takes the committed adapter for "full" instead of training one.
        scenes: that are trained on.
        steps: of training.
        batch_size: samples of a step.
        trial_steps: of each trial on the dev split; 0 takes each arm's first candidate.
        layouts: of the test split.
        rounds: pictures per layout.
        numbers: of objects, for layouts of so many each.
        jitters: by how many per cent of a side edges of boxes are moved.
        more_layouts: for each of `numbers`; for each of `jitters` as many as `layouts`, at most.
        sides: objects that are painted on the left and on the right; 0 for none.
    """

    arms: tuple[str, ...]
    committed: bool
    scenes: int
    steps: int
    batch_size: int
    trial_steps: int
    layouts: int
    rounds: int
    numbers: tuple[int, ...]
    jitters: tuple[int, ...]
    more_layouts: int
    sides: int


TRAINED_OPTIONS: dict[str, dict[str, Any]] = {
    FULL: {},
    "text_replaced": {"gamma": 0.0},
    "no_mask": {"no_region_mask": ()},
    "coords": {"composite": "coordinates"},
    "no_composite": {"composite": "none"},
    "no_projection": {"projection": "linear"},
    "flat_weights": {"foreground_weight": 1.0, "background_weight": 1.0},
    RIVAL: IP_ADAPTER_OPTIONS,
}
ALL_ARMS = (*TRAINED_OPTIONS, SWITCH, TEXT)
#: Better few that are trained for hours than all of them for minutes.
CPU_ARMS = (FULL, SWITCH, TEXT, "no_mask", "coords", RIVAL)
ABLATIONS, ABLATION_ARMS = "ablations", (FULL, "no_composite", "no_projection", "flat_weights")
NUMBERS, JITTERS = (2, 5, 10, 20), (5, 10, 20)
SIZES = {
    "smoke": Size((FULL, SWITCH, TEXT, RIVAL), True, 64, 8, 8, 0, 6, 1, (10,), (10,), 3, 20),
    "cpu": Size(CPU_ARMS, False, 4000, 6000, 8, 0, 96, 2, NUMBERS, JITTERS, 24, 32),
    ABLATIONS: Size(ABLATION_ARMS, True, 4000, 6000, 8, 0, 96, 2, (), (), 0, 0),
    "gpu": Size(ALL_ARMS, False, 16_000, 3000, 32, 200, 96, 8, NUMBERS, JITTERS, 96, 32),
}
DEV_LAYOUTS = 24
#: The first one where there are no trials: short ones prefer rates that spoil shapes in long runs.
LEARNING_RATES = (1e-3, 5e-4, 2e-3)
#: Share of the text inside boxes. Read literally, the paper's formula has none of it there, so that references alone
#: have to teach what a category looks like, which takes longer than these runs: an arm of its own, "text_replaced".
GAMMA = 1.0
PROTOCOL = (
    "Toybox. Trained arms: the same scenes, steps and batches, AdamW, warm-up and cosine, each tuned on the dev"
    " layouts by the same number of trials (AP50 and judge identity); without trials (trial_steps=0) the rate"
    f" {LEARNING_RATES[0]:g} for all. full: the paper's design, with the text kept"
    " beside the pictures inside boxes (gamma 1); text_replaced: without it (gamma 0, the formula's letter); no_mask:"
    " each reference acts in all boxes; no_mask_switch: full with that at inference only; coords: Fourier features of"
    " the boxes in the composite image's place; no_composite: neither; no_projection: one linear layer from feature to"
    " tokens; flat_weights: W_f = W_b = 1; text: the prompt alone; ip_adapter_masks: diffusers' IP-Adapter with masks,"
    " trained on the same references in the same regions with the same loss. Pictures:"
    f" {STEPS} DDIM steps, guidance {GUIDANCE:g}, the same noise for all arms; references in other poses than the true"
    " scenes. ap50, ap: the judge's detections against the boxes; identity, clip_i, dino: cosine of the crop at the"
    " box with its reference, by the judge (which took no part), by toybox's image encoder, which reads the references"
    " for the adapters, too, and its dino; seen, unseen:"
    " identities; leakage: the judge's cosine of a box with the references of others; leakage_outside: of a reference"
    " with the picture whose own box is greyed out; ceiling: true scenes; floor: the same with other identities that"
    " training shows, for"
    " ap50 and ap true scenes held against other layouts' boxes; _n<k>: layouts of k"
    " objects, which the judge finds less well the smaller they are (see their ceilings); _jitter<p>: edges of boxes"
    " moved by up to p % of a side, measured by the moved boxes; identity_way: from floor to ceiling, on the test"
    " layouts of unseen identities, identity_way_seen: of seen ones; shift: how far the object moves"
    " with its box. In per cent. Intervals: 95 % bootstrap over layouts."
)
#: Of the ablations, which train no `full` of their own.
COMMITTED_FULL = (
    " full: the repository's adapter, which the cpu preset trained on these scenes for as many steps of the same plan;"
    " its rivals are in that preset's result."
)


def build_arms(size: Size) -> dict[str, Arm]:
    """The trained arms of a size."""
    common: dict[str, Any] = {
        "gamma": GAMMA,
        "toybox_scenes": size.scenes,
        "variants": 2,  # encoded once for all arms that read the same, from a cache
        "train_batch_size": size.batch_size,
        "lr_scheduler": "cosine",
        "checkpointing_steps": 250,
    }
    rates = LEARNING_RATES if size.trial_steps else LEARNING_RATES[:1]
    candidates: tuple[Options, ...] = tuple({"learning_rate": rate} for rate in rates)
    return {
        name: Arm(name, train_locref.main, {**common, **options}, candidates)
        for name, options in TRAINED_OPTIONS.items()
    }


class Recipe:
    """A run: trains, paints, measures, and keeps it all under one folder.

    Args:
        name: of the size.
        out: the folder.
        arms: their names; None: those of the size.
    """

    def __init__(self, name: str, out: Path, arms: Sequence[str] | None = None) -> None:
        self.size, self.out, self.device = SIZES[name], out, best_device()
        self.arm_names = tuple(arms or self.size.arms)
        self.arms = build_arms(self.size)
        check_arms(self.arm_names, ALL_ARMS)

    def weights(self, name: str) -> Path | None:
        """Trained weights of an arm, None of the prompt alone."""
        if name == TEXT:
            return None
        if name == SWITCH:
            return self.weights(FULL)
        if name == FULL and self.size.committed:
            return toybox_path("locref")
        arm, folder = self.arms[name], self.out / name

        def score(weights: Path) -> float:
            found = layout_metrics(self.look(name, weights, weights.parent / "dev", {"split": "dev"}, DEV_LAYOUTS, 1))
            return (found["ap50"] + found["identity.similarity"]) / 2

        chosen = choose_candidate(arm, self.size.trial_steps, folder, score)
        return self.train(arm, chosen, self.size.steps, folder)

    def train(self, arm: Arm, chosen: Options, steps: int, folder: Path) -> Path:
        """An arm's weights after so many steps."""
        warm_up = {"lr_warmup_steps": min(100, steps // 4), "cache_dir": str(self.out / "cache")}
        return train_once(arm, {**chosen, **warm_up}, steps, folder)

    def look(
        self, name: str, weights: Path | None, folder: Path, layouts: Options, count: int, rounds: int
    ) -> list[Row]:
        """Rows of `objectcompose evaluate layout`."""
        options: dict[str, Any] = {"out": str(folder), "max-prompts": count, "rounds": rounds, "device": self.device}
        if name == RIVAL:
            assert weights is not None
            options["ip-adapter"] = str(write_ip_adapter(weights, load_checkpoint(None, "cpu").unet))
        elif weights is not None:
            options["adapter"] = str(weights)
        if name == SWITCH:
            options["no-region-mask"] = ()
        code = objectcompose_main(["evaluate", "layout", *command_line({**options, **layouts})])
        assert code == 0, f"measuring {name} failed"
        return [json.loads(line) for line in (folder / ROWS_FILE).read_text(encoding="utf-8").splitlines()]

    def cases(self, name: str) -> dict[str, tuple[Options, int, int]]:
        """What an arm paints: options of the layouts, their number, pictures of each."""
        size = self.size
        cases: dict[str, tuple[Options, int, int]] = {TEST: ({"split": "test"}, size.layouts, size.rounds)}
        if name in (FULL, TEXT) and size.sides:
            cases |= {side: ({"split": side}, size.sides, 1) for side in (LEFT, RIGHT)}
        if name == FULL:
            cases |= {f"n{count}": ({"objects": count}, size.more_layouts, size.rounds) for count in size.numbers}
            cases |= {f"jitter{by}": ({"box-jitter": by / 100}, size.layouts, size.rounds) for by in size.jitters}
        return cases

    def measure(self, name: str) -> list[Row]:
        """All rows of one arm."""
        weights = self.weights(name)
        rows: list[Row] = []
        for case, (layouts, count, rounds) in self.cases(name).items():
            found = self.look(name, weights, self.out / name / case, layouts, count, rounds)
            rows += slim_rows(name, case, found)
        return rows


def save_sheet(recipe: Recipe, columns: int = 6) -> Path:
    """The first test pictures of every arm below their references and true scenes, with the layout's boxes."""
    cases = toybox_layouts(active_preset(), "test", min(columns, recipe.size.layouts))
    boxes = [[{"box": item.box} for item in case.objects] for case in cases]
    tile = (128, 128)

    def drawn(images: Sequence[Image.Image]) -> list[Image.Image]:
        return [draw_layout(image.resize(tile), row) for image, row in zip(images, boxes, strict=True)]

    captions = [f"{case.record.kind}: {', '.join(case.record.categories)}" for case in cases]
    truths = [case.truth for case in cases if case.truth is not None]
    references = [[on_white(item.image) for item in case.objects] for case in cases]
    galleries = [GalleryRow("true scenes and references", drawn(truths), captions, references)]
    for name in recipe.arm_names:
        pictures = recipe.out / name / TEST / "pictures"
        images = [Image.open(pictures / f"{case.record.id}_0.png") for case in cases]
        galleries.append(GalleryRow(name, drawn(images), captions))
    if FULL in recipe.arm_names and recipe.size.sides:
        for side in (LEFT, RIGHT):
            shown = toybox_layouts(active_preset(), side, min(columns, recipe.size.sides))
            pictures = recipe.out / FULL / side / "pictures"
            images = [
                draw_layout(Image.open(pictures / f"{case.record.id}_0.png").resize(tile), case.objects)
                for case in shown
            ]
            galleries.append(GalleryRow(f"{FULL}: box on the {side}, the same noise", images, [""] * len(images)))
    path = recipe.out / "sheet.png"
    save_gallery(galleries, path, headline="LocRef on the toybox: the same layouts and noise for all arms")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    args = parse_recipe(recipe_parser(__doc__.splitlines()[0], "locref", tuple(SIZES)), "locref", argv)
    out = args.out
    recipe = Recipe(args.preset, out, args.arms)
    rows = unique_rows([row for name in recipe.arm_names for row in recipe.measure(name)])
    metrics = metrics_of_rows(rows)
    ablations = args.preset == ABLATIONS
    chosen_arms = COMMITTED_FULL if ablations else left_out(recipe.arm_names, ALL_ARMS)
    protocol = f"{PROTOCOL}{chosen_arms}{choices(out, recipe.arm_names)} {recipe.size}"
    write_report(out, "reproduce-locref", metrics, protocol, rows, {"size": repr(recipe.size)})
    print(f"sheet: {(sheet := save_sheet(recipe))}")
    if args.record:
        record_outcome(
            args,
            metrics,
            rows,
            protocol,
            sheet,
            name="locref_ablations_toybox" if ablations else None,
            seeds=list(range(recipe.size.rounds)),
            weights=measured_weights(recipe.arm_names, recipe.weights),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
