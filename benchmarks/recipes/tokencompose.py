"""TokenCompose and Separate-and-Enhance on the toybox: losses, layers, and an inference-time rival.

    make reproduce-tokencompose PRESET=smoke        # 4 minutes on two cores: do losses fall, do maps move into masks?
    make reproduce-tokencompose PRESET=cpu          # hours; run it again to go on
    make reproduce-tokencompose PRESET=gpu

Every trained arm sees the same scenes for the same number of steps. ldm, tokencompose, sepen and the rival are tuned
on the dev prompts by the same number of trials; ablations keep what tokencompose chose. The pictures of all arms start
from the same noise. Outcomes go to `<out>/report.json` and `sheet.png`, with `--record` also to
`benchmarks/results/tokencompose_toybox.json`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from benchmarks.measure import paired_ratio
from benchmarks.recipes.attend_and_excite import ATTEND_AND_EXCITE, call_arguments, load_attend_and_excite
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
    left_out,
    load_arm,
    measured_weights,
    parse_recipe,
    recipe_parser,
    record_outcome,
    train_once,
    trained_share,
)
from benchmarks.recipes.tokencompose_metrics import metrics_of_rows
from objectcompose.evaluation.attention_iou import THRESHOLDS, AttentionMaps, best_threshold
from objectcompose.evaluation.detectors import JudgePresence, look_at_pictures
from objectcompose.evaluation.frechet import jackknifed_distance
from objectcompose.evaluation.frechet_features import file_source, load_features, scene_source, source_features
from objectcompose.evaluation.generation import Picture, paint_records
from objectcompose.evaluation.map_iou import TIMESTEPS, measure_maps
from objectcompose.evaluation.presence import presence_rows
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.evaluation.report import write_report
from objectcompose.evaluation.toybox_prompts import toybox_pairs, toybox_prompts
from objectcompose.examples.gallery import GalleryRow, save_gallery
from objectcompose.toybox.judge import Judge
from objectcompose.toybox.scenes import list_objects
from objectcompose.toybox.weights import active_preset
from objectcompose.training import train_separate_enhance, train_token_compose
from objectcompose.training.grounded_captions import ToyboxCaptions
from objectcompose.training.token_compose_losses import SUPERVISED_LAYERS


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        arms: what is compared.
        scenes: that are trained on.
        steps: of training; Separate-and-Enhance, whose steps are cheaper, has as many.
        batch_size: samples of a step.
        trial_steps: of each trial on the dev split; 0 takes each arm's first candidate.
        prompts: of the test list, per number of objects.
        pairs: of categories, one prompt each.
        rounds: pictures per prompt.
        map_scenes: whose attention maps are measured.
        real_scenes: that the Frechet distance compares with; 0 leaves it out.
        rival_rounds: pictures per prompt of Attend-and-Excite, which paints a dozen times slower.
    """

    arms: tuple[str, ...]
    scenes: int
    steps: int
    batch_size: int
    trial_steps: int
    prompts: int
    pairs: int
    rounds: int
    map_scenes: int
    real_scenes: int
    rival_rounds: int


