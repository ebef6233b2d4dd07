"""What metrics of presence share: paint a list of prompts, look at the pictures, count what was found.

Painting and scoring are two steps over one folder:

    <out>/pictures/<id>_<round>.png, manifest.json   what was painted, and with what
    <out>/sightings/<detector>/process-<n>.jsonl     what a detector saw, from a low score on
    <out>/report.json, rows.jsonl                    figures, and what they were computed from
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from objectcompose.errors import CheckpointError, ObjectComposeError
from objectcompose.evaluation.detectors import (
    PRESENCE_DETECTORS,
    PRESENCE_SCORE,
    Sighting,
    load_presence,
    look_at_pictures,
)
from objectcompose.evaluation.generation import (
    Picture,
    list_pictures,
    paint_records,
    picture_name,
    read_manifest,
    require_pictures,
)
from objectcompose.evaluation.models import add_model_arguments, load_evaluated
from objectcompose.evaluation.prompts import PromptRecord, check_records, prompts_digest
from objectcompose.evaluation.report import write_report
from objectcompose.grounding.grounder import DTYPES
from objectcompose.grounding.inputs import check_threshold
from objectcompose.pipelines.model_arguments import add_sampling_arguments, steps_and_guidance
from objectcompose.processes import process_state


Row = dict[str, Any]
PICTURE_FOLDER, SIGHTING_FOLDER = "pictures", "sightings"


@dataclass(frozen=True)
class PresenceMetric:
    """One metric of presence.

    Attributes:
        name: of the metric.
        metrics_of_rows: figures of rows of `presence_rows`.
        detector: the protocol's own, where the evaluated model is not toybox.
        protocol: in words, what is counted.
    """

    name: str
    metrics_of_rows: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]
    detector: str
    protocol: str


def add_painting_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Declare how pictures are painted; `rounds` is the protocol's number of pictures per prompt."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of pictures and report")
    parser.add_argument("--max-prompts", type=int, metavar="N", help="only the list's first N prompts")
    group = parser.add_argument_group("generation")
    group.add_argument("--rounds", type=int, default=rounds, help="pictures per prompt (%(default)s)")
    add_sampling_arguments(group)
    group.add_argument("--batch-size", type=int, default=8, help="pictures at once (%(default)s)")
    add_model_arguments(parser)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of `add_painting_arguments` say to `paint_records`, defaults filled in."""
    steps, guidance_scale = steps_and_guidance(args)
    return {
        "rounds": args.rounds,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
        "batch_size": args.batch_size,
    }


def add_step_argument(parser: argparse.ArgumentParser) -> None:
    """Declare that painting and scoring may be run one without the other."""
    parser.add_argument("--only", choices=("generate", "score"), help="one of the two steps; default: both")


def add_detector_arguments(parser: argparse.ArgumentParser, detector: str) -> None:
    """Declare who looks; `detector` is the protocol's own."""
    add_step_argument(parser)
    group = parser.add_argument_group("scoring")
    group.add_argument("--detector", choices=PRESENCE_DETECTORS, help=f"default: {detector}, or judge without --model")
    group.add_argument("--detector-model", metavar="MODEL", help="its folder or Hub id; default: the protocol's")
    group.add_argument(
        "--threshold", type=float, default=PRESENCE_SCORE, help="a category counts above it (%(default)s)"
    )


def chosen_records(records: Sequence[PromptRecord], args: argparse.Namespace) -> list[PromptRecord]:
    """The prompts that the arguments leave.

    Raises:
        ObjectComposeError: none is left, or a number is out of range.
    """
    if args.max_prompts is not None and args.max_prompts < 1:
        raise ObjectComposeError(f"`--max-prompts` must be at least 1, got {args.max_prompts}.")
    check_records(records)
    return list(records[: args.max_prompts])


