"""`objectcompose evaluate fd`: Frechet distance between features of painted and of real pictures.

    objectcompose evaluate fd --scenes 500 --out outputs/fd                     # toybox: its own held-out scenes
    objectcompose evaluate fd --model stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda \\
        --prompts captions.txt --real val2014 --out outputs/fid \\
        --features inception --inception-weights weights-inception-2015-12-05-6726825d.pth

With toybox's judge the distance is called `fd_judge`: its features are of another size and meaning than those of the
Inception network, whose distance alone is called `fid`. A distance falls with the number of pictures: compare at equal
numbers only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from objectcompose.errors import NonFiniteError, ObjectComposeError
from objectcompose.evaluation.frechet_features import (
    FEATURES,
    PictureFeatures,
    PictureSource,
    file_source,
    find_picture_files,
    load_features,
    scene_source,
    source_features,
)
from objectcompose.evaluation.generation import read_manifest
from objectcompose.evaluation.presence import (
    PICTURE_FOLDER,
    add_painting_arguments,
    add_step_argument,
    chosen_records,
    paint_for,
)
from objectcompose.evaluation.prompts import PromptRecord, read_prompt_lines
from objectcompose.evaluation.report import write_report
from objectcompose.files import write_atomically
from objectcompose.processes import process_state


HELP = "Frechet distance between features of painted and of real pictures."
DEFAULT_SCENES = 500
FEATURE_FILE = "features.safetensors"
JACKKNIFE_BLOCKS = 20
_NORMAL_95 = 1.959964


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--scenes",
        type=int,
        metavar="N",
        help=f"real are toybox's first N held-out scenes; default: {DEFAULT_SCENES}",
    )
    parser.add_argument("--real", type=Path, metavar="DIR", help="real pictures, cropped to the painted ones' size")
    parser.add_argument("--prompts", type=Path, metavar="FILE.txt", help="with --real: what to paint, one per line")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="compare these; nothing is painted")
    parser.add_argument("--features", choices=FEATURES, default="judge", help="(%(default)s)")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="of torch-fidelity, a .pth file")
    add_step_argument(parser)
    add_painting_arguments(parser, rounds=1)


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; input that cannot be used raises.

    Raises:
        ObjectComposeError: contradicting or missing arguments, or too few pictures.
        CheckpointError: weights of the model or of the features are missing.
    """
    _check_arguments(args)
    state = process_state(args.device)
    device = args.device or str(state.device)
    features = None if args.only == "generate" else load_features(args.features, args.inception_weights, device)
    scenes = scene_source(args.scenes or DEFAULT_SCENES) if args.real is None else None
    painted = _painted_source(args, scenes)
    if features is None:
        if state.is_main_process:
            print(f"{len(painted)} pictures: {args.out / PICTURE_FOLDER}")
        return 0
    real = scenes or file_source(find_picture_files(args.real), painted.size)
    found = [source_features(features, source, args.batch_size, state) for source in (painted, real)]
    if state.is_main_process:
        _report(args, features, painted, real, found)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.scenes is not None and args.scenes < 2:
        raise ObjectComposeError(f"`--scenes` must be at least 2, got {args.scenes}.")
    if args.real is None and args.prompts is not None:
        raise ObjectComposeError("`--prompts` needs `--real`: scenes of toybox have captions of their own.")
    if args.real is not None and args.scenes is not None:
        raise ObjectComposeError("`--real` and `--scenes` must not both be given.")
    if args.real is not None and (args.prompts is None) == (args.pictures is None):
        raise ObjectComposeError("`--real` needs either `--prompts` to paint or `--pictures` that are painted.")
    if args.pictures is not None and args.only is not None:
        raise ObjectComposeError("`--only` and `--pictures` must not both be given: `--pictures` are only scored.")
    for folder in (args.real, args.pictures):
        if folder is not None:
            find_picture_files(folder)


def _painted_source(args: argparse.Namespace, scenes: PictureSource | None) -> PictureSource:
    if args.pictures is not None:
        return file_source(find_picture_files(args.pictures))
    if scenes is None:
        records = read_prompt_lines(args.prompts)
    else:
        records = [PromptRecord(f"scene-{number:05d}", text) for number, text in enumerate(scenes.captions)]
    pictures = paint_for(args, chosen_records(records, args), are_painted=args.only == "score")
    return file_source([picture.path for picture in pictures])


