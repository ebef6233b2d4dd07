"""Known answers, reproducibility and coverage of the bootstrap intervals."""

import numpy as np
import pytest

from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics, paired_difference


def test_interval_of_a_mean_is_close_to_the_normal_one():
    rows = np.random.default_rng(3).normal(5.0, 2.0, size=1000)
    interval = bootstrap_mean(rows)
    half_width = 1.96 * rows.std() / np.sqrt(len(rows))
    assert interval.value == pytest.approx(rows.mean())
    assert interval.lo == pytest.approx(rows.mean() - half_width, abs=0.01)
    assert interval.hi == pytest.approx(rows.mean() + half_width, abs=0.01)
    assert interval.excludes_zero


def test_pairing_removes_the_variance_that_both_arms_share():
    generator = np.random.default_rng(0)
    shared = generator.normal(0.0, 10.0, size=200)
    theirs, ours = shared, shared + 0.5 + generator.normal(0.0, 0.5, size=200)
    assert paired_difference(ours, theirs).excludes_zero
    assert bootstrap_mean(ours).hi - bootstrap_mean(ours).lo > 2.0
    assert paired_difference(theirs, ours).hi < 0.0


def test_equal_arms_do_not_beat_each_other():
    same = paired_difference([1, 0, 1, 1], [1, 0, 1, 1])
    assert (same.value, same.lo, same.hi, same.excludes_zero) == (0.0, 0.0, 0.0, False)


def test_bounds_repeat_and_change_with_the_seed():
    rows = np.random.default_rng(1).random(50)
    assert bootstrap_mean(rows, seed=4) == bootstrap_mean(rows, seed=4)
    assert bootstrap_mean(rows, seed=4).lo != bootstrap_mean(rows, seed=5).lo


def test_groups_widen_the_interval_of_correlated_rows():
    generator = np.random.default_rng(2)
    prompts = np.repeat(np.arange(40), 5)
    rows = generator.normal(size=40)[prompts] + 0.01 * generator.normal(size=200)
    alone, grouped = bootstrap_mean(rows), bootstrap_mean(rows, groups=list(prompts))
    assert grouped.value == pytest.approx(alone.value)
    assert grouped.num_groups == 40 and grouped.num_rows == 200
    assert (grouped.hi - grouped.lo) > 1.8 * (alone.hi - alone.lo)


def test_unequal_groups_keep_the_mean_over_rows():
    interval = bootstrap_mean([0.0, 0.0, 0.0, 1.0], groups=["a", "a", "a", "b"])
    assert interval.value == 0.25 and interval.lo == 0.0 and interval.hi == 1.0


def test_coverage_of_a_proportion_is_near_the_nominal_one():
    generator = np.random.default_rng(7)
    truth, hits = 0.3, 0
    for trial in range(400):
        interval = bootstrap_mean(generator.random(100) < truth, num_resamples=400, seed=trial)
        hits += interval.lo <= truth <= interval.hi
    assert 0.91 <= hits / 400 <= 0.98


def test_flat_metrics():
    interval = bootstrap_mean([0.0, 1.0, 1.0])
    assert interval_metrics("mg3", interval) == {"mg3": interval.value, "mg3.lo": interval.lo, "mg3.hi": interval.hi}


@pytest.mark.parametrize(
    ("values", "options", "word"),
    [
        ([1.0], {}, "values"),
        ([[1.0, 2.0]], {}, "values"),
        ([1.0, float("nan")], {}, "finite"),
        ([1.0, 2.0], {"confidence": 1.0}, "confidence"),
        ([1.0, 2.0], {"num_resamples": 3}, "num_resamples"),
        ([1.0, 2.0], {"groups": ["a"]}, "groups"),
        ([1.0, 2.0], {"groups": ["a", "a"]}, "groups"),
    ],
)
def test_bad_rows_are_refused(values, options, word):
    with pytest.raises(ObjectComposeError, match=word):
        bootstrap_mean(values, **options)


def test_arms_of_different_length_are_refused():
    with pytest.raises(ObjectComposeError, match="same rows"):
        paired_difference([1, 2], [1, 2, 3])
