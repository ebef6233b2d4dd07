"""Makes the weights that a recipe measured those that the repository carries, with the figures on their card.

    python -m benchmarks.adopt tokencompose outputs/reproduce/tokencompose-cpu
    python -m benchmarks.adopt locref outputs/reproduce/locref-cpu
    python -m benchmarks.adopt object_prompt examples/toybox   # only the card: the recipe measures these very weights
    python -m benchmarks.adopt mifo outputs/reproduce/mifo-cpu

The folder is the recipe's; weights are taken only if the result file holds their hash.
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

from objectcompose.adapters.model_card import ModelCardFacts, figures_from_result, write_model_card
from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.results import RESULTS_FOLDER, hash_weights
from objectcompose.files import write_atomically
from objectcompose.toybox.weights import toybox_path


@dataclass(frozen=True)
class Adopted:
    """What the repository carries of one method.

    Attributes:
        arm: folder of the run that is taken from.
        figures: of its result file, for the card.
        parts: folders of the arm, and where in the repository's folder their files go.
        pictures: folder of the run with the pictures that go along.
        usage: what the card's summary says besides the trainer's.
    """

    arm: str
    figures: tuple[str, ...]
    parts: tuple[tuple[str, str], ...] = (("weights", "."),)
    pictures: str = ""
    usage: str = ""


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
        "object_prompt",
        ("identity.unguided", "identity.text", "identity_diff.unguided_text", "identity.guided", "category.unguided",
         "matching_accuracy.distinct"),
        parts=((".", "."),),
    ),
    "mifo": Adopted(
        "test-alike-5/reward_penalty_prior",
        ("identity.reward_penalty_prior.alike", "identity.reward_prior.alike",
         "identity_diff.reward_penalty_reward_prior.alike", "identity_mixed_up.reward_penalty_prior.alike",
         "shown.reward_penalty_prior.alike", "leakage.reward_penalty_prior.alike"),
        parts=(("embeddings", "embeddings"), ("weights", "weights")),
        pictures="test-alike-5/data",
        usage="They are two look-alikes of `img.png`, under `mask0.png` and `mask1.png`. `embeddings` is for"
              " `load_textual_inversion`, `weights` for `load_lora_weights`;"
              " `objectcompose.pipelines.learned_instances.load_instances` loads both. Of the eight scenes of"
              " look-alikes this one was chosen for its looks; the figures are of all eight.",
    ),
}  # fmt: skip
DATA_LICENSE = "scenes: see toybox/pictures/LICENSES.md"


def measured_hashes(name: str) -> set[str]:
    """Hashes of the trained weights that the result file of a method speaks of.

    Raises:
        ObjectComposeError: there is no such file.
    """
    return {digest for weights, digest in _result(name)["weights"].items() if weights != "base"}


def adopt(name: str, run: Path) -> Path:
    """Copy the weights and what belongs to them, and write their card.

    Args:
        name: one of `ADOPTED`.
        run: folder of the recipe.

    Returns:
        The folder in the repository.

    Raises:
        ObjectComposeError: nothing was measured, or other weights were.
    """
    adopted, target, measured = ADOPTED[name], toybox_path(name), measured_hashes(name)
    copies = {}
    for part, place in adopted.parts:
        source = run / adopted.arm / part
        weights = sorted(source.glob("*.safetensors"))
        for file in weights:
            if hash_weights(file) not in measured:
                raise ObjectComposeError(f"{file} is not what {RESULTS_FOLDER}/{name}_toybox.json was measured with.")
        copies |= {file: target / place / file.name for file in [*weights, *source.glob("config.json")]}
    if not copies:
        raise ObjectComposeError(f"{run / adopted.arm} holds no weights.")
    if adopted.pictures:
        copies |= {file: target / file.name for file in (run / adopted.pictures).glob("*.png")}
    card = (run / adopted.arm / adopted.parts[0][0] / "README.md").read_text(encoding="utf-8")
    for file, copy in copies.items():
        write_atomically(copy, file.read_bytes())
    write_model_card(target, card_facts(name, card))
    return target


def card_facts(name: str, card: str) -> ModelCardFacts:
    """The trainer's card with the licences of toybox, and the figures.

    Args:
        name: one of `ADOPTED`.
        card: text of the trainer's.
    """
    title, summary = re.findall(r"^# (.+)\n\n(.+)$", card, re.MULTILINE)[0]
    adopted, result = ADOPTED[name], _result(name)
    return ModelCardFacts(
        title=title,
        summary=f"{summary} {adopted.usage}".strip(),
        base_model="toybox-1",
        base_license="Apache-2.0",
        code_license="Apache-2.0",
        weights_license="apache-2.0",
        data=re.findall(r"^- Data: (.+) \(licence:", card, re.MULTILINE)[0],
        data_license=DATA_LICENSE,
        command=re.findall(r"```\n(.+)\n```", card)[0],
        commit=re.findall(r"^at commit (.+)\.$", card, re.MULTILINE)[0],
        figures=figures_from_result(result, adopted.figures),
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
