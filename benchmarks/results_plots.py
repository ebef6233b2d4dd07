"""Plots of the results page: a dot with its interval for each arm, drawn small and with few colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.results_tables import Metrics, estimate_of
from objectcompose.errors import MissingPackageError
from objectcompose.files import write_atomically


#: Colour-blind safe (Okabe and Ito): the method, what it is compared with, and lines.
OURS, OTHERS, LINE = "#D55E00", "#0072B2", "#555555"
MAX_BYTES, COLOURS, DPI = 60_000, 48, 110
WIDTH, MAX_WIDTH, ROW_HEIGHT, FRAME_HEIGHT = 3.9, 9.6, 0.26, 0.95  # inches


@dataclass(frozen=True)
class Panel:
    """One axis: a row for each figure.

    Attributes:
        label: of the axis, with its unit.
        points: (label of the row, name of the figure).
        ours: labels in the method's colour.
        lines: (label, factor, name of a figure or ""): where factor times the figure is, or the factor itself.
    """

    label: str
    points: tuple[tuple[str, str], ...]
    ours: tuple[str, ...] = ()
    lines: tuple[tuple[str, float, str], ...] = ()


@dataclass(frozen=True)
class Scatter:
    """One figure beside another: `x` and `y` are (label, name with `{arm}`), a point for each of `arms`."""

    x: tuple[str, str]
    y: tuple[str, str]
    arms: tuple[str, ...]
    ours: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plot:
    """A picture of the page: file name without ending, title, and panels side by side."""

    name: str
    title: str
    panels: tuple[Panel | Scatter, ...]


def arms_panel(label: str, key: str, arms: Sequence[str | tuple[str, str]], **more: Any) -> Panel:
    """A panel with a row for each arm or (label, arm); `key` has `{arm}` in the arm's place."""
    pairs = [(arm, arm) if isinstance(arm, str) else arm for arm in arms]
    return Panel(label, tuple((name, key.format(arm=arm)) for name, arm in pairs), **more)


def has_points(panel: Panel | Scatter, metrics: Metrics) -> bool:
    """Whether there is anything to draw."""
    if isinstance(panel, Panel):
        return any(key in metrics for _, key in panel.points)
    return any(all(key.format(arm=arm) in metrics for _, key in (panel.x, panel.y)) for arm in panel.arms)


def is_drawn(plot: Plot, metrics: Metrics) -> bool:
    """Whether a plot has anything to show."""
    return any(has_points(panel, metrics) for panel in plot.panels)


def draw_plot(plot: Plot, metrics: Metrics, path: Path) -> None:
    """Write a plot as PNG, atomically, of at most `MAX_BYTES`.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(f'plots need matplotlib: pip install "objectcompose[dev]" ({error}).') from error
    panels = [panel for panel in plot.panels if has_points(panel, metrics)]
    rows = max(len(_rows(panel, metrics)) if isinstance(panel, Panel) else 10 for panel in panels)
    width = min(WIDTH * max(len(panels), 1.35), MAX_WIDTH)
    figure = Figure(figsize=(width, FRAME_HEIGHT + ROW_HEIGHT * rows), layout="constrained")
    figure.suptitle(plot.title, fontsize=9)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if isinstance(panel, Panel):
            _draw_rows(axes, panel, metrics)
        else:
            _draw_scatter(axes, panel, metrics)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    write_atomically(path, _with_few_colours(content))


def _rows(panel: Panel, metrics: Metrics) -> list[tuple[str, str]]:
    return [(label, key) for label, key in panel.points if key in metrics]


def _draw_rows(axes: Any, panel: Panel, metrics: Metrics) -> None:
    rows = _rows(panel, metrics)
    for place, (label, key) in enumerate(rows):
        found = estimate_of(metrics, key)
        assert found is not None
        bars = _bars(found.value, found.lo, found.hi)
        _dot(axes, found.value, place, label in panel.ours, xerr=bars, hollow=not found.valid)
    drawn = False
    for (label, factor, key), style in zip(panel.lines, ("--", ":", "-."), strict=False):
        if not key or key in metrics:
            axes.axvline(factor * (metrics[key] if key else 1), color=LINE, lw=1, ls=style, zorder=0, label=label)
            drawn = drawn or bool(label)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first one at the top
    axes.grid(axis="x", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(panel.label, fontsize=8)
    if drawn:
        axes.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _draw_scatter(axes: Any, panel: Scatter, metrics: Metrics) -> None:
    for arm in panel.arms:
        x, y = (estimate_of(metrics, key.format(arm=arm)) for _, key in (panel.x, panel.y))
        if x is None or y is None:
            continue
        xerr, yerr = (_bars(one.value, one.lo, one.hi) for one in (x, y))
        _dot(axes, x.value, y.value, arm in panel.ours, xerr=xerr, yerr=yerr)
        axes.annotate(arm, (x.value, y.value), textcoords="offset points", xytext=(6, 5), fontsize=8)
    axes.grid(color="#e4e4e4", lw=0.6)
    axes.margins(0.15)
    axes.set_xlabel(panel.x[0], fontsize=8)
    axes.set_ylabel(panel.y[0], fontsize=8)


def _bars(value: float, lo: float | None, hi: float | None) -> list[list[float]] | None:
    return None if lo is None or hi is None else [[value - lo], [hi - value]]


def _dot(axes: Any, x: float, y: float, is_ours: bool, hollow: bool = False, **bars: Any) -> None:
    """The method is a square, so that it can be told in grey too; a noisy time is hollow."""
    colour = OURS if is_ours else OTHERS
    face = "white" if hollow else colour
    axes.errorbar(
        [x], [y], fmt="s" if is_ours else "o", ms=5, color=colour, mfc=face, capsize=2.5, elinewidth=1.4, **bars
    )


def _with_few_colours(png: io.BytesIO) -> bytes:
    content = io.BytesIO()
    with Image.open(png) as image:
        small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(content, format="PNG", optimize=True)
    assert content.tell() <= MAX_BYTES, f"a plot of {content.tell()} bytes"
    return content.getvalue()
