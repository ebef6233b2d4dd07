"""`objectcompose ground`: from pictures and phrases to boxes, masks and layouts.

    objectcompose ground scene.png "a dog" "a car" --out outputs/ground
    objectcompose ground photos "a dog" --backend grounding-dino --segmenter sam --out outputs/photos
    accelerate launch -m objectcompose ground photos "a dog" --backend owlv2 --segmenter sam2 --out outputs/photos
    objectcompose ground photo.jpg --segmenter sam --out outputs/parts          # no phrases: all parts

Without `--backend` and `--model` the small CLIPSeg that comes with the repository looks at the picture; it knows the
drawings of toybox only. A folder of pictures is done again only where something changed, and by as many processes as
`accelerate launch` starts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from objectcompose.errors import ImageInputError, ObjectComposeError
from objectcompose.files import write_atomically
from objectcompose.grounding.cache import GroundingCache, result_key
from objectcompose.grounding.detection import check_prompt_holds
from objectcompose.grounding.grounder import DETECTORS, DTYPES, SEGMENTERS, Grounder, load_grounder
from objectcompose.grounding.inputs import check_ground_phrases, check_ground_picture
from objectcompose.grounding.outputs import finished_report, write_grounding
from objectcompose.processes import process_state
from objectcompose.toybox.weights import toybox_path


HELP = "Find what phrases name in a picture, or in a folder of pictures: boxes, masks and a layout."
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
INDEX_FILE = "index.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("picture", type=Path, help="a picture, or a folder of pictures (searched through)")
    parser.add_argument("phrases", nargs="*", metavar="PHRASE", help='such as "a dog"; none: all parts of the picture')
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--prompt", help="of the layout; must contain the phrases; default: lists them")
    add_model_arguments(parser)
    run = add_run_arguments(parser)
    run.add_argument(
        "--on-missing",
        choices=("error", "skip"),
        help="when a phrase has no hit; default: error for one picture, skip for a folder",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which detector and segmenter look; `load_models` reads these arguments."""
    models = parser.add_argument_group("models")
    models.add_argument("--backend", choices=sorted(DETECTORS), help="detector; default: clipseg, with phrases")
    models.add_argument(
        "--model", help="its folder, checkpoint or Hub id; default without --backend: toybox's CLIPSeg"
    )
    models.add_argument("--segmenter", choices=sorted(SEGMENTERS), help="makes masks from boxes; default: none")
    models.add_argument("--segmenter-model", metavar="MODEL", help="its folder, checkpoint or Hub id")
    models.add_argument("--threshold", type=float, help="of the detector, in [0, 1]; default: the detector's own")
    for name, example in (("option", "text_threshold=0.3"), ("segmenter-option", "points_per_side=16")):
        models.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"further option of its loader, such as {example}; may be repeated",
        )


def add_run_arguments(parser: argparse.ArgumentParser) -> Any:
    """Declare how the models run and where results are kept; returns the group, for a command's own."""
    run = parser.add_argument_group("run")
    run.add_argument("--device", help="such as cpu or cuda; default: the process's accelerator, if there is one")
    run.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="of transformers' models (%(default)s)"
    )
    run.add_argument("--batch-size", type=int, default=8, help="pictures at once (%(default)s)")
    run.add_argument("--cache", type=Path, metavar="DIR", help="folder of earlier results; default: the user's cache")
    run.add_argument("--no-cache", action="store_true", help="neither read nor write earlier results")
    return run


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; 1 when pictures of a folder could not be read (the others are done). Other unusable input raises.

    Raises:
        ObjectComposeError: bad arguments, picture, phrase or checkpoint.
    """
    phrases = check_ground_phrases(args.phrases) if args.phrases else ()
    if args.prompt is not None:
        check_prompt_holds(args.prompt, phrases)
    check_run_arguments(args)
    if not args.picture.is_dir():
        picture = check_ground_picture(str(args.picture), "picture")
        grounder = load_models(args, args.device, bool(phrases))
        report = ground_to_folder(grounder, picture, phrases, args.out, args.prompt, args.on_missing or "error")
        print(f"{len(report['detections'])} found: {args.out}")
        return 0
    pictures = find_pictures(args.picture, args.out)
    if not pictures:
        raise ImageInputError(f"`picture` must hold files of type {', '.join(PICTURE_SUFFIXES)}, got {args.picture}.")
    state = process_state(args.device)
    grounder = load_models(args, args.device or str(state.device), bool(phrases))
    return _ground_pictures(grounder, args, phrases, pictures, state)


def ground_to_folder(
    grounder: Grounder,
    picture: Image.Image,
    phrases: Sequence[str],
    out: Path,
    prompt: str | None = None,
    on_missing: str = "error",
) -> dict[str, Any]:
    """Ground one picture and write everything about it; without phrases, segment it.

    Returns:
        What `detections.json` says (see `objectcompose.grounding.outputs`).
    """
    return _ground_batch_to_folders(grounder, [picture], phrases, [out], prompt, on_missing)[0]


def find_pictures(folder: Path, out: Path) -> list[Path]:
    """Files with a picture's suffix under a folder, sorted by name; hidden ones and those under `out` are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts)
        if path.suffix.lower() in PICTURE_SUFFIXES and not is_hidden and path.is_file():
            if not path.resolve().is_relative_to(out.resolve()):
                found.append(path)
    return found