#: The second one stops where its trials did.
SEPEN = ("sepen", "sepen_short")
#: With what the dev split chose for "tokencompose", so that they differ from it in one thing only.
ABLATIONS = ("token_only", "pixel_only", "mid_only", "one_grid", "all_layers")
ALL_ARMS = (
    "base", "ldm", "tokencompose", *ABLATIONS, "largest_weights", "sepen", "sepen_short", ATTEND_AND_EXCITE,
)  # fmt: skip
SIZES = {
    "smoke": Size(("base", "ldm", "tokencompose", "sepen"), 256, 60, 16, 0, 2, 16, 1, 32, 0, 1),
    "cpu": Size(tuple(arm for arm in ALL_ARMS if arm != "all_layers"), 8000, 1200, 8, 300, 24, 42, 3, 100, 300, 1),
    "gpu": Size(ALL_ARMS, 32_000, 4000, 32, 400, 32, 256, 10, 500, 2000, 10),
}
DEV_PROMPTS, DEV_ROUNDS, DEV_SCENES = 12, 2, 32
#: Of toybox, at most. Stable Diffusion's defaults, 1e-3 and 5e-5, are for 24,000 steps.
TOKEN_WEIGHT, PIXEL_WEIGHT = 0.02, 0.001
#: Of these weights; the last one gives the paper's.
WEIGHT_SHARES = (1.0, 0.25, 0.05)
LEARNING_RATES = (1e-4, 5e-5, 2e-4)
KEY_LEARNING_RATES = (4e-3, 1e-3, 2e-3)  # of sepen, whose gradients are small and end in a hundredth of the weights
PROTOCOL = (
    "Toybox. Trained arms: the same scenes, steps and batches, the whole UNet, of which a delta of rank 16 is left"
    " (sepen: attn2.to_k, no pictures, prompts of two of all categories; sepen_short: with no more steps than its"
    " trials). Tuned on the dev prompts by the judge and"
    f" the same number of trials: rates (ldm, sepen), the losses' weights at the rate {LEARNING_RATES[0]:g}"
    " (tokencompose), settings (attend_and_excite). ldm: the denoising loss alone; tokencompose: with token and pixel"
    " losses in middle and decoder; with its choice token_only, pixel_only: with one of them; mid_only, one_grid (the"
    " decoder's coarsest), all_layers (encoder too): with both elsewhere; largest_weights: tokencompose with the first"
    " candidate's weights, twenty times the paper's; attend_and_excite: diffusers' pipeline on the base, whose maps"
    " of noised scenes it has."
    f" Pictures: {STEPS} DDIM steps, guidance {GUIDANCE:g}, the same noise for all arms. mg<k>: share of the test"
    " prompts with at least k objects that show k of them, object_accuracy: share of pairs with both, single_object:"
    " share of single ones, by the judge, in per cent; map_iou: maps of held-out scenes at t = 200, 400, 600,"
    " threshold of each arm from the dev split; fd_judge: Frechet distance of judge features to held-out scenes,"
    " captions the same. Intervals: 95 % bootstrap over prompts or scenes, fd_judge: jackknife."
)
DELTA_RANK = 16  # small enough to be committed; what is measured is what is left


def build_arms(size: Size) -> dict[str, Arm]:
    """The trained arms of a size."""
    common: dict[str, Any] = {
        "toybox_scenes": size.scenes,
        "train_batch_size": size.batch_size,
        "gradient_accumulation_steps": 1,
        "checkpointing_steps": 250,
    }
    token, pixel = {"token_weight": TOKEN_WEIGHT}, {"pixel_weight": PIXEL_WEIGHT}
    off = {"token_weight": 0.0, "pixel_weight": 0.0}
    supervised: dict[str, Options] = {
        "ldm": off,
        "tokencompose": {**token, **pixel},
        "token_only": {**off, **token},
        "pixel_only": {**off, **pixel},
        "mid_only": {**token, **pixel, "layers": r"^mid_block\..*attn2$"},
        "one_grid": {**token, **pixel, "layers": r"^up_blocks\.0\..*attn2$"},
        "all_layers": {**token, **pixel, "layers": r"attn2$"},
        "largest_weights": {**token, **pixel},
    }

    def chosen(candidates: Sequence[Options]) -> tuple[Options, ...]:
        return tuple(candidates if size.trial_steps else candidates[:1])

    def of_rates(rates: Sequence[float]) -> tuple[Options, ...]:
        return chosen([{"learning_rate": rate} for rate in rates])

    scaled = [{name: share * weight for name, weight in (token | pixel).items()} for share in WEIGHT_SHARES]
    candidates = {
        "ldm": of_rates(LEARNING_RATES),
        "tokencompose": chosen([{"learning_rate": LEARNING_RATES[0], **weights} for weights in scaled]),
    }
    arms = {
        name: Arm(
            name,
            train_token_compose.main,
            {**common, "learning_rate": LEARNING_RATES[0], "delta_rank": DELTA_RANK, **options},
            candidates.get(name, ({},)),
        )
        for name, options in supervised.items()
    }
    concepts = {**common, "concepts": active_preset().categories, "norm_weight": 0.5}
    del concepts["toybox_scenes"]  # no pictures
    for name in SEPEN:
        arms[name] = Arm(name, train_separate_enhance.main, concepts, of_rates(KEY_LEARNING_RATES))
    return arms


