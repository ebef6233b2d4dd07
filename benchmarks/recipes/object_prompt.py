"""ObjectPrompt on the toybox: what keys and values are made of, and what compositional guidance adds.

    make reproduce-object-prompt PRESET=smoke     # 4 minutes on two cores: the committed adapter, guided and not
    make reproduce-object-prompt PRESET=cpu       # about 3 hours on two cores; run it again to go on
    make reproduce-object-prompt PRESET=gpu

Four adapters, whose keys and values come from the narrow stream ("coarse"), the wide one ("fine"), narrow keys and
wide values ("mixed", the paper's) or the other way round ("swapped"), see the same scenes for the same number of steps
at the same learning rate (gpu: are tuned on the dev sets by the same number of trials). On "mixed" (smoke and cpu: the
repository's adapter, which was trained twice as long) guidance is compared with none, with masks alone, with its fast
mode and with text alone, for two to six objects, look-alikes and occluded references. All arms paint from the same
noise. Outcomes go to `<out>/report.json`, `scatter.png` and `sheet.png`, with `--record` also to
`benchmarks/results/object_prompt_toybox.json`. Of the CPU preset's time, at 3 steps and 2 unguided pictures a second,
training takes 1.2 hours and painting and looking half an hour.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import paired_ratio
from benchmarks.object_prompt_cost import TimedSegmenter
from benchmarks.recipes.common import (
    GUIDANCE,
    STEPS,
    Arm,
    Row,
    best_device,
    check_arms,
    choices,
    choose_candidate,
    measured_weights,
    model_file,
    parse_recipe,
    recipe_parser,
    record_outcome,
    train_once,
)
from benchmarks.recipes.object_prompt_metrics import GUIDANCE_ARMS, STREAM_ARMS, metrics_of_rows
from benchmarks.recipes.object_prompt_sheet import save_scatter, save_sheet
from objectcompose.evaluation import composition
from objectcompose.evaluation.composition_metrics import OVERLAP_SHARE, composition_metrics
from objectcompose.evaluation.report import ROWS_FILE, write_report
from objectcompose.evaluation.toybox_object_sets import SET_COUNTS, SET_KINDS, toybox_object_sets
from objectcompose.pipelines.token_refinement import REFINEMENT_STEPS
from objectcompose.toybox.weights import active_preset, toybox_path
from objectcompose.training import train_object_prompt


@dataclass(frozen=True)
class Sets:
    """Which object sets are painted, and how often.

    Attributes:
        counts: numbers of objects.
        kinds: see `toybox_object_sets`.
        per_count: sets for each kind and number.
        rounds: pictures per set.
    """

    counts: tuple[int, ...]
    kinds: tuple[str, ...]
    per_count: int
    rounds: int


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        scenes: that are trained on.
        steps: of training, of each arm.
        batch_size: samples of a step.
        trial_steps: of each trial on the dev sets; 0 takes each arm's first candidate.
        streams: sets of the ablation of keys and values.
        guidance: sets of the comparison of guidance.
        uses_committed: whether guidance is compared on the repository's adapter, not on the trained "mixed": guidance
            needs objects that can be matched, and the CPU preset's arms see too few samples for many of them.
        has_times: whether calls are timed beside plain sampling.
    """

    scenes: int
    steps: int
    batch_size: int
    trial_steps: int
    streams: Sets
    guidance: Sets
    uses_committed: bool = False
    has_times: bool = True