def _ground_pictures(
    grounder: Grounder, args: argparse.Namespace, phrases: Sequence[str], pictures: list[Path], state: PartialState
) -> int:
    """This process's share of a folder, then the index of all."""
    names = [path.relative_to(args.picture).as_posix() for path in pictures]
    rows: list[dict[str, Any]] = []
    with state.split_between_processes(names) as mine:
        progress = tqdm(total=len(mine), desc="ground", unit="picture", disable=not state.is_local_main_process)
        for start in range(0, len(mine), args.batch_size):
            part = mine[start : start + args.batch_size]
            rows += _ground_part(grounder, args, phrases, part)
            progress.update(len(part))
        progress.close()
    rows = sorted(gather_object(rows), key=lambda row: row["picture"])
    failed = [row for row in rows if "error" in row]
    if state.is_main_process:
        for row in failed:
            print(f"{row['picture']}: {row['error']}")
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / INDEX_FILE, (json.dumps({"pictures": rows}, indent=2) + "\n").encode())
        print(f"{len(rows) - len(failed)} of {len(rows)} pictures done: {args.out}")
    return 1 if failed else 0


def _ground_part(
    grounder: Grounder, args: argparse.Namespace, phrases: Sequence[str], names: Sequence[str]
) -> list[dict[str, Any]]:
    """One row of the index per picture; a picture that cannot be read is a row with its error."""
    rows: list[dict[str, Any]] = []
    readable: list[tuple[str, Image.Image]] = []
    for name in names:
        try:
            readable.append((name, check_ground_picture(str(args.picture / name), name)))
        except ImageInputError as error:
            rows.append({"picture": name, "error": str(error)})
    folders = [args.out / name for name, _ in readable]
    reports = _ground_batch_to_folders(
        grounder, [one for _, one in readable], phrases, folders, args.prompt, args.on_missing or "skip"
    )
    for (name, _), report in zip(readable, reports, strict=True):
        rows.append({"picture": name, "found": len(report["detections"]), "missing": report["missing"]})
    return rows


def _ground_batch_to_folders(
    grounder: Grounder,
    pictures: Sequence[Image.Image],
    phrases: Sequence[str],
    folders: Sequence[Path],
    prompt: str | None,
    on_missing: Any,
) -> list[dict[str, Any]]:
    keys = [result_key(picture, phrases or None, grounder.identity()) for picture in pictures]
    reports = [finished_report(folder, key, prompt) for folder, key in zip(folders, keys, strict=True)]
    if on_missing == "error":  # what an earlier run left out is an error now, which `ground_batch` words
        reports = [None if report is not None and report["missing"] else report for report in reports]
    waiting = [index for index, report in enumerate(reports) if report is None]
    some = [pictures[index] for index in waiting]
    if phrases:
        found = grounder.ground_batch(some, [phrases] * len(some), on_missing)
    else:
        found = grounder.segment_batch(some)
    for index, detections in zip(waiting, found, strict=True):
        reports[index] = write_grounding(folders[index], pictures[index], detections, phrases, keys[index], prompt)
    return [report for report in reports if report is not None]


def check_run_arguments(args: argparse.Namespace) -> None:
    """Raise ObjectComposeError for a batch size below 1, or an output folder that cannot be made (it is not made)."""
    if args.batch_size < 1:
        raise ObjectComposeError(f"`--batch-size` must be at least 1, got {args.batch_size}.")
    out: Path = args.out
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ObjectComposeError(f"`--out` must be a folder that can be written, got {str(out)!r}.")


def load_models(args: argparse.Namespace, device: str | None, with_phrases: bool) -> Grounder:
    """The models that the arguments name; with phrases, and without `--backend`, toybox's CLIPSeg.

    Raises:
        ObjectComposeError: see `load_grounder`; or an option is not of the form NAME=VALUE.
    """
    backend, model = args.backend, args.model
    if backend is None and (with_phrases or model is not None):
        backend = "clipseg"
        model = model or str(toybox_path("clipseg"))
    options = _parsed_options(args.option, "--option")
    if args.threshold is not None:
        options["threshold"] = args.threshold
    return load_grounder(
        backend,
        model,
        args.segmenter,
        args.segmenter_model,
        device=device,
        dtype=DTYPES[args.dtype],
        cache=False if args.no_cache else GroundingCache(args.cache),
        batch_size=args.batch_size,
        detector_options=options,
        segmenter_options=_parsed_options(args.segmenter_option, "--segmenter-option"),
    )


def _parsed_options(given: Sequence[str], flag: str) -> dict[str, Any]:
    """NAME=VALUE pairs; a value that is a JSON number is one, anything else is text."""
    options: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ObjectComposeError(f"`{flag}` must have the form NAME=VALUE, got {pair!r}.")
        try:
            number = json.loads(value)
        except ValueError:
            number = value
        options[name] = number if isinstance(number, (int, float)) and not isinstance(number, bool) else value
    return options
