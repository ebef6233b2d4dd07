"""Writes RESULTS.md, its plots and README's table of results from the files in benchmarks/results.

    python -m benchmarks.results_page            # writes RESULTS.md, docs/results/*.png, README between its markers
    python -m benchmarks.results_page --check    # writes nothing; exit code 1 where they are not what it would write

Nothing is measured or recomputed here: all figures are those of the files, which `make verify-results` holds against
their raw rows. A contact sheet is shown where one lies beside its result file, `benchmarks/results/<name>_sheet.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_cost import (
    COMPILE_COMMAND,
    COMPILE_FILE,
    COSTS,
    GPU_FILE,
    compile_lines,
    cost_lines,
    gpu_lines,
    world_lines,
)
from benchmarks.results_methods import SECTIONS, Section
from benchmarks.results_plots import draw_plot, is_drawn
from benchmarks.results_tables import (
    UNKNOWN,
    Metrics,
    claim_lines,
    estimate_of,
    judged,
    markdown_table,
    shown,
    table_lines,
)
from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.results import RESULTS_FOLDER
from objectcompose.files import write_atomically


ROOT = Path(__file__).resolve().parents[1]
PAGE, README, PLOTS = Path("RESULTS.md"), Path("README.md"), Path("docs") / "results"
MARKERS = ("<!-- results -->", "<!-- /results -->")
INTRO = """\
# Results

Written by `python -m benchmarks.results_page` from [benchmarks/results](benchmarks/results); change nothing here by
hand. `make verify-results` computes the figures again from their raw rows, all but the few that a file lists as
`stated` (sizes and shares of parameters).

Everything about pictures is on the toybox, a world of drawings with small models that were trained from scratch. It
can show whether a mechanism works, not how well it does on photographs. The papers' numbers stand beside ours as other
data, direction only. Costs are ratios on UNets of Stable Diffusion's shape with random weights, on a CPU.

How to read it:

- `value [lo, hi]` is a 95 % interval. Of a time it is the median of ratios with its interquartile range (IQR).
- A claim **holds** where the whole interval lies on its side of the bar, **does not hold** where all of it lies on the
  other side, and is **not decided** where the bar lies inside or there is no interval. Not significantly below means
  that the interval reaches the bar; a wide interval does that easily. Figures that are counted, such as FLOPs, are
  decided by their value.
- Where ObjectPrompt's narrow and wide streams do not differ by more than 4 standard errors in the paper's direction,
  there is **no trade-off in this world** for the mixed adapter to be good at.
- Differences are those of the first arm named minus the second, so claims of less or fewer hold below 0. They are
  paired: the same prompts and noise. A claim about a multiple of another arm's figure has no paired interval; its
  bounds are put together from the two intervals as if the arms were independent (Zou and Donner, 2008), which is wider
  than paired ones where both do well on the same prompts.
- Intervals are bootstraps over layouts, scenes or prompts. Where these are few, as MIFO's 4 and 8 scenes or 8 prompts
  of a single object, they come out too narrow, and of width 0 where all agree.
- A time's bounds, which its verdict rests on, are the median plus and minus half the IQR: where about half of the
  pairs lie, not an interval of confidence. A time whose IQR is above 5 % of the median is *noisy* and decides nothing.
- Judges took no part in training or guidance; where settings were tuned, a judge chose them on dev lists.
  Nothing is corrected for the number of claims.
