"""Figures of learned instances: is each what it was, apart from the others, and only where it belongs?

Definitions (section C.4 of the paper names SIM-C, SIM-D and NSIM-D; which crops, and the composites, are ours):

    sim_c           Cosine of the picture with its caption (instances in words), by CLIP; `clip_score` is 2.5 times it,
                    at least 0, the scale of the paper's figures.
    sim_d           Cosine of what is in an instance's box with the instance's own reference, by DINO.
    nsim_d          The same with the references of the other instances.
    cs              sim_c * sim_d * (1 - nsim_d) of the means; `cs_scaled` has clip_score in sim_c's place, as the
                    paper's table of synthesis. `learning_cs` is sim_d * (1 - nsim_d); the paper's table of learning
                    multiplies by nsim_d itself, which rewards what should be low.
    mixed_up        Share of boxes whose content is more like another instance's reference than like its own, by DINO.
    leakage_background
                    Cosine of the picture without its boxes (greyed out) with the reference it is most like, by DINO.

and where a judge looks, that took no part in learning:

    identity, other_identity, identity_mixed_up    as sim_d, nsim_d and mixed_up, by the judge
    leakage         Share of the area that the judge sees the instances' categories on that lies outside of all boxes;
                    of those pictures alone in which it sees one.
    shown           Share of pictures in which it does.
    placed          Share of instances with something of their category whose middle is in their box.

Cosines are means over instances, then pictures; shares are in per cent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics


Row = Mapping[str, Any]
COSINES = ("sim_c", "clip_score", "sim_d", "nsim_d", "leakage_background", "identity", "other_identity")
SHARES = ("mixed_up", "identity_mixed_up", "leakage", "shown", "placed")
COMPOSITES = {
    "cs": ("sim_c", "sim_d", "nsim_d"),
    "cs_scaled": ("clip_score", "sim_d", "nsim_d"),
    "learning_cs": ("sim_d", "nsim_d"),
}
RESAMPLES = 9_999


def picture_figures(row: Row) -> dict[str, float]:
    """Figures of one picture, cosines and shares in [0, 1]; those that it has.

    Args:
        row: `sim_c`, `dino` (a table: box by reference), `background` (per reference), and with a judge `identity` (a
            table), `leakage` (None where nothing is seen) and `placed`.
    """
    figures = {"sim_c": row["sim_c"], "clip_score": 2.5 * max(row["sim_c"], 0.0)}
    figures |= _table_figures(np.array(row["dino"]), "sim_d", "nsim_d", "mixed_up")
    figures["leakage_background"] = max(row["background"])
    if "identity" in row:
        figures |= _table_figures(np.array(row["identity"]), "identity", "other_identity", "identity_mixed_up")
        figures["placed"] = float(np.mean(row["placed"]))
        figures["shown"] = float(row["leakage"] is not None)
        if row["leakage"] is not None:
            figures["leakage"] = row["leakage"]
    return figures


def _table_figures(table: np.ndarray, own: str, others: str, mixed_up: str) -> dict[str, float]:
    is_own = np.eye(len(table), dtype=bool)
    figures = {own: float(table[is_own].mean())}
    if len(table) > 1:
        figures[others] = float(table[~is_own].mean())
        best_other = np.where(is_own, -np.inf, table).max(1)
        figures[mixed_up] = float((best_other >= table[is_own]).mean())
    return figures


def disentangle_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """All figures over all pictures, and per kind where there are several (`sim_d.alike`).

    Intervals are over scenes where there are several, else over prompts.

    Args:
        rows: one per picture: what `picture_figures` reads, `scene`, `prompt`, `round` and `kind`.
    """
    metrics = _metrics_of(rows, "")
    kinds = sorted({row["kind"] for row in rows} - {""})
    for kind in kinds:
        metrics |= _metrics_of([row for row in rows if row["kind"] == kind], f".{kind}")
    return metrics


def groups_of(rows: Sequence[Row]) -> list[str]:
    """What is drawn together: the rows of a scene, or of a prompt where there is but one scene."""
    return [row["scene" if len({one["scene"] for one in rows}) > 1 else "prompt"] for row in rows]


def figure_values(rows: Sequence[Row], name: str) -> tuple[list[float], list[str]]:
    """One figure of the pictures that have it, and their groups."""
    pairs = [(picture_figures(row), group) for row, group in zip(rows, groups_of(rows), strict=True)]
    found = [(figures[name], group) for figures, group in pairs if name in figures]
    return [value for value, _ in found], [group for _, group in found]


def _metrics_of(rows: Sequence[Row], ending: str) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in (*COSINES, *SHARES):
        values, groups = figure_values(rows, name)
        factor = 100.0 if name in SHARES else 1.0
        if values and len(set(groups)) > 1:
            interval = interval_metrics(f"{name}{ending}", bootstrap_mean(values, groups=groups))
            metrics |= {key: factor * value for key, value in interval.items()}
        elif values:
            metrics[f"{name}{ending}"] = factor * float(np.mean(values))
    if f"nsim_d{ending}" in metrics:
        for name, factors in COMPOSITES.items():
            metrics |= _composite(f"{name}{ending}", rows, factors)
    return metrics


def _composite(name: str, rows: Sequence[Row], factors: Sequence[str]) -> dict[str, float]:
    """The product of means with its bootstrap interval; "nsim_d" enters as one less it."""
    figures, groups = [picture_figures(row) for row in rows], groups_of(rows)
    labels = list(dict.fromkeys(groups))
    table = np.array([[1 - one[key] if key == "nsim_d" else one[key] for key in factors] for one in figures])
    owner = np.array([labels.index(group) for group in groups])
    sums = np.stack([table[owner == number].sum(0) for number in range(len(labels))])
    sizes = np.bincount(owner).astype(float)
    value = float((sums.sum(0) / sizes.sum()).prod())
    if len(labels) < 2:
        return {name: value}
    drawn = np.random.default_rng(0).multinomial(len(labels), [1 / len(labels)] * len(labels), size=RESAMPLES)
    products = ((drawn @ sums) / (drawn @ sizes)[:, None]).prod(1)
    low, high = (float(bound) for bound in np.quantile(products, [0.025, 0.975]))
    return {name: value, f"{name}.lo": min(low, value), f"{name}.hi": max(high, value)}