_DISTINCT = ("seen", "unseen", "unseen-pair")
SIZES = {
    "smoke": Size(
        64, 12, 8, 0, Sets((2,), ("seen", "unseen"), 1, 2), Sets((2, 3), ("seen", "unseen"), 3, 2), True, False
    ),
    "cpu": Size(6000, 3000, 8, 0, Sets((2, 3), _DISTINCT, 4, 8), Sets(SET_COUNTS, SET_KINDS, 3, 3), True),
    "gpu": Size(16_000, 2000, 32, 150, Sets((2, 3), _DISTINCT, 8, 8), Sets(SET_COUNTS, SET_KINDS, 8, 8)),
}
DEV_SETS = Sets((2, 3), ("seen", "unseen"), 2, 2)
#: The first one where there are no trials: short ones tell little of values that start at zero.
LEARNING_RATES = (1e-3, 5e-4, 2e-3)
#: Arm of guidance -> the command's name for it, and the strength of the objects.
GUIDANCE_OF_ARM = {
    "text": ("off", 0.0), "unguided": ("off", 1.0), "masks": ("masks", 1.0), "guided": ("exact", 1.0),
    "guided_fast": ("fast", 1.0),
}  # fmt: skip
TIMED_OBJECTS = 4
#: What result files call the weights that guidance was compared on.
GUIDED = "guided"
PROTOCOL = (
    "Toybox. Adapters of four kinds (streams of keys and values: coarse: layout tokens for both; fine: appearance"
    " tokens for both; mixed: layout for keys, appearance for values; swapped: the reverse): the same scenes, steps"
    " and batches, values from zero, cosine schedule, each tuned on the dev sets by the judge's identity and the same"
    f" number of trials (learning rates), without trials (trial_steps=0) the rate {LEARNING_RATES[0]:g}. Guidance on"
    " mixed, with uses_committed on the repository's adapter of that kind, trained in 6000 steps of 8: text: object"
    " pictures at strength 0; unguided; masks:"
    f" objects are confined to their segments; guided: with {REFINEMENT_STEPS} updates of the appearance tokens,"
    f" too; guided_fast: with a first run of half the steps; segments by toybox's CLIPSeg. Pictures: {STEPS} DDIM"
    f" steps, guidance scale {GUIDANCE:g}, the same noise for all arms. Segments are found by CLIPSeg and paired with"
    " prompts by DINO, which guidance uses, too; clipcomp's image encoder reads the prompts. The judge took no part."
    " identity: cosine of the judge's embeddings"
    " of prompt and segment less the mean cosine with other identities of the category, 0 less the floor for"
    " prompts without a segment; dinocomp, clipcomp: cosines of DINO and CLIP, 0 without a segment; diversity:"
    " spread of centre, size, rotation and flip of an object over a set's pictures in units of the world's own"
    " spread; matching_accuracy: share of prompts whose segment the judge finds most like this prompt, in per cent,"
    " in unguided pictures unless another arm is named; distinct: sets of different categories, lookalike5: five"
    " recolourings of one drawing; _overlapping: objects whose box lies in another one's by more than"
    f" {OVERLAP_SHARE:g}, _apart: the others; _occluded: references that miss a third. trade_off: coarse and fine"
    " differ by more than 4 standard errors; kept: share of fine's identity, and of coarse's extra diversity, that"
    " mixed has. seconds_ratio: one picture of four objects beside plain sampling, without segmentation, which"
    " stands apart. Intervals: 95 % bootstrap over sets."
)


def build_arms(size: Size, cache: Path) -> dict[str, Arm]:
    """The trained arms of a size; they share what is encoded."""
    rates = LEARNING_RATES if size.trial_steps else LEARNING_RATES[:1]
    common: dict[str, Any] = {
        "toybox_scenes": size.scenes,
        "train_batch_size": size.batch_size,
        "value_init": "zero",
        "background_share": 0.1,
        "prompt_views": 3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "checkpointing_steps": 500,
        "cache_dir": str(cache),
    }
    return {
        name: Arm(
            name,
            train_object_prompt.main,
            {**common, "streams": name},
            tuple({"learning_rate": rate} for rate in rates),
        )
        for name in STREAM_ARMS
    }