def paint_for(
    args: argparse.Namespace,
    records: Sequence[PromptRecord],
    name: Callable[[PromptRecord, int], str] = picture_name,
    are_painted: bool = False,
    load: Callable[[argparse.Namespace, str], Any] = load_evaluated,
    call_arguments: Callable[[Sequence[PromptRecord]], dict[str, Any]] | None = None,
    call_identity: str | None = None,
) -> list[Picture]:
    """The pictures that the arguments of `add_painting_arguments` ask for.

    Args:
        args: as parsed.
        records: the prompts.
        name: of a picture's file, without suffix.
        are_painted: they are only looked up.
        load: from the arguments and a device to the pipeline.
        call_arguments, call_identity: see `paint_records`.

    Raises:
        CheckpointError: the model cannot be loaded, or the folder holds pictures of something else.
        ImageInputError: `are_painted`, and pictures are missing.
    """
    folder = args.out / PICTURE_FOLDER
    pictures = list_pictures(records, args.rounds, folder, name)
    state = process_state(args.device)
    if are_painted:
        require_pictures(pictures)
        manifest = read_manifest(folder)
        if manifest is not None and manifest.get("prompts") != prompts_digest(records):
            raise CheckpointError(f"`--out` {args.out} holds pictures of another list of prompts than the one given.")
        return pictures
    return paint_records(
        load(args, args.device or str(state.device)),
        records,
        folder,
        **sampling_options(args),
        call_arguments=call_arguments,
        call_identity=call_identity,
        state=state,
        name=name,
    )


def run_presence(args: argparse.Namespace, records: Sequence[PromptRecord], metric: PresenceMetric) -> int:
    """Paint, look, count, report.

    Returns:
        0; input that cannot be used raises.

    Raises:
        ObjectComposeError: see `paint_for` and `look_at_pictures`.
    """
    threshold = check_threshold(args.threshold, "--threshold")
    records = chosen_records(records, args)
    state = process_state(args.device)
    detector = None
    if args.only != "generate":  # loaded first: a wrong detector or category shows before hours of painting
        name = args.detector or ("judge" if args.model is None else metric.detector)
        place, dtype = args.device or str(state.device), DTYPES[args.dtype]
        detector = load_presence(name, args.detector_model, device=place, dtype=dtype)
        detector.check_categories(sorted({name for record in records for name in record.categories}))
    pictures = paint_for(args, records, are_painted=args.only == "score")
    if detector is None:
        if state.is_main_process:
            print(f"{len(pictures)} pictures: {args.out / PICTURE_FOLDER}")
        return 0
    seen = look_at_pictures(detector, pictures, args.out / SIGHTING_FOLDER, args.batch_size, state)
    if state.is_main_process:
        rows = presence_rows(pictures, seen, threshold)
        manifest = read_manifest(args.out / PICTURE_FOLDER)
        write_report(
            args.out,
            metric.name,
            metric.metrics_of_rows(rows),
            f"{metric.protocol} {len(records)} prompts, {args.rounds} pictures each; detector {detector.name},"
            f" a category counts above a score of {threshold:g}. In per cent, with 95 % bootstrap intervals over"
            " prompts.",
            rows,
            {"painted_with": manifest, "detector": detector.identity()},
        )
    return 0


def presence_rows(
    pictures: Sequence[Picture], seen: Sequence[Sequence[Sighting]], threshold: float = PRESENCE_SCORE
) -> list[Row]:
    """One row per picture: what its prompt names and what of that was found.

    Args:
        pictures: the pictures.
        seen: their sightings.
        threshold: a category is found when a sighting of it has a score above this.

    Returns:
        `prompt` (id), `round`, `kind`, `named` and `found`, both lists of categories.
    """
    rows = []
    for picture, sightings in zip(pictures, seen, strict=True):
        present = {one.category for one in sightings if one.score > threshold}
        record = picture.record
        rows.append(
            {
                "prompt": record.id,
                "round": picture.round,
                "kind": record.kind,
                "named": list(record.categories),
                "found": [name for name in record.categories if name in present],
            }
        )
    return rows
