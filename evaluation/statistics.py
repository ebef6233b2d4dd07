"""Bootstrap intervals for means, proportions and paired differences.

Everything is paired by prompt and seed: two arms are compared on the same rows, and the interval is that of the mean
of the row-wise differences (Efron and Tibshirani, 1993, percentile method, `scipy.stats.bootstrap`). Rows that share a
prompt are not independent; `groups` makes the bootstrap draw whole prompts instead of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from objectcompose.errors import ObjectComposeError


_BOOTSTRAP_BATCH_ELEMENTS = 4_000_000  # values resampled at once: about 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes:
        value: the mean of the rows, in the unit of the rows.
        lo: lower bound.
        hi: upper bound.
        confidence: in (0, 1).
        num_rows: rows that entered.
        num_groups: independent units that were resampled (equals `num_rows` without groups).
    """

    value: float
    lo: float
    hi: float
    confidence: float
    num_rows: int
    num_groups: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies strictly outside the interval; of a paired difference: one arm beats the other."""
        return self.lo > 0.0 or self.hi < 0.0


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 9_999,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a mean; of a proportion when the values are 0 and 1.

    Args:
        values: one finite number (or bool) per row, shape `(rows,)`, at least two rows.
        groups: one hashable label per row (the prompt); rows of a group are drawn together. None: independent rows.
        confidence: coverage of the two-sided interval, in (0, 1).
        num_resamples: bootstrap draws, at least 100.
        seed: seed of the draws; equal arguments give equal bounds.

    Returns:
        The interval. When all values are equal its width is 0: a bootstrap cannot see what never happened.

    Raises:
        ObjectComposeError: fewer than two rows or groups, values not finite, wrong lengths or ranges.
    """
    rows = _checked_rows("values", values)
    if not 0.0 < confidence < 1.0:
        raise ObjectComposeError(f"`confidence` must lie in (0, 1), got {confidence}.")
    if num_resamples < 100:
        raise ObjectComposeError(f"`num_resamples` must be at least 100, got {num_resamples}.")
    sums, counts = _sums_by_group(rows, groups)
    value = float(sums.sum() / counts.sum())
    if np.ptp(sums / counts) == 0.0:
        return Interval(value, value, value, confidence, len(rows), len(sums))
    found = bootstrap(
        (sums, counts),
        lambda drawn_sums, drawn_counts, axis: drawn_sums.sum(axis) / drawn_counts.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=num_resamples,
        batch=max(1, _BOOTSTRAP_BATCH_ELEMENTS // len(sums)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high), confidence, len(rows), len(sums))


def paired_difference(
    ours: Sequence[float] | np.ndarray,
    theirs: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 9_999,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of mean(ours - theirs) over rows that are paired by prompt and seed.

    Args:
        ours: one number (or bool) per row, shape `(rows,)`.
        theirs: the other arm on the same rows, in the same order, shape `(rows,)`.
        groups: see `bootstrap_mean`.
        confidence: see `bootstrap_mean`.
        num_resamples: see `bootstrap_mean`.
        seed: see `bootstrap_mean`.

    Returns:
        Interval of the difference; `excludes_zero` and `value > 0` together mean "ours beats theirs" in the sense of
        a metric of which more is better.

    Raises:
        ObjectComposeError: the two arms differ in length, or see `bootstrap_mean`.
    """
    ours_rows, theirs_rows = _checked_rows("ours", ours), _checked_rows("theirs", theirs)
    if len(ours_rows) != len(theirs_rows):
        raise ObjectComposeError(
            f"`ours` and `theirs` must hold the same rows, got {len(ours_rows)} and {len(theirs_rows)}."
        )
    return bootstrap_mean(
        ours_rows - theirs_rows, groups=groups, confidence=confidence, num_resamples=num_resamples, seed=seed
    )


def interval_metrics(name: str, interval: Interval) -> dict[str, float]:
    """The three flat metrics of a result file: `name`, `name.lo`, `name.hi`."""
    return {name: interval.value, f"{name}.lo": interval.lo, f"{name}.hi": interval.hi}


def _checked_rows(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or len(rows) < 2:
        raise ObjectComposeError(f"`{name}` must be one number per row for at least 2 rows, got shape {rows.shape}.")
    if not np.isfinite(rows).all():
        raise ObjectComposeError(
            f"`{name}` must be finite, got {int((~np.isfinite(rows)).sum())} NaN or infinite rows."
        )
    return rows


def _sums_by_group(rows: np.ndarray, groups: Sequence[object] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of each group's rows, so that a drawn mean is sum of sums over sum of counts."""
    if groups is None:
        return rows, np.ones_like(rows)
    if len(groups) != len(rows):
        raise ObjectComposeError(f"`groups` must have one label per row, {len(rows)}, got {len(groups)}.")
    places: dict[object, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups])
    if len(places) < 2:
        raise ObjectComposeError(f"`groups` must hold at least 2 different labels, got {len(places)}.")
    return np.bincount(index, weights=rows), np.bincount(index).astype(np.float64)