def _report(
    args: argparse.Namespace,
    features: PictureFeatures,
    painted: PictureSource,
    real: PictureSource,
    found: Sequence[np.ndarray],
) -> None:
    metrics = frechet_metrics(features.metric, *found)
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {name: one.astype(np.float32) for name, one in zip(("painted", "real"), found, strict=True)}
    write_atomically(args.out / FEATURE_FILE, save(tensors))
    where = "toybox's held-out scenes" if args.real is None else "a folder of pictures, cropped in the middle"
    write_report(
        args.out,
        "fd",
        metrics,
        f"Frechet distance of Gaussians fitted to {found[0].shape[1]} features ({args.features}) of"
        f" {len(painted)} painted and {len(real)} real pictures ({where}). Bounds: 95 %, delete-a-block jackknife with"
        f" {JACKKNIFE_BLOCKS} blocks; the bias of a finite number of pictures is not in them.",
        [{"set": "painted", "pictures": len(painted)}, {"set": "real", "pictures": len(real)}],
        {
            "painted_with": read_manifest(args.pictures or args.out / PICTURE_FOLDER),
            "features": features.identity,
        },
    )


def gaussian_of(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D) in float64.

    Raises:
        ObjectComposeError: fewer than two rows.
        NonFiniteError: NaN or infinite values.
    """
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ObjectComposeError(f"`features` must be (N, D) with N at least 2, got shape {values.shape}.")
    if not np.isfinite(values).all():
        raise NonFiniteError("`features` must be finite, got NaN or infinite values.")
    return values.mean(0), np.atleast_2d(np.cov(values, rowvar=False))


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """Squared Frechet distance of two Gaussians: `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson, Landau).

    The trace of the root is that of `(C1^(1/2) C2 C1^(1/2))^(1/2)`, which is symmetric: its eigenvalues are real and
    at least 0, so singular covariances need no special case.

    Args:
        mean_1, mean_2: (D,).
        covariance_1, covariance_2: (D, D), symmetric, positive semidefinite.

    Returns:
        At least 0.
    """
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root @ covariance_2 @ root
    overlap = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    difference = mean_1 - mean_2
    distance = difference @ difference + np.trace(covariance_1) + np.trace(covariance_2) - 2 * overlap
    return max(float(distance), 0.0)


def frechet_metrics(name: str, painted: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """The distance of two sets of features, with bounds where both have two pictures or more for each block.

    The bounds are those of a jackknife that leaves out every 20th picture of both sets together: bootstrapped sets
    repeat pictures, which moves a distance up by more than its spread.

    Args:
        name: of the metric.
        painted: (N, D).
        real: (M, D).
    """
    return jackknife_metrics(name, *jackknifed_distance(painted, real))


def jackknifed_distance(painted: np.ndarray, real: np.ndarray) -> tuple[float, list[float]]:
    """The distance, and the distances without each block of pictures: none where a set has too few for that.

    Args:
        painted: (N, D).
        real: (M, D).
    """
    value = frechet_distance(*gaussian_of(painted), *gaussian_of(real))
    if min(len(painted), len(real)) < 2 * JACKKNIFE_BLOCKS:
        return value, []
    return value, [_without_block(block, painted, real) for block in range(JACKKNIFE_BLOCKS)]


def jackknife_metrics(name: str, value: float, left_out: Sequence[float]) -> dict[str, float]:
    """A figure above 0 with its bounds, where it was taken without each block, too.

    Args:
        name: of the metric.
        value: of all pictures.
        left_out: without each block; empty: no bounds.
    """
    if not left_out:
        return {name: value}
    spread = (len(left_out) - 1) * float(np.var(left_out))  # (g - 1) / g times the sum of squares
    reach = _NORMAL_95 * spread**0.5
    return {name: value, f"{name}.lo": max(value - reach, 0.0), f"{name}.hi": value + reach}


def _without_block(block: int, *sets: np.ndarray) -> float:
    kept: Sequence[Any] = [one[np.arange(len(one)) % JACKKNIFE_BLOCKS != block] for one in sets]
    return frechet_distance(*gaussian_of(kept[0]), *gaussian_of(kept[1]))
