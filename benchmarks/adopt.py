"""Makes the weights that a recipe measured those that the repository carries, with the figures on their card.

    python -m benchmarks.adopt tokencompose outputs/reproduce/tokencompose-cpu
    python -m benchmarks.adopt locref outputs/reproduce/locref-cpu
    python -m benchmarks.adopt object_prompt outputs/reproduce/object-prompt-cpu

The folder is the recipe's; the weights are taken only if their hash is the one that the result file holds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recipes.common import model_file
from objectcompose.adapters.model_card import ModelCardFacts, figures_from_result, write_model_card
from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.results import RESULTS_FOLDER, hash_weights
from objectcompose.files import write_atomically
from objectcompose.toybox.weights import toybox_path


@dataclass(frozen=True)
class Adopted:
    """What the repository carries of one method.

    Attributes:
        arm: of the recipe.
        figures: of its result file, for the card.
    """

    arm: str
    figures: tuple[str, ...]


ADOPTED = {
    "tokencompose": Adopted(
        "tokencompose",
        ("mg2.tokencompose", "mg3.tokencompose", "mg3.ldm", "mg3_diff.tokencompose_ldm", "map_iou.tokencompose",
         "map_iou.base", "fd_judge_ratio.tokencompose_ldm"),
    ),
    "locref": Adopted(
        "full",
        ("ap50.full", "ap50.text", "ap50.ceiling", "identity_way_seen.full", "identity_way.full", "leakage.full",
         "shift.full"),
    ),
    "object_prompt": Adopted(
        "mixed",
        ("identity.mixed", "diversity.mixed", "category.mixed", "identity.unguided", "identity.guided",
         "matching_accuracy.distinct"),
    ),
}  # fmt: skip
DATA_LICENSE = "scenes: see toybox/pictures/LICENSES.md"


def measured_hash(name: str) -> str:
    """Hash of the weights that the result file of a method speaks of.

    Raises:
        ObjectComposeError: there is no such file.
    """
    return _result(name)["weights"][ADOPTED[name].arm]


def adopt(name: str, run: Path) -> Path:
    """Copy the weights and their configuration, and write their card.

    Args:
        name: one of `ADOPTED`.
        run: folder of the recipe.

    Returns:
        The folder in the repository.

    Raises:
        ObjectComposeError: nothing was measured, or other weights were.
    """
    source, target = run / ADOPTED[name].arm / "weights", toybox_path(name)
    weights = model_file(source)
    if hash_weights(weights) != measured_hash(name):
        raise ObjectComposeError(f"{weights} is not what {RESULTS_FOLDER}/{name}_toybox.json was measured with.")
    config = source / "config.json"
    for file in (weights, *([config] if config.is_file() else [])):
        write_atomically(target / file.name, file.read_bytes())
    write_model_card(target, card_facts(name, (source / "README.md").read_text(encoding="utf-8")))
    return target


def card_facts(name: str, card: str) -> ModelCardFacts:
    """The trainer's card with the licences of toybox, and the figures.

    Args:
        name: one of `ADOPTED`.
        card: text of the trainer's.
    """
    title, summary = re.findall(r"^# (.+)\n\n(.+)$", card, re.MULTILINE)[0]
    result = _result(name)
    return ModelCardFacts(
        title=title,
        summary=summary,
        base_model="toybox-1",
        base_license="Apache-2.0",
        code_license="Apache-2.0",
        weights_license="apache-2.0",
        data=re.findall(r"^- Data: (.+) \(licence:", card, re.MULTILINE)[0],
        data_license=DATA_LICENSE,
        command=re.findall(r"```\n(.+)\n```", card)[0],
        commit=re.findall(r"^at commit (.+)\.$", card, re.MULTILINE)[0],
        figures=figures_from_result(result, ADOPTED[name].figures),
    )


def _result(name: str) -> dict[str, Any]:
    path = RESULTS_FOLDER / f"{name}_toybox.json"
    if not path.is_file():
        raise ObjectComposeError(f"{path} is not there: nothing was measured yet.")
    return json.loads(path.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Adopt a recipe's weights; exit code 1 where that is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(ADOPTED), help="of the weights")
    parser.add_argument("run", type=Path, help="folder of the recipe")
    args = parser.parse_args(argv)
    try:
        print(adopt(args.name, args.run))
    except ObjectComposeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
