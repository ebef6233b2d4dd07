"""`objectcompose evaluate composition`: are the prompted objects there, each with its identity, in layouts that vary?

    objectcompose evaluate composition --adapter outputs/object-prompt/weights --out outputs/composition
    objectcompose evaluate composition --adapter outputs/object-prompt/weights --guidance exact --out outputs/guided \\
        --lpips-weights alexnet-owt-7be5be79.pth

Toybox's object sets (`toybox_object_sets`), eight pictures each, looked at by the judge, whose segmenter is another
than the guidance's. What the figures mean is in `composition_metrics`, what poses an outline tells in `toybox_poses`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import BitImageProcessorPil, Dinov2Model

from objectcompose.errors import CheckpointError, ObjectComposeError
from objectcompose.evaluation.composition_lpips import load_lpips, lpips_rows
from objectcompose.evaluation.composition_metrics import composition_metrics
from objectcompose.evaluation.composition_scorer import CompositionScorer
from objectcompose.evaluation.generation import Picture, read_manifest, require_pictures
from objectcompose.evaluation.models import load_evaluated
from objectcompose.evaluation.presence import (
    PICTURE_FOLDER,
    add_painting_arguments,
    add_step_argument,
    chosen_records,
    paint_for,
)
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.evaluation.report import write_report
from objectcompose.evaluation.row_log import RowLog, measure_groups
from objectcompose.evaluation.toybox_object_sets import (
    SET_COUNTS,
    SET_KINDS,
    SETS_PER_COUNT,
    ObjectSet,
    toybox_object_sets,
)
from objectcompose.grounding.clipseg import load_clipseg
from objectcompose.grounding.grounder import Grounder
from objectcompose.pipelines.object_matching import SIMILARITY_THRESHOLD
from objectcompose.pipelines.token_refinement import REFINEMENT_STEPS
from objectcompose.processes import process_state
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.weights import active_preset, toybox_path


HELP = "Object pictures as prompts: identity, matching and diversity of what is painted."
GUIDANCE_MODES = ("off", "masks", "exact", "fast")
ROUNDS = 8
SCORE_FOLDER = "scores"

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    method = parser.add_argument_group("method")
    method.add_argument("--adapter", help="folder or Hub id of an ObjectPromptAdapter for toybox; to paint")
    method.add_argument(
        "--guidance",
        choices=GUIDANCE_MODES,
        default="off",
        help="compositional guidance; masks: only confined, no token is refined (%(default)s)",
    )
    method.add_argument("--image-scale", type=float, default=1.0, help="strength of the objects (%(default)s)")
    method.add_argument(
        "--refinement-steps", type=int, default=REFINEMENT_STEPS, help="of exact and fast guidance (%(default)s)"
    )
    sets = parser.add_argument_group("object sets")
    sets.add_argument("--split", choices=sorted(SETS_PER_COUNT), default="test", help="(%(default)s)")
    sets.add_argument("--counts", type=int, nargs="+", default=list(SET_COUNTS), metavar="N", help="objects in a set")
    sets.add_argument("--kinds", nargs="+", choices=SET_KINDS, default=list(SET_KINDS), help="of sets")
    sets.add_argument("--per-count", type=int, help="sets for each kind and number of objects; default: the split's")
    parser.add_argument(
        "--lpips-weights", type=Path, metavar="FILE", help="of torchvision's AlexNet, for LPIPS as diversity too"
    )
    add_step_argument(parser)
    add_painting_arguments(parser, rounds=ROUNDS)


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; input that cannot be used raises.

    Raises:
        ObjectComposeError: a number is out of range, or a model other than toybox is asked for.
        CheckpointError: the adapter or LPIPS's weights are missing, or the adapter was made for another base.
        MissingPackageError: LPIPS needs a package that is not installed.
    """
    sets = _chosen_sets(args)
    state = process_state(args.device)
    device = args.device or str(state.device)
    # loaded first: missing weights show before hours of painting
    scorer = None if args.only == "generate" else CompositionScorer.of_toybox(device)
    distance = None if args.lpips_weights is None else load_lpips(args.lpips_weights, device)
    pictures = paint_sets(args, sets)
    if scorer is None:
        if state.is_main_process:
            print(f"{len(pictures)} pictures: {args.out / PICTURE_FOLDER}")
        return 0
    rows = score_pictures(scorer, sets, pictures, args.out / SCORE_FOLDER, args.batch_size, state)
    if state.is_main_process:
        rows += [] if distance is None else lpips_rows(distance, sets, pictures)
        scored_with = scorer.identity() if distance is None else f"{scorer.identity()} {distance.identity}"
        _report(args, scored_with, sets, rows)
    return 0


def _chosen_sets(args: argparse.Namespace) -> dict[str, ObjectSet]:
    """The sets by id, after all checks that need no model."""
    if args.model is not None:
        raise ObjectComposeError(
            "`--model` must not be given: object sets and judge are of toybox. Its fine-tuned parts may be"
            f" (--unet, --delta, --lora), got {args.model!r}."
        )
    if args.adapter is None and args.only != "score":
        raise CheckpointError(
            "`--adapter` is needed to paint: a folder or Hub id of an ObjectPromptAdapter, got none."
        )
    if not 0 <= args.image_scale < float("inf"):
        raise ObjectComposeError(f"`--image-scale` must be finite and at least 0, got {args.image_scale}.")
    if args.refinement_steps < 0:
        raise ObjectComposeError(f"`--refinement-steps` must be at least 0, got {args.refinement_steps}.")
    sets = toybox_object_sets(active_preset(), args.split, args.counts, args.kinds, args.per_count)
    by_id = {one.record.id: one for one in sets}
    return {record.id: by_id[record.id] for record in chosen_records([one.record for one in sets], args)}


