"""`objectcompose evaluate map-iou`: attention maps of nouns against their objects' true masks.

    objectcompose evaluate map-iou --out outputs/map-iou                        # toybox: its own held-out scenes
    objectcompose evaluate map-iou --model stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda \\
        --data my_captions --out outputs/map-iou-sd

The threshold that turns a map into a mask is chosen on a dev split and used on a test split. What is measured and how
it differs from the paper: `objectcompose.evaluation.attention_iou`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.attention_iou import (
    THRESHOLDS,
    AttentionMaps,
    best_threshold,
    map_metrics,
    map_scores,
)
from objectcompose.evaluation.models import add_model_arguments, load_evaluated
from objectcompose.evaluation.pipeline_identity import pipeline_identity
from objectcompose.evaluation.report import write_report
from objectcompose.evaluation.row_log import RowLog, measure_groups
from objectcompose.processes import process_state
from objectcompose.toybox.weights import active_preset
from objectcompose.training.grounded_captions import CaptionDataset, GroundedCaptions, ToyboxCaptions, read_records
from objectcompose.training.runs import picture_side
from objectcompose.training.token_compose_losses import SUPERVISED_LAYERS


HELP = "IoU of nouns' attention maps with true masks, on noised held-out pictures."
TIMESTEPS = (200, 400, 600)
#: Every third sample of a data set is for the threshold.
DEV_EVERY = 3

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of rows and report")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="grounded captions; every third is the dev split; default: toybox"
    )
    parser.add_argument("--resolution", type=int, help="with --data: side in pixels; default: the model's own")
    parser.add_argument("--scenes", type=int, default=200, help="of the test split (%(default)s)")
    parser.add_argument("--dev-scenes", type=int, default=100, help="of the dev split (%(default)s)")
    parser.add_argument(
        "--timesteps", type=int, nargs="+", default=list(TIMESTEPS), metavar="T", help="of the noise (200 400 600)"
    )
    parser.add_argument("--layers", default=SUPERVISED_LAYERS, help="cross-attention layers, a regex (%(default)s)")
    parser.add_argument(
        "--threshold", type=float, help="one of 0.05, 0.1, ..., 0.95; default: chosen on the dev split"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at once (%(default)s)")
    add_model_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; input that cannot be used raises.

    Raises:
        ObjectComposeError: a number is out of range, or nothing to measure.
        LayerNotFoundError, LayoutError, ImageInputError, CheckpointError: layers, data or model cannot be used.
    """
    if args.threshold is not None and args.threshold not in THRESHOLDS:
        raise ObjectComposeError(f"`--threshold` must be one of 0.05, 0.1, ..., 0.95, got {args.threshold}.")
    for name in ("scenes", "dev_scenes"):
        if getattr(args, name) < 1:
            raise ObjectComposeError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(args, name)}.")
    if args.data is None and args.resolution is not None:
        raise ObjectComposeError("`--resolution` needs `--data`: scenes of toybox have one size.")
    state = process_state(args.device)
    records = None if args.data is None else read_records(args.data)
    pipeline = load_evaluated(args, args.device or str(state.device))
    attention = AttentionMaps(pipeline, args.layers)
    for timestep in args.timesteps:
        attention.check_timestep(timestep)
    resolution = picture_side(pipeline, args.resolution)
    dataset = None if records is None else GroundedCaptions(records, resolution)
    rows: list[Row] = []
    for split in ("test",) if args.threshold is not None else ("dev", "test"):
        split_data, numbers = _split(args, dataset, split, state)
        rows += measure_maps(attention, split_data, numbers, split, args.timesteps, args.out, args.batch_size, state)
    if state.is_main_process:
        _report(args, attention, rows)
    return 0


