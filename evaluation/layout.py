"""`objectcompose evaluate layout`: are objects in their boxes, do they look like their references, do they leak?

    objectcompose evaluate layout --adapter outputs/locref/weights --out outputs/layout      # the embedded toybox
    objectcompose evaluate layout --out outputs/layout-text                                  # the prompt alone
    objectcompose evaluate layout --adapter outputs/locref/weights --objects 10 --out outputs/layout-10
    objectcompose evaluate layout --model stable-diffusion-v1-5/stable-diffusion-v1-5 --adapter my_adapter \\
        --layouts my_layouts --out outputs/layout-sd
    objectcompose evaluate layout --model stable-diffusion-v1-5/stable-diffusion-v1-5 --layouts my_layouts \\
        --ip-adapter ip-adapter_sd15.safetensors --image-encoder laion/CLIP-ViT-H-14-laion2B-s32B-b79K \\
        --out outputs/layout-rival

`--layouts` is a folder of layout files, each with its true scene beside it if there is one. A detector's boxes are
held against the layout's by COCO's rules; what it finds in the true scenes is its ceiling. On toybox the judge
detects, and layouts whose identities training shows are told from others. Boxes that `--box-jitter` moved are what is
painted and what is measured by, so that the ceiling says what a layout's errors cost by themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image

from objectcompose.errors import CheckpointError, LayoutError, ObjectComposeError
from objectcompose.evaluation.crop_similarity import (
    DEFAULT_CLIP,
    DEFAULT_DINO,
    CropEncoder,
    public_encoders,
    toybox_encoders,
)
from objectcompose.evaluation.detectors import PRESENCE_DETECTORS, PresenceDetector, load_presence
from objectcompose.evaluation.generation import list_pictures, read_manifest, require_pictures
from objectcompose.evaluation.layout_cases import LayoutCase, box_of, file_layouts, jittered_layouts, layouts_digest
from objectcompose.evaluation.layout_metrics import layout_metrics
from objectcompose.evaluation.layout_painting import (
    add_painter_arguments,
    check_painter,
    paint_layouts,
    painter_words,
)
from objectcompose.evaluation.presence import PICTURE_FOLDER, add_painting_arguments, add_step_argument
from objectcompose.evaluation.prompts import check_records
from objectcompose.evaluation.report import write_report
from objectcompose.evaluation.row_log import RowLog, measure_groups
from objectcompose.evaluation.toybox_layouts import LAYOUTS, toybox_layouts
from objectcompose.grounding.grounder import DTYPES
from objectcompose.layout_fields import check_picture
from objectcompose.processes import process_state
from objectcompose.toybox.weights import active_preset


HELP = "Whether objects are in their boxes and look like their reference pictures."
MEASURE_FOLDER = "measures"
PROTOCOL = (
    "AP of the detector's boxes against the layout's, COCO's rules, a layout's categories only; ceiling: in the true"
    " scenes. Cosines of the crop at the layout's box with the reference, both prepared alike; ceiling: in the true"
    " scene; floor: in the scene with other instances of the same categories; leakage: crops of the other boxes;"
    " leakage_outside: the picture with the reference's own box greyed out; true_: these two in the true scene. In per"
    " cent, with 95 % bootstrap intervals over layouts."
)
#: Fields of a measured row. Named in the digest of its log, so that rows with other fields are measured anew.
MEASURED = ("found", "cosines", "outside")


@dataclass(frozen=True, eq=False)
class _View:
    """A picture that is measured: its key among the rows, how to read it, and its layout."""

    key: str
    picture: Path | Image.Image
    case: LayoutCase


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_painting_arguments(parser, rounds=1)
    add_step_argument(parser)
    group = parser.add_argument_group("layout")
    group.add_argument("--layouts", type=Path, metavar="DIR", help="layout files; default: toybox's")
    group.add_argument("--split", choices=tuple(LAYOUTS), default="test", help="of toybox's layouts (%(default)s)")
    group.add_argument("--objects", type=int, metavar="N", help="in each of toybox's layouts; default: 1 to 4 in turn")
    group.add_argument(
        "--box-jitter",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="move edges of boxes by up to this of a side",
    )
    add_painter_arguments(parser)
    group = parser.add_argument_group("scoring")
    group.add_argument("--detector", choices=PRESENCE_DETECTORS, help="default: judge on toybox, else owlv2")
    group.add_argument("--detector-model", metavar="MODEL", help="its folder or Hub id")
    group.add_argument("--clip", default=DEFAULT_CLIP, help="of CLIP-I, not on toybox (%(default)s)")
    group.add_argument("--dino", default=DEFAULT_DINO, help="of the DINO cosine, not on toybox (%(default)s)")


def main(args: argparse.Namespace) -> int:
    """Paint, measure, report; 0, or an error of `ObjectComposeError`'s family."""
    cases = chosen_cases(args)
    state = process_state(args.device)
    place = args.device or str(state.device)
    measures = None
    if args.only != "generate":  # loaded first: what is missing shows before hours of painting
        measures = _Measures(args, cases, place)
    records = [case.record for case in cases]
    folder = args.out / PICTURE_FOLDER
    if args.only == "score":
        require_pictures(list_pictures(records, args.rounds, folder))
        _check_layouts(folder, cases)
    else:
        paint_layouts(args, cases, place, state)
    if measures is None:
        return 0
    pictures = list_pictures(records, args.rounds, folder)
    by_id = {case.record.id: case for case in cases}
    views = [_View(picture.path.stem, picture.path, by_id[picture.record.id]) for picture in pictures]
    for name in ("truth", "rivals"):
        scenes = ((case, getattr(case, name)) for case in cases)
        views += [_View(f"{name} {case.record.id}", scene, case) for case, scene in scenes if scene is not None]
    found = measures.of_views(views, args.out / MEASURE_FOLDER, args.batch_size, state)
    if state.is_main_process:
        rows = []
        for picture in pictures:
            case = by_id[picture.record.id]
            others = {name: found.get(f"{name} {case.record.id}") for name in ("truth", "rivals")}
            rows.append({**_facts(case, picture.round), **found[picture.path.stem], **others})
        details = {"painted_with": read_manifest(folder), "measured_with": measures.identities()}
        write_report(args.out, "layout", layout_metrics(rows), _protocol(args, cases, measures), rows, details)
    return 0