def paint_sets(args: argparse.Namespace, sets: dict[str, ObjectSet]) -> list[Picture]:
    """The pictures of the sets, painted where they are missing."""
    preset = active_preset()
    names: list[Any] = [args.guidance, args.image_scale]
    segmenter: Any = None
    if args.guidance != "off":
        place = torch.device(args.device or process_state(args.device).device)
        segmenter = load_segmenter(place)
        names += [segmenter.identity(), 0 if args.guidance == "masks" else args.refinement_steps]
    guided = guidance_arguments(args.guidance, segmenter, args.refinement_steps)

    def call_arguments(records: Sequence[PromptRecord]) -> dict[str, Any]:
        return {"objects": [prompts_of_set(preset, sets[one.id], args.image_scale) for one in records], **guided}

    return paint_for(
        args,
        [one.record for one in sets.values()],
        are_painted=args.only == "score",
        load=load_object_prompt,
        call_arguments=call_arguments,
        call_identity=json.dumps([*names, sets_digest(list(sets.values()))]),
    )


def load_segmenter(device: torch.device) -> Grounder:
    """What the guidance sees a picture with: toybox's CLIPSeg, which is not the judge."""
    return Grounder(load_clipseg(toybox_path("clipseg"), device=device, dtype=torch.float32))


def guidance_arguments(guidance: str, segmenter: Any, refinement_steps: int = REFINEMENT_STEPS) -> dict[str, Any]:
    """Arguments of a call under one of `GUIDANCE_MODES`; none for "off"."""
    if guidance == "off":
        return {}
    return {
        "compositional_guidance": True,
        "segmenter": segmenter,
        "mode": "fast" if guidance == "fast" else "exact",
        "refinement_steps": 0 if guidance == "masks" else refinement_steps,
    }


def load_object_prompt(args: argparse.Namespace, device: str) -> Any:
    """The pipeline with adapter and toybox's DINO."""
    pipeline = load_evaluated(args, device, "object-prompt", adapter=args.adapter)
    path = toybox_path("dino")
    dino = Dinov2Model.from_pretrained(path, dtype=pipeline.unet.dtype, use_safetensors=True)
    pipeline.register_modules(
        dino=dino.to(device).eval(),
        dino_processor=BitImageProcessorPil.from_pretrained(path),
    )
    if pipeline.adapter.dtype != pipeline.unet.dtype:
        pipeline.adapter.to(pipeline.unet.dtype)
    return pipeline


def prompts_of_set(preset: Preset, one: ObjectSet, scale: float) -> list[dict[str, Any]]:
    """The objects of a call; their phrases let the guidance's segmenter find them by text."""
    return [
        {"phrase": identity.category, "image": one.reference(preset, number), "scale": scale}
        for number, identity in enumerate(one.identities)
    ]


def sets_digest(sets: Sequence[ObjectSet]) -> str:
    """Changes with any set's prompt or identities."""
    content = [[one.record.id, one.record.text, [repr(identity) for identity in one.identities]] for one in sets]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def score_pictures(
    scorer: CompositionScorer,
    sets: dict[str, ObjectSet],
    pictures: Sequence[Picture],
    folder: Path,
    batch_size: int,
    state: PartialState,
) -> list[Row]:
    """One row per picture and object, this process scoring its share; what was scored before is read.

    Args:
        scorer: looks.
        sets: by id.
        pictures: files that are there.
        folder: of the rows.
        batch_size: pictures between two writes.
        state: the processes.

    Returns:
        In every process, rows for `composition_metrics`.

    Raises:
        ImageInputError: pictures are missing or unreadable.
    """
    require_pictures(pictures)
    place = folder / hashlib.sha256(scorer.identity().encode()).hexdigest()[:16]

    def measure(group: Sequence[Picture], log: RowLog) -> list[Row]:
        rows = []
        for picture in group:
            content, one = picture.path.read_bytes(), sets[picture.record.id]
            digest = hashlib.sha256(content + sets_digest([one]).encode()).hexdigest()[:32]
            key = f"{picture.path.name} {digest}"
            if key not in log.rows:
                log.add(key, {"objects": scorer.score(picture.path, one)})
            labels = {"set": one.record.id, "round": picture.round, "kind": one.record.kind}
            rows += [
                {**labels, "count": len(one.identities), "object": number, **row}
                for number, row in enumerate(log.rows[key]["objects"])
            ]
        return rows

    rows = measure_groups(pictures, measure, place, batch_size, state, "judge")
    return sorted(rows, key=lambda row: (row["set"], row["round"], row["object"]))


def _report(args: argparse.Namespace, scored_with: str, sets: dict[str, ObjectSet], rows: Sequence[Row]) -> None:
    manifest = read_manifest(args.out / PICTURE_FOLDER)
    write_report(
        args.out,
        "composition",
        composition_metrics(rows),
        f"Object sets of toybox ({args.split}): {len(sets)} sets, {args.rounds} pictures each, guidance"
        f" {_guidance_of(manifest)}. Segments by the judge, paired with prompts by DINO cosines without a threshold;"
        " cosines are means over prompts, 0 where none is left. Shares in per cent. Accepted pairs and copies from a"
        f" cosine of {SIMILARITY_THRESHOLD:g}. Rotation and flip only where an outline tells them. 95 % bootstrap"
        " intervals over sets.",
        rows,
        {"painted_with": manifest, "scorer": scored_with},
    )


def _guidance_of(manifest: dict[str, Any] | None) -> str:
    """What the pictures were painted with, whatever the arguments of scoring say."""
    return "unknown" if manifest is None else str(json.loads(manifest["settings"]["call"])[0])
