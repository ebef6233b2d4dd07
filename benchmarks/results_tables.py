"""Figures of result files as text: values with their intervals, claims with their verdicts, tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


Metrics = Mapping[str, Any]
HOLDS, FAILS, OPEN, UNKNOWN = "holds", "does not hold", "not decided", "not measured"
NOISY = f"{OPEN} (noisy)"
NO_TRADE_OFF = "no trade-off in this world"


@dataclass(frozen=True)
class Estimate:
    """A figure with what is known of its spread.

    Attributes:
        value: the figure.
        lo, hi: bounds of its 95 % interval, of a time the median less and plus half the interquartile range; None
            where the file has none.
        iqr: of a time, in its unit; None of everything else.
        valid: False of a time whose interquartile range is too large to decide anything.
    """

    value: float
    lo: float | None = None
    hi: float | None = None
    iqr: float | None = None
    valid: bool = True


def estimate_of(metrics: Metrics, key: str) -> Estimate | None:
    """The figure of that name; None where the file has none."""
    if key not in metrics:
        return None
    value, iqr = float(metrics[key]), metrics.get(f"{key}.iqr")
    if iqr is not None:
        return Estimate(value, value - iqr / 2, value + iqr / 2, float(iqr), bool(metrics.get(f"{key}.valid", True)))
    return Estimate(value, metrics.get(f"{key}.lo"), metrics.get(f"{key}.hi"))


def less_times(ours: Estimate, factor: float, theirs: Estimate) -> Estimate:
    """`ours - factor * theirs` with the interval that the two intervals give for independent estimates.

    By the method of variance estimates recovery (Zou and Donner, 2008): bounds need not lie evenly around values.

    Args:
        ours, theirs: the estimates; without bounds on either side the difference has none.
        factor: above 0.
    """
    value = ours.value - factor * theirs.value
    if ours.lo is None or ours.hi is None or theirs.lo is None or theirs.hi is None:
        return Estimate(value)
    below = math.hypot(ours.value - ours.lo, factor * (theirs.hi - theirs.value))
    above = math.hypot(ours.hi - ours.value, factor * (theirs.value - theirs.lo))
    return Estimate(value, value - below, value + above)


@dataclass(frozen=True)
class Claim:
    """A sentence and the figure that decides it.

    Attributes:
        text: what is claimed.
        key: name of the figure.
        side: on which side of `bar` it has to be; "not below": not significantly below.
        bar: in the figure's unit.
        less: (factor, name of another figure); what is decided is the figure less so many times the other one.
        unit: behind the figure.
        decimals: of the figure.
        exact: decided by the value, which is counted and not sampled.
        trade_off: (measure, sign that coarse less fine has in the paper); decided only where the two differ so.
        in_readme: has a row in README's table.
    """

    text: str
    key: str
    side: Literal["above", "at least", "below", "at most", "not below"] = "above"
    bar: float = 0.0
    less: tuple[float, str] | None = None
    unit: str = "points"
    decimals: int = 1
    exact: bool = False
    trade_off: tuple[str, int] | None = None
    in_readme: bool = False


def judged(claim: Claim, metrics: Metrics) -> tuple[str, str]:
    """What was measured and the verdict: ("", `UNKNOWN`) where the file lacks a figure that the claim needs."""
    found = estimate_of(metrics, claim.key)
    if found is None:
        return "", UNKNOWN
    measured = shown(found, claim.decimals, claim.unit)
    if claim.less is not None:
        factor, name = claim.less
        other = estimate_of(metrics, name)
        if other is None:
            return "", UNKNOWN
        measured = f"{number(found.value, claim.decimals)} against {number(other.value, claim.decimals)}"
        found = less_times(found, factor, other)
        times = "" if factor == 1 else f"{factor:g} times "
        measured += f"; minus {times}that: {shown(found, claim.decimals, claim.unit)}"
    if claim.trade_off is not None and not has_trade_off(metrics, *claim.trade_off):
        return measured, NO_TRADE_OFF
    return measured, verdict(found, claim.side, claim.bar, claim.exact)


def has_trade_off(metrics: Metrics, measure: str, sign: int) -> bool:
    """Whether coarse and fine differ in a measure by more than 4 standard errors, and in the paper's direction."""
    difference = estimate_of(metrics, f"{measure}_diff.coarse_fine")
    return bool(metrics.get(f"trade_off.{measure}")) and difference is not None and sign * difference.value > 0


def verdict(found: Estimate, side: str, bar: float, exact: bool = False) -> str:
    """Whether the whole interval lies on the claimed side of the bar, wholly on the other, or on both."""
    if not found.valid:
        return NOISY
    lo, hi = (found.value, found.value) if exact else (found.lo, found.hi)
    if lo is None or hi is None:
        return OPEN
    if side == "not below":
        return HOLDS if hi >= bar else FAILS
    if side in ("below", "at most"):  # the mirror image of the other two
        lo, hi, bar = -hi, -lo, -bar
    if lo > bar or (lo == bar and side.startswith("at")):
        return HOLDS
    if hi < bar or (hi == bar and not side.startswith("at")):
        return FAILS
    return OPEN


@dataclass(frozen=True)
class Column:
    """Attributes: title, name of the figure with `{arm}` for the row's arm, and decimals."""

    title: str
    key: str
    decimals: int = 1


@dataclass(frozen=True)
class Table:
    """Attributes: caption, rows as arms or (label, arm), and columns."""

    caption: str
    arms: tuple[str | tuple[str, str], ...]
    columns: tuple[Column, ...]


def table_lines(table: Table, metrics: Metrics) -> list[str]:
    """The table in Markdown below its caption; a missing figure is an empty cell, a table without figures nothing."""
    rows = []
    for arm in table.arms:
        label, name = (arm, arm) if isinstance(arm, str) else arm
        found = [(estimate_of(metrics, column.key.format(arm=name)), column.decimals) for column in table.columns]
        rows.append([label, *("" if one is None else shown(one, decimals) for one, decimals in found)])
    if not any(any(row[1:]) for row in rows):
        return []
    return [table.caption, "", *markdown_table(["", *(column.title for column in table.columns)], rows)]


def claim_lines(claims: Sequence[Claim], metrics: Metrics) -> list[str]:
    """Claims in Markdown: what is claimed, what was measured, the verdict."""
    rows = [[claim.text, *judged(claim, metrics)] for claim in claims]
    return markdown_table(["claim", "measured", "verdict"], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def shown(found: Estimate, decimals: int, unit: str = "") -> str:
    """`12.3 [10.1, 14.6] points`, of a time `1.02x (IQR 0.04)`."""
    behind = unit if unit in ("", "x") else f" {unit}"
    if found.iqr is not None:
        noisy = "" if found.valid else ", noisy"
        return f"{number(found.value, decimals)}{behind} (IQR {number(found.iqr, decimals)}{noisy})"
    if found.lo is None or found.hi is None:
        return f"{number(found.value, decimals)}{behind}"
    bounds = ", ".join(number(bound, decimals) for bound in (found.lo, found.hi))
    return f"{number(found.value, decimals)} [{bounds}]{behind}"


def number(value: float, decimals: int) -> str:
    """With so many decimals, and no minus before a zero."""
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text