def chosen_cases(args: argparse.Namespace) -> list[LayoutCase]:
    """The layouts that the arguments leave.

    Raises:
        LayoutError, ImageInputError: they cannot be read.
        ObjectComposeError: a number is out of range, or the arguments contradict one another.
    """
    if args.max_prompts is not None and args.max_prompts < 1:
        raise ObjectComposeError(f"`--max-prompts` must be at least 1, got {args.max_prompts}.")
    if args.layouts is None and args.model is not None:
        raise LayoutError("`--layouts` is needed with a `--model`: toybox's layouts are for its own base.")
    if args.layouts is not None and args.objects is not None:
        raise LayoutError("`--objects` must not be given with `--layouts`, which have the objects that they have.")
    if args.layouts is None:
        cases = toybox_layouts(active_preset(), args.split, args.max_prompts, args.objects)
    else:
        cases = file_layouts(args.layouts, args.max_prompts)
    cases = jittered_layouts(cases, args.box_jitter)
    check_records([case.record for case in cases])
    check_painter(args, cases)
    return cases


def _check_layouts(folder: Path, cases: Sequence[LayoutCase]) -> None:
    manifest = read_manifest(folder)
    call = str((manifest or {}).get("settings", {}).get("call"))
    if not call.endswith(layouts_digest(cases)):
        raise CheckpointError(f"`--out` {folder.parent} holds pictures of other layouts than the ones given.")


def _facts(case: LayoutCase, round_number: int) -> dict[str, Any]:
    return {
        "layout": case.record.id,
        "round": round_number,
        "kind": case.record.kind,
        "categories": [item.phrase for item in case.objects],
        "boxes": [list(box_of(item)) for item in case.objects],
    }


def _protocol(args: argparse.Namespace, cases: Sequence[LayoutCase], measures: _Measures) -> str:
    source = f"toybox {args.split}" if args.layouts is None else args.layouts.name
    source += "" if args.objects is None else f", {args.objects} objects each"
    source += f", edges of boxes moved by up to {args.box_jitter:.0%} of a side" if args.box_jitter else ""
    return (
        f"{PROTOCOL} {len(cases)} layouts ({source}), {args.rounds} pictures each, painted by {painter_words(args)};"
        f" detector {measures.detector.name}."
    )


class _Measures:
    """A detector and encoders of crops, with what they said kept on disk."""

    def __init__(self, args: argparse.Namespace, cases: Sequence[LayoutCase], place: str) -> None:
        is_toybox = args.layouts is None
        name = args.detector or ("judge" if is_toybox else "owlv2")
        dtype = DTYPES[args.dtype]
        self.detector: PresenceDetector = load_presence(name, args.detector_model, device=place, dtype=dtype)
        self.detector.check_categories(sorted({category for case in cases for category in case.record.categories}))
        self.encoders: list[CropEncoder] = (
            toybox_encoders(place) if is_toybox else public_encoders(args.clip, args.dino, place)
        )

    def identities(self) -> dict[str, str]:
        """What was measured with: equal identities give equal rows."""
        return {"detector": self.detector.identity(), **{one.name: one.identity for one in self.encoders}}

    def of_views(
        self, views: Sequence[_View], folder: Path, batch_size: int, state: PartialState
    ) -> dict[str, dict[str, Any]]:
        """The fields `MEASURED` of each view by its key, in every process; each measures its share."""
        digest = sha256(repr([*sorted(self.identities().items()), MEASURED]).encode()).hexdigest()[:16]

        def measure(group: Sequence[_View], log: RowLog) -> list[tuple[str, dict[str, Any]]]:
            return [(view.key, self._row(view, log)) for view in group]

        place = folder / f"{self.detector.name}-{digest}"
        return dict(measure_groups(views, measure, place, batch_size, state, label="measure"))

    def _row(self, view: _View, log: RowLog) -> dict[str, Any]:
        """One view, from the log if its picture and layout are the same."""
        picture = view.picture
        if isinstance(picture, Path):
            picture = check_picture(picture, str(picture))
        picture = picture.convert("RGB")
        content = sha256(repr(picture.size).encode() + picture.tobytes() + layouts_digest([view.case]).encode())
        key = f"{view.key} {content.hexdigest()[:32]}"
        if key not in log.rows:
            log.add(key, self._measure(picture, view.case))
        return log.rows[key]

    def _measure(self, picture: Image.Image, case: LayoutCase) -> dict[str, Any]:
        [found] = self.detector.find([picture], [list(case.record.categories)])
        boxes, references = [box_of(item) for item in case.objects], [item.image for item in case.objects]
        seen = {one.name: one.inside_and_outside(picture, boxes, references) for one in self.encoders}
        return {
            "found": [{"category": one.category, "score": float(one.score), "box": list(one.box)} for one in found],
            "cosines": {name: inside.tolist() for name, (inside, _) in seen.items()},
            "outside": {name: outside.tolist() for name, (_, outside) in seen.items()},
        }