- In plots the method, or the difference that a claim is about, is an orange square; a noisy time is hollow.
"""
COST_INTRO = (
    "Ratios over plain sampling on the same components, where nothing else is said. Times and FLOPs are of UNets with"
    " an eighth of Stable Diffusion's channels, memory of all channels unless a row says small shape."
)


def read_results(root: Path) -> dict[str, dict[str, Any]]:
    """All result files of a checkout by name.

    Raises:
        ObjectComposeError: a file is broken.
    """
    found = {}
    for path in sorted((root / RESULTS_FOLDER).glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            keys = ("metrics", "command", "commit", "device", "date", "protocol", "num_rows")
            found[path.stem] = {**{key: result[key] for key in keys}, "dirty": result.get("dirty", False)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ObjectComposeError(f"{path} must be a result file: {error!r}.") from error
    return found


def page_text(results: dict[str, dict[str, Any]], root: Path) -> str:
    """RESULTS.md as it should be.

    Args:
        results: of `read_results`.
        root: the checkout, in which sheets are looked for.
    """
    blocks = [INTRO.splitlines()]
    for section in SECTIONS:
        blocks.append([f"## {section.title}"])
        if section.name in results:
            blocks += _section_blocks(section, results[section.name], root)
        else:
            blocks.append([not_measured(section.command)])
    blocks += _cost_blocks(results) + _world_blocks(results, root)
    return "\n\n".join("\n".join(block).strip() for block in blocks if block) + "\n"


def _section_blocks(section: Section, result: dict[str, Any], root: Path) -> list[list[str]]:
    metrics = result["metrics"]
    blocks = [wrapped(section.intro), ["### Claims"], claim_lines(section.claims, metrics)]
    blocks += [[f"![{plot.title}]({_plot_path(plot.name)})"] for plot in section.plots if is_drawn(plot, metrics)]
    blocks.append(["### Arms"])
    blocks += [_with_wrapped_caption(table_lines(table, metrics)) for table in section.tables]
    blocks += [["### Beside the paper: other data, direction only"], wrapped(section.paper_note)]
    blocks.append(_paper_lines(section, metrics))
    sheet = RESULTS_FOLDER / f"{section.name}_sheet.png"
    if (root / sheet).is_file():
        blocks += [["### Pictures"], [f"![Pictures of all arms]({sheet.as_posix()})"]]
    return [*blocks, ["### Protocol"], facts_of(section.name, result), protocol_lines(result["protocol"])]


def _paper_lines(section: Section, metrics: Metrics) -> list[str]:
    rows = []
    for row in section.paper:
        found = estimate_of(metrics, row.key)
        rows.append([row.figure, "" if found is None else shown(found, row.decimals), row.paper])
    return markdown_table(["figure", "ours", "paper"], rows) if rows else []


def _cost_blocks(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    blocks = [["## Cost"], wrapped(COST_INTRO)]
    for file in COSTS:
        if file.name in results:
            result = results[file.name]
            lines = cost_lines(file, result["metrics"])
            blocks += [[f"### {file.title}"], lines, facts_of(file.name, result)]
        elif not file.optional:
            blocks += [[f"### {file.title}"], [not_measured(file.command)]]
    if GPU_FILE in results:
        result = results[GPU_FILE]
        blocks += [["### Full shapes on a GPU"], gpu_lines(result["metrics"]), facts_of(GPU_FILE, result)]
    blocks.append(["## Compiled UNets"])
    if COMPILE_FILE not in results:
        return [*blocks, [not_measured(COMPILE_COMMAND)]]
    result = results[COMPILE_FILE]
    text = (
        "`torch.compile` of the UNet with parts: one graph, so no break, and none more on a call with new parts. Masks"
        " save time here because the cells of a box attend to one another only, and self-attention is most of the work"
        " at an eighth of the channels."
    )
    return [*blocks, wrapped(text), compile_lines(result["metrics"]), facts_of(COMPILE_FILE, result)]


def _world_blocks(results: dict[str, dict[str, Any]], root: Path) -> list[list[str]]:
    lines = world_lines({name: result["metrics"] for name, result in results.items()})
    if not lines:
        return []
    blocks = [["## The judge and the base model"], lines]
    blocks += [facts_of(name, results[name]) for name in ("toybox", "grounding") if name in results]
    sheet = RESULTS_FOLDER / "toybox_sheet.png"
    if (root / sheet).is_file():
        blocks.append([f"![True scenes and pictures of the base]({sheet.as_posix()})"])
    return blocks


def readme_table(results: dict[str, dict[str, Any]]) -> str:
    """The main claims of every method, as a table in Markdown."""
    rows = []
    for section in SECTIONS:
        metrics = results.get(section.name, {}).get("metrics", {})
        for claim in section.claims:
            if claim.in_readme:
                measured, outcome = judged(claim, metrics)
                rows.append([section.title, claim.text, measured, outcome if measured else UNKNOWN])
    lines = markdown_table(["method", "claim", "measured", "verdict"], rows)
    return "\n".join([*lines, "", f"How to read it, all arms, plots and cost: [{PAGE}]({PAGE})."])


def readme_text(text: str, table: str) -> str:
    """README with the table between its markers; unchanged without markers.

    Raises:
        ObjectComposeError: one of the markers is missing, or they are not in order.
    """
    start, end = (text.find(marker) for marker in MARKERS)
    if start < 0 and end < 0:
        return text
    if not 0 <= start < end:
        raise ObjectComposeError(f"{README} must have `{MARKERS[0]}` and then `{MARKERS[1]}`, or neither.")
    return f"{text[: start + len(MARKERS[0])]}\n{table}\n{text[end:]}"


def facts_of(name: str, result: dict[str, Any]) -> list[str]:
    """Command, commit, device, date and rows of a file, as a paragraph."""
    changed = " with changes that were not committed" if result["dirty"] else ""
    file = f"[{name}.json]({(RESULTS_FOLDER / name).as_posix()}.json)"
    return wrapped(
        f"{file}: `{result['command']}`, commit {str(result['commit'])[:12]}{changed}, {result['device']},"
        f" {str(result['date'])[:10]}, {result['num_rows']} rows."
    )


def protocol_lines(text: str) -> list[str]:
    """The protocol word by word; `mg<k>` would be markup outside of a code block."""
    return ["```text", *wrapped(text), "```"]


def not_measured(command: str) -> str:
    """What stands in the place of a file that is not there."""
    return f"Not measured yet: `{command}`."


def wrapped(text: str) -> list[str]:
    """Lines of a paragraph."""
    return textwrap.wrap(text, 119, break_long_words=False, break_on_hyphens=False)


def _with_wrapped_caption(lines: list[str]) -> list[str]:
    return [*wrapped(lines[0]), *lines[1:]] if lines else []


def _plot_path(name: str) -> str:
    return (PLOTS / f"{name}.png").as_posix()


def _drawn_plots(results: dict[str, dict[str, Any]]) -> list[tuple[Any, Metrics]]:
    found = [(plot, results[one.name]["metrics"]) for one in SECTIONS if one.name in results for plot in one.plots]
    return [(plot, metrics) for plot, metrics in found if is_drawn(plot, metrics)]


def write_page(root: Path) -> None:
    """Write page, plots and README's table; plots first, so that the page names none that is not there."""
    results = read_results(root)
    for plot, metrics in _drawn_plots(results):
        path = root / _plot_path(plot.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_plot(plot, metrics, path)
    for path, text in _texts(results, root).items():
        if not _is_current(root / path, text):
            write_atomically(root / path, text.encode())


def stale_files(root: Path) -> list[str]:
    """One line for each file that `write_page` would change; of plots only whether they are there."""
    results = read_results(root)
    lines = []
    for path, text in _texts(results, root).items():
        if not _is_current(root / path, text):
            lines.append(f"{path} is not what the result files say")
    for plot, _ in _drawn_plots(results):
        if not (root / _plot_path(plot.name)).is_file():
            lines.append(f"{_plot_path(plot.name)} is missing")
    return lines


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _texts(results: dict[str, dict[str, Any]], root: Path) -> dict[Path, str]:
    texts = {PAGE: page_text(results, root)}
    if (root / README).is_file():
        texts[README] = readme_text((root / README).read_text(encoding="utf-8"), readme_table(results))
    return texts


def main(argv: Sequence[str] | None = None) -> int:
    """Write the results page, or check that it is current; exit code 1 when it is not."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; say what is not current")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    args = parser.parse_args(argv)
    try:
        if not args.check:
            write_page(args.root)
            return 0
        lines = stale_files(args.root)
    except ObjectComposeError as error:
        print(error, file=sys.stderr)
        return 1
    for line in lines:
        print(f"{line}: run `python -m benchmarks.results_page`", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