class Recipe:
    """A run: trains, paints, looks, and keeps it all under one folder.

    Args:
        name: of the size.
        out: the folder.
        arms: their names; None: all.
    """

    def __init__(self, name: str, out: Path, arms: Sequence[str] | None = None) -> None:
        self.size, self.out, self.device = SIZES[name], out, best_device()
        known = (*STREAM_ARMS, *GUIDANCE_ARMS)
        self.arm_names = known if arms is None else tuple(arms)
        check_arms(self.arm_names, known)
        self.arms = build_arms(self.size, out / "cache")

    def weights(self, name: str) -> Path:
        """The adapter of a trained arm."""
        arm, folder = self.arms[name], self.out / name
        chosen = choose_candidate(arm, self.size.trial_steps, folder, self.dev_score)
        return train_once(arm, chosen, self.size.steps, folder)

    def guided_weights(self) -> Path:
        """The adapter on which guidance is compared."""
        return toybox_path("object_prompt") if self.size.uses_committed else self.weights("mixed")

    def dev_score(self, weights: Path) -> float:
        """Identity above its floor on the dev sets."""
        rows = self.evaluate(weights, weights.parent / "dev", DEV_SETS, split="dev")
        return composition_metrics(rows)["identity_gain"]

    def arguments(
        self, adapter: Path, folder: Path, sets: Sets, guidance: str = "off", scale: float = 1.0, split: str = "test"
    ) -> argparse.Namespace:
        """Arguments of `objectcompose evaluate composition`."""
        parser = argparse.ArgumentParser()
        composition.add_arguments(parser)
        given = ["--adapter", str(adapter), "--out", str(folder), "--split", split]
        given += ["--guidance", guidance, "--image-scale", str(scale)]
        given += ["--counts", *map(str, sets.counts), "--kinds", *sets.kinds, "--per-count", str(sets.per_count)]
        given += ["--rounds", str(sets.rounds), "--steps", str(STEPS), "--guidance-scale", str(GUIDANCE)]
        return parser.parse_args([*given, "--device", self.device])

    def evaluate(self, adapter: Path, folder: Path, sets: Sets, *options: Any, **more: Any) -> list[Row]:
        """Paint sets and look at them; a row for each object of each picture. `options` are those of `arguments`."""
        composition.main(self.arguments(adapter, folder, sets, *options, **more))
        lines = (folder / ROWS_FILE).read_text(encoding="utf-8").splitlines()
        return [_rounded(json.loads(line)) for line in lines]

    def rows_of_arm(self, name: str) -> list[Row]:
        """All rows of an arm but its times."""
        if name in STREAM_ARMS:
            case, rows = "streams", self.evaluate(self.weights(name), self.folder(name), self.size.streams)
        else:
            options = (self.guided_weights(), self.folder(name), self.size.guidance, *GUIDANCE_OF_ARM[name])
            case, rows = "guidance", self.evaluate(*options)
        return [{"case": case, "arm": name, **row} for row in rows]

    def folder(self, name: str) -> Path:
        """Where an arm's pictures are."""
        return self.out / name / "test"

    def pipeline(self) -> Any:
        """The pipeline that guidance is compared with."""
        args = self.arguments(self.guided_weights(), self.out, self.size.guidance)
        pipeline = composition.load_object_prompt(args, self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def time_rows(self, name: str, pipeline: Any) -> list[Row]:
        """Seconds of a picture of four objects beside one without objects, in pairs."""
        preset = active_preset()
        one = toybox_object_sets(preset, "dev", (TIMED_OBJECTS,), ("seen",), 1)[0]
        segmenter = TimedSegmenter(composition.load_segmenter(torch.device(self.device)))
        more = composition.guidance_arguments(GUIDANCE_OF_ARM[name][0], segmenter)
        objects = composition.prompts_of_set(preset, one, 1.0)
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}

        def paint(**arguments: Any) -> None:
            pipeline(one.record.text, generator=torch.Generator().manual_seed(0), **settings, **arguments)

        found = paired_ratio(lambda: segmenter.around(lambda: paint(objects=objects, **more)), paint)
        return [
            {"case": "seconds", "arm": name, **row, "seconds_segment": seconds}
            for row, seconds in zip(found.rows(), segmenter.seconds[-len(found.seconds_a) :], strict=True)
        ]


def _rounded(row: Row) -> Row:
    """Numbers with five digits: a result file holds many thousands of them."""
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    args = parse_recipe(recipe_parser(__doc__.splitlines()[0], "object-prompt"), "object-prompt", argv)
    out = args.out
    recipe = Recipe(args.preset, out, args.arms)
    guided = [name for name in recipe.arm_names if name in GUIDANCE_ARMS]
    if guided:
        recipe.guided_weights()  # a missing adapter shows before any training
    rows = [row for name in recipe.arm_names for row in recipe.rows_of_arm(name)]
    if guided:
        pipeline = recipe.pipeline()
        if recipe.size.has_times:
            rows += [row for name in guided if name != "text" for row in recipe.time_rows(name, pipeline)]
        print(f"sheet: {save_sheet(recipe, pipeline, rows)}")
    metrics = metrics_of_rows(rows)
    protocol = f"{PROTOCOL}{choices(out, recipe.arm_names)} {recipe.size}"
    write_report(out, "reproduce-object-prompt", metrics, protocol, rows, {"size": repr(recipe.size)})
    print(f"scatter: {save_scatter(metrics, out / 'scatter.png')}")
    if args.record:
        record_outcome(
            args,
            metrics,
            rows,
            protocol,
            out / "sheet.png",
            seeds=list(range(max(recipe.size.streams.rounds, recipe.size.guidance.rounds))),
            weights={**measured_weights(STREAM_ARMS, recipe.weights), GUIDED: model_file(recipe.guided_weights())},
            timing_fields=("seconds_a", "seconds_b", "seconds_segment"),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