def _split(
    args: argparse.Namespace, dataset: CaptionDataset | None, split: str, state: PartialState
) -> tuple[CaptionDataset, list[int]]:
    """A split's data and the numbers of its samples."""
    count = args.scenes if split == "test" else args.dev_scenes
    if dataset is None:
        with state.main_process_first():  # who renders first fills the cache
            scenes = ToyboxCaptions(active_preset(), count, args.out / "scenes", split)
        return scenes, list(range(count))
    numbers = [number for number in range(len(dataset)) if (number % DEV_EVERY == 0) == (split == "dev")]
    if not numbers:
        raise ObjectComposeError(f"`--data` must have samples for the {split} split, got {len(dataset)} in all.")
    return dataset, numbers[:count]


def measure_maps(
    attention: AttentionMaps,
    dataset: CaptionDataset,
    numbers: Sequence[int],
    split: str,
    timesteps: Sequence[int],
    out: Path,
    batch_size: int,
    state: PartialState,
) -> list[Row]:
    """Scores of all nouns of some samples, this process measuring its share; what was measured before is read.

    Args:
        attention: of the model.
        dataset: grounded captions.
        numbers: of the samples.
        split: "dev" or "test".
        timesteps: of the noise.
        out: folder whose `maps` keeps the rows.
        batch_size: pictures at once.
        state: the processes.

    Returns:
        In every process, one row per sample, noun and timestep: `split`, `sample`, `phrase`, `t`, and the entries of
        `map_scores`.
    """
    asked = json.dumps([pipeline_identity(attention.pipeline), attention.layers])
    place = out / "maps" / hashlib.sha256(asked.encode()).hexdigest()[:16]

    def measure(group: Sequence[int], log: RowLog) -> list[Row]:
        return [row for t in timesteps for row in _measure_group(attention, dataset, group, split, t, log)]

    rows = measure_groups(numbers, measure, place, batch_size, state, f"maps ({split})")
    return sorted(rows, key=lambda row: (row["sample"], row["t"], row["phrase"]))


def _measure_group(
    attention: AttentionMaps, dataset: CaptionDataset, group: Sequence[int], split: str, timestep: int, log: RowLog
) -> list[Row]:
    keys = {number: f"{split} {number} {timestep} {dataset.key(number)[:32]}" for number in group}
    waiting = [number for number in group if keys[number] not in log.rows]
    if waiting:
        captions = attention.masked_captions(dataset, waiting, split)
        measured = [one for one in captions if one.tokens]
        maps = attention.maps(measured, timestep) if measured else []
        scores = {one.name: map_scores(found, one.sample.masks) for one, found in zip(measured, maps, strict=True)}
        for number, one in zip(waiting, captions, strict=True):
            entries = zip(one.sample.phrases, scores.get(one.name, []), strict=True)
            log.add(keys[number], {"nouns": [{"phrase": phrase, **score} for phrase, score in entries]})
    return [
        {"split": split, "sample": number, "t": timestep, **noun}
        for number in group
        for noun in log.rows[keys[number]]["nouns"]
    ]


def _report(args: argparse.Namespace, attention: AttentionMaps, rows: Sequence[Row]) -> None:
    dev, test = ([row for row in rows if row["split"] == split] for split in ("dev", "test"))
    threshold = best_threshold(dev) if args.threshold is None else args.threshold
    chosen = "given" if args.threshold is not None else f"the best of {len(THRESHOLDS)} on {len(dev)} maps (dev split)"
    where = "toybox scenes" if args.data is None else "grounded captions"
    write_report(
        args.out,
        "map-iou",
        map_metrics(test, threshold),
        f"Attention maps of nouns on noised {where} of the test split against visible masks: conditional half, mean"
        f" over heads and {len(attention.layers)} layers, bicubic, stretched to [0, 1], threshold {threshold:g}"
        f" ({chosen}), at t = {', '.join(map(str, args.timesteps))}. Mean over maps with 95 % bootstrap intervals over"
        " pictures; map_inside is the share of a map's mass in the mask.",
        rows,
        {"model": pipeline_identity(attention.pipeline), "layers": attention.layers},
    )
