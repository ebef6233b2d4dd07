"""What toybox can do, measured into `benchmarks/results/toybox.json`, and a sheet of pictures to look at.

    python -m benchmarks.toybox                    # about 6 minutes on 2 cores with the CPU preset
    python -m benchmarks.toybox --device cuda --images 256

The definitions stand in `objectcompose.evaluation.toybox_figures`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from objectcompose.evaluation.results import write_result
from objectcompose.evaluation.toybox_figures import (
    BATCH,
    PROMPT_SEED,
    PROTOCOL,
    Row,
    base_prompts,
    base_rows,
    identity_rows,
    judge_scene_rows,
    load_base,
    metrics_of_rows,
    timing_rows,
    vae_rows,
)
from objectcompose.examples.gallery import GalleryRow, save_gallery
from objectcompose.toybox.judge import Judge
from objectcompose.toybox.weights import toybox_card, toybox_path, toybox_root


SHEET_COLUMNS, SHEET_LINES = 8, 2  # per number of named objects
TITLES = {1: "One object", 2: "Two objects", 5: "Five objects"}


def save_sheet(pictures: Sequence[tuple[Row, Image.Image]], path: Path) -> Path:
    """Two lines of eight pictures for each number of named objects; under each what was named and what was found."""
    lines = []
    for objects, title in TITLES.items():
        shown = [pair for pair in pictures if pair[0]["objects"] == objects][: SHEET_COLUMNS * SHEET_LINES]
        for start in range(0, len(shown), SHEET_COLUMNS):
            part = shown[start : start + SHEET_COLUMNS]
            captions = [f"{', '.join(row['named'])} ({len(row['found'])} found)" for row, _ in part]
            lines.append(GalleryRow(title, [image for _, image in part], captions))
    card = toybox_card()
    return save_gallery(lines, path, headline=f"{card['version']}, {card['preset']} preset: samples of the base")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the result file and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48, help="prompts of each kind: one, two and five objects")
    parser.add_argument("--scenes", type=int, default=256, help="held-out scenes for judge and autoencoder")
    parser.add_argument("--trials", type=int, default=64, help="look-alike trials")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of all models")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="where the result goes")
    args = parser.parse_args(argv)
    judge, base = Judge.load(args.device), load_base(args.device)
    preset, pictures = judge.preset, list[tuple[Row, Image.Image]]()
    rows = judge_scene_rows(judge, range(args.scenes))
    rows += identity_rows(judge, range(args.trials))
    rows += vae_rows(base.vae, preset, range(args.scenes))
    rows += timing_rows(base, preset)
    rows += base_rows(base, judge, base_prompts(preset, args.images), lambda row, image: pictures.append((row, image)))
    weights = {name: toybox_path(name) for name in ("base", "judge")}
    size = sum(path.stat().st_size for path in toybox_root().rglob("*") if path.is_file())
    stated = {"preset_gpu": int(preset.name == "gpu"), "checkpoint_mib": size / 2**20}
    metrics = {**metrics_of_rows(rows), **stated}
    command = "python -m benchmarks.toybox"
    for name in ("images", "scenes", "trials"):
        if getattr(args, name) != parser.get_default(name):
            command += f" --{name} {getattr(args, name)}"
    write_result(
        "toybox",
        metrics,
        rows,
        command=command,
        seeds=[PROMPT_SEED],
        protocol=f"{PROTOCOL} Pictures painted {BATCH} at a time.",
        recompute="objectcompose.evaluation.toybox_figures:metrics_of_rows",
        regenerate="objectcompose.evaluation.toybox_figures:regenerate_rows",
        weights=weights,
        stated=tuple(stated),
        timing_fields=("seconds",),
        folder=args.folder,
    )
    print(save_sheet(pictures, args.folder / "toybox_sheet.png"))
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
