"""The card beside trained weights: what it stands on, under which licences, on which data, how made, how good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from PIL import Image

from objectcompose.errors import ObjectComposeError
from objectcompose.files import write_atomically, write_png


SAMPLE_NAME = "sample.png"
CARD_TAGS = ("diffusers", "text-to-image", "objectcompose")


@dataclass(frozen=True)
class CardFigure:
    """One measured number.

    Attributes:
        name: what was measured.
        value: the number, already with its unit and rounding.
        protocol: how: prompts, split, seeds, steps.
        command: what to type to get it again.
    """

    name: str
    value: str
    protocol: str
    command: str


@dataclass(frozen=True)
class ModelCardFacts:
    """What a card must say; every text field is required.

    Attributes:
        title: heading of the card.
        summary: what the weights are, and what they are not, in a paragraph. Limits come first here.
        base_model: id of the base and its version or hash; "trained from scratch" when there is none.
        base_license: licence of the base.
        code_license: licence of the code, an SPDX identifier.
        weights_license: licence of the weights, an identifier that the Hub knows.
        data: what it was trained on.
        data_license: under which licences that data stands.
        command: the training command.
        commit: the commit that the training ran from.
        figures: what was measured; empty when nothing was.
        tags: tags for the Hub.
        sample: a picture that the weights made, with its layout drawn (`objectcompose.pipelines.plot.draw_layout`).
        sample_caption: what the sample shows and how it was made; required with a sample.
    """

    title: str
    summary: str
    base_model: str
    base_license: str
    code_license: str
    weights_license: str
    data: str
    data_license: str
    command: str
    commit: str
    figures: Sequence[CardFigure] = ()
    tags: Sequence[str] = CARD_TAGS
    sample: Image.Image | None = None
    sample_caption: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_needed = name != "sample_caption" or self.sample is not None
            if is_needed and isinstance(value, str) and not value.strip():
                raise ObjectComposeError(f"`{name}` must say something, got {value!r}.")


def figures_from_result(result: Mapping[str, Any], names: Sequence[str]) -> list[CardFigure]:
    """Figures of a result file (`evaluation/results.py`), with their intervals where they have one.

    Args:
        result: the JSON object of the file.
        names: metrics to show, in this order.

    Raises:
        ObjectComposeError: a metric is not in the file.
    """
    metrics, figures = result["metrics"], []
    for name in names:
        if name not in metrics:
            raise ObjectComposeError(f"`names` must be metrics of {result['name']!r}, got {name!r}.")
        value = _card_number(metrics[name])
        if f"{name}.lo" in metrics:
            value += f" [{_card_number(metrics[f'{name}.lo'])}, {_card_number(metrics[f'{name}.hi'])}]"
        figures.append(CardFigure(name, value, f"{result['protocol']} ({result['device']})", result["command"]))
    return figures


def model_card_text(facts: ModelCardFacts) -> str:
    """The card as Markdown with the Hub's metadata on top."""
    data = ModelCardData(
        license=facts.weights_license, library_name="diffusers", pipeline_tag="text-to-image", tags=list(facts.tags)
    )
    lines = [
        f"# {facts.title}",
        facts.summary,
        "## Where it comes from",
        f"- Base model: {facts.base_model} (licence: {facts.base_license})\n"
        f"- Data: {facts.data} (licence: {facts.data_license})\n"
        f"- Licence of the weights: {facts.weights_license}; of the code: {facts.code_license}",
        "## How it was trained",
        f"```\n{facts.command}\n```",
        f"at commit {facts.commit}.",
        "## What was measured",
        _figure_table(facts.figures),
    ]
    if facts.sample is not None:
        lines += ["## A sample", f"![{facts.sample_caption}]({SAMPLE_NAME})\n\n{facts.sample_caption}"]
    return _card_markdown(data, lines)


def plain_card_text(title: str, base_model: str | None, usage: str) -> str:
    """A card for weights that are pushed without facts: what is known, and that the rest is not.

    Args:
        title: heading, such as the name of the class.
        base_model: id of the base on the Hub, or None.
        usage: Python lines that load the weights.
    """
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", tags=list(CARD_TAGS), base_model=base_model
    )
    origin = "Base model: not stated." if base_model is None else f"Base model: {base_model}, whose licence applies."
    lines = [
        f"# {title}",
        f"```python\n{usage}\n```",
        f"{origin} Licence of the code: Apache-2.0. Licences of weights and data, training command and figures: not"
        " stated by whoever pushed this.",
    ]
    return _card_markdown(data, lines)


def write_model_card(folder: str | Path, card: ModelCardFacts | str) -> Path:
    """Write `README.md` into the folder of the weights, with the sample if there is one, and return its path.

    Args:
        folder: the folder; made if need be.
        card: facts, or the whole text.
    """
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(card, str):
        if card.sample is not None:
            write_png(path.with_name(SAMPLE_NAME), card.sample)
        card = model_card_text(card)
    write_atomically(path, card.encode())
    return path


def _card_markdown(data: ModelCardData, lines: Sequence[str]) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"


def _figure_table(figures: Sequence[CardFigure]) -> str:
    """A table for each protocol and command, which stand above it once."""
    if not figures:
        return "Nothing yet."
    runs: dict[tuple[str, str], list[CardFigure]] = {}
    for figure in figures:
        runs.setdefault((figure.protocol, figure.command), []).append(figure)
    blocks = []
    for (protocol, command), measured in runs.items():
        rows = [["figure", "value"], ["---"] * 2, *([figure.name, figure.value] for figure in measured)]
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
        table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
        blocks.append(f"`{command}`: {' '.join(protocol.split())}\n\n{table}")
    return "\n\n".join(blocks)


def _card_number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