class Recipe:
    """A run: trains, paints, looks, and keeps it all under one folder.

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
        self.state = PartialState(cpu=self.device == "cpu")
        self.judge = JudgePresence(Judge.load(self.device))
        self.features = load_features("judge", None, self.device)
        self.scenes = scene_source(self.size.real_scenes) if self.size.real_scenes else None

    def weights(self, name: str) -> Path | None:
        """Trained weights of an arm, None of one that trains nothing."""
        if name not in self.arms:
            return None
        data = {} if name in SEPEN else {"cache_dir": str(self.out / "cache")}
        steps = self.size.trial_steps if name == "sepen_short" else self.size.steps
        return train_once(self.arms[name], {**self.arm_options(name), **data}, steps, self.out / name)

    def arm_options(self, name: str) -> Options:
        """What the dev split chose for a trained arm, of ablations for the arm that they are of."""
        tuned = "tokencompose" if name in ABLATIONS else "sepen" if name in SEPEN else name
        chosen = choose_candidate(self.arms[tuned], self.size.trial_steps, self.out / tuned, self.dev_score)
        own = self.arms[name].options
        return {option: value for option, value in chosen.items() if own.get(option) != 0}  # what is off stays off

    def dev_score(self, weights: Path) -> float:
        """Share of the dev prompts' objects that are found."""
        records = toybox_prompts(active_preset(), "dev", DEV_PROMPTS)
        rows = self.look("dev", weights.parent, load_arm(weights, self.device), records, DEV_ROUNDS)
        return sum(len(row["found"]) for row in rows) / sum(len(row["named"]) for row in rows)

    def look(
        self, case: str, folder: Path, pipeline: Any, records: Sequence[PromptRecord], rounds: int, **paint: Any
    ) -> list[Row]:
        """Paint a list and say what is found."""
        pictures = self.paint(case, folder, pipeline, records, rounds, **paint)
        return presence_rows(pictures, look_at_pictures(self.judge, pictures, folder / case / "sightings"))

    def paint(
        self, case: str, folder: Path, pipeline: Any, records: Sequence[PromptRecord], rounds: int, **paint: Any
    ) -> list[Picture]:
        """Pictures of a list, in `<folder>/<case>/pictures`."""
        return paint_records(
            pipeline,
            records,
            folder / case / "pictures",
            rounds=rounds,
            steps=STEPS,
            guidance_scale=GUIDANCE,
            state=self.state,
            **{"batch_size": 8, **paint},
        )

    def lists(self, name: str) -> dict[str, tuple[list[PromptRecord], int]]:
        """The test lists and their rounds for an arm."""
        preset = active_preset()
        rounds = self.size.rival_rounds if name == ATTEND_AND_EXCITE else self.size.rounds
        singles = [
            PromptRecord(f"single-{number:02d}", f"a photo of {list_objects([name])}", (name,))
            for number, name in enumerate(preset.categories)
        ]
        return {
            "test": (toybox_prompts(preset, "test", self.size.prompts), rounds),
            "pairs": (toybox_pairs(preset)[: self.size.pairs], rounds),
            "single": (singles, 2 * rounds),
        }

    def measure(self, name: str) -> list[Row]:
        """All rows of one arm."""
        weights, folder = self.weights(name), self.out / name
        pipeline, paint = load_arm(weights, self.device), {}
        if name == ATTEND_AND_EXCITE:
            pipeline, paint = self.tuned_attend_and_excite(folder)
        rows: list[Row] = []
        for case, (records, rounds) in self.lists(name).items():
            rows += [
                {"case": case, "arm": name, **row}
                for row in self.look(case, folder, pipeline, records, rounds, **paint)
            ]
        rows += self.fd_rows(name, folder, pipeline, **paint)
        if name != ATTEND_AND_EXCITE:  # whose maps of noised scenes are the base's
            rows += self.map_rows(name, folder, pipeline)
        return rows

    def fd_rows(self, name: str, folder: Path, pipeline: Any, **paint: Any) -> list[Row]:
        """Frechet distance of an arm's pictures to held-out scenes with the same captions."""
        if self.scenes is None:
            return []
        captions = [
            PromptRecord(f"scene-{number:05d}", text, named_categories(text))
            for number, text in enumerate(self.scenes.captions)
        ]
        painted = file_source([one.path for one in self.paint("scenes", folder, pipeline, captions, 1, **paint)])
        found = [source_features(self.features, one, 32, self.state) for one in (painted, self.scenes)]
        value, without_blocks = jackknifed_distance(*found)
        return [{"case": "fd", "arm": name, "value": value, "left_out": without_blocks}]

    def map_rows(self, name: str, folder: Path, pipeline: Any) -> list[Row]:
        """How well an arm's maps cover the objects of held-out scenes, at the threshold that its dev maps choose."""
        attention = AttentionMaps(pipeline, SUPERVISED_LAYERS)
        found = {}
        for split, count in (("dev", DEV_SCENES), ("test", self.size.map_scenes)):
            scenes = ToyboxCaptions(active_preset(), count, self.out / "scenes", split)
            numbers = list(range(count))
            found[split] = measure_maps(attention, scenes, numbers, split, TIMESTEPS, folder, 32, self.state)
        place = THRESHOLDS.index(best_threshold(found["dev"]))
        return [
            {
                "case": "map",
                "arm": name,
                **{key: row[key] for key in ("sample", "phrase", "t", "inside")},
                "iou": row["ious"][place],
            }
            for row in found["test"]
        ]

    def tuned_attend_and_excite(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        """The rival with the settings that the dev prompts choose, by as many trials as the tuned arms have."""
        pipeline = load_attend_and_excite(self.device)
        records, scores = toybox_prompts(active_preset(), "dev", DEV_PROMPTS), []
        settings = call_arguments(len(LEARNING_RATES) if self.size.trial_steps else 1)
        rounds = min(DEV_ROUNDS, self.size.rival_rounds)
        for number, arguments in enumerate(settings):
            rows = self.look(f"dev-{number}", folder, pipeline, records, rounds, **arguments)
            scores.append(sum(len(row["found"]) for row in rows) / sum(len(row["named"]) for row in rows))
            print(f"== {ATTEND_AND_EXCITE}: {arguments['call_identity']}: {scores[-1]:.3f}")
        return pipeline, settings[scores.index(max(scores))]

    def time_rows(self, name: str) -> list[Row]:
        """Seconds of a picture of two objects beside the base's, in pairs."""
        record = toybox_pairs(active_preset())[0]
        base, extra = load_arm(None, self.device), {}
        pipeline = base
        if name == ATTEND_AND_EXCITE:
            pipeline, paint = self.tuned_attend_and_excite(self.out / name)  # as it was measured
            extra = paint["call_arguments"]([record])
        elif self.weights(name) is not None:
            pipeline = load_arm(self.weights(name), self.device)

        def paint(painter: Any, prompt: Any, **more: Any) -> None:  # the rival's work depends on the noise
            noise = torch.Generator().manual_seed(0)
            painter(prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise, **more)

        found = paired_ratio(lambda: paint(pipeline, [record.text], **extra), lambda: paint(base, record.text))
        return [{"case": "seconds", "arm": name, **row} for row in found.rows()]


def named_categories(caption: str) -> tuple[str, ...]:
    """The categories that a caption of toybox names."""
    return tuple(name for name in active_preset().categories if re.search(rf"\b{name}\b", caption))


def save_sheet(recipe: Recipe, rows: Sequence[Row], columns: int = 6) -> Path:
    """The first test pictures of every arm, below one another, with what the judge found."""
    galleries = []
    for name in recipe.arm_names:
        shown = [row for row in rows if row["case"] == "test" and row["arm"] == name][:columns]
        pictures = recipe.out / name / "test" / "pictures"
        images = [Image.open(pictures / f"{row['prompt']}_{row['round']}.png") for row in shown]
        captions = [f"{', '.join(row['named'])}\nfound: {', '.join(row['found']) or 'none'}" for row in shown]
        galleries.append(GalleryRow(name, images, captions))
    path = recipe.out / "sheet.png"
    save_gallery(galleries, path, headline="TokenCompose on the toybox: the same prompts and noise for all arms")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    args = parse_recipe(recipe_parser(__doc__.splitlines()[0], "tokencompose"), "tokencompose", argv)
    out = args.out
    recipe = Recipe(args.preset, out, args.arms)
    rows = [row for name in recipe.arm_names for row in recipe.measure(name)]
    for name in ("tokencompose", ATTEND_AND_EXCITE):
        if name in recipe.arm_names and args.preset != "smoke":
            rows += recipe.time_rows(name)
    metrics = metrics_of_rows(rows)
    stated = {}
    if "sepen" in recipe.arm_names:
        weights = recipe.weights("sepen")
        assert weights is not None
        stated["trained_share.sepen"] = trained_share(weights)
    protocol = f"{PROTOCOL}{left_out(recipe.arm_names, ALL_ARMS)}{choices(out, recipe.arm_names)} {recipe.size}"
    write_report(out, "reproduce-tokencompose", {**metrics, **stated}, protocol, rows, {"size": repr(recipe.size)})
    print(f"sheet: {(sheet := save_sheet(recipe, rows))}")
    if args.record:
        record_outcome(
            args,
            {**metrics, **stated},
            rows,
            protocol,
            sheet,
            seeds=list(range(recipe.size.rounds)),
            weights=measured_weights(recipe.arm_names, recipe.weights),
            stated=sorted(stated),
            timing_fields=("seconds_a", "seconds_b"),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
