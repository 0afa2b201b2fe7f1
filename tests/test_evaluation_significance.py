"""Paired tests against scipy, enumeration and what must hold for any numbers."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.errors import InputError
from hf_distill.evaluation import (
    adjust_p_values,
    average_seeds,
    compare_systems,
    paired_randomization_test,
    paired_t_test,
)


VALUES = st.lists(st.tuples(*[st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.7, 1.0])] * 2), min_size=2, max_size=9)


@settings(max_examples=60, deadline=None)
@given(pairs=VALUES)
def test_exact_against_enumeration(pairs):
    a, b = map(np.array, zip(*pairs))
    gains = b - a
    means = [abs(np.dot(signs, gains)) for signs in itertools.product([1, -1], repeat=len(gains))]
    expected = np.mean([mean >= abs(gains.sum()) - 1e-9 for mean in means])
    assert paired_randomization_test(a, b) == pytest.approx(expected, abs=1e-12)
    assert paired_randomization_test(b, a) == paired_randomization_test(a, b)


@pytest.mark.parametrize("n", [5, 12])
def test_exact_against_scipy(n):
    a, b = np.random.default_rng(n).random((2, n))
    theirs = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(y - x, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=np.inf,
    )  # fmt: skip
    assert paired_randomization_test(a, b) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_sampled_against_scipy_and_seeded():
    generator = np.random.default_rng(1)
    a = generator.random(80)
    b = a + generator.normal(0.03, 0.15, 80)
    p = paired_randomization_test(a, b, samples=40_000, seed=3)
    assert p == paired_randomization_test(a, b, samples=40_000, seed=3)
    assert p != paired_randomization_test(a, b, samples=40_000, seed=4)
    theirs = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(y - x, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=40_000, rng=np.random.default_rng(5),
    ).pvalue  # fmt: skip
    assert 0.001 < p < 0.999
    assert abs(p - theirs) < 5 * math.sqrt(2 * theirs * (1 - theirs) / 40_000)
    # Beyond what can be enumerated and sampled, still not 0.
    assert paired_randomization_test(np.zeros(100), np.ones(100), samples=999) == 1 / 1000


def test_queries_that_are_equal_do_not_matter():
    a, b = np.random.default_rng(2).random((2, 8))
    same = np.full(5000, 0.25)
    assert paired_randomization_test(np.append(a, same), np.append(b, same)) == paired_randomization_test(a, b)
    assert paired_randomization_test(same, same) == 1.0


def test_memory_does_not_grow_with_samples():
    a, b = np.random.default_rng(3).random((2, 1000))
    tracemalloc.start()
    paired_randomization_test(a, b, samples=20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20  # all swaps at once as float64 would be 160 MB


def test_no_effect_gives_uniform_p_values():
    """Under the hypothesis, p <= x happens in a share x of cases."""
    generator = np.random.default_rng(4)
    p_values = [paired_randomization_test(*generator.random((2, 30)), samples=499, seed=i) for i in range(400)]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.001


@settings(max_examples=60, deadline=None)
@given(pairs=VALUES, confidence=st.sampled_from([0.9, 0.95]))
def test_t_test_against_scipy(pairs, confidence):
    a, b = map(np.array, zip(*pairs))
    ours = paired_t_test(a, b, confidence=confidence)
    gains = b - a
    if np.ptp(gains) < 1e-9:
        certain = abs(gains[0]) > 0
        assert (ours.p_value, ours.interval) == (float(not certain), (gains.mean(), gains.mean()))
        return
    theirs = scipy.stats.ttest_rel(b, a)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-9, abs=1e-12)
    interval = theirs.confidence_interval(confidence)
    assert ours.interval == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-12)
    assert ours.effect_size == pytest.approx(gains.mean() / gains.std(ddof=1), rel=1e-9, abs=1e-12)


def test_corrections_by_hand():
    p_values = [0.04, 0.01, 0.03, 0.5]
    assert adjust_p_values(p_values, "bonferroni") == pytest.approx([0.16, 0.04, 0.12, 1.0])
    assert adjust_p_values(p_values, "holm") == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert adjust_p_values(p_values, "none") == p_values
    assert adjust_p_values([], "holm") == []
    with pytest.raises(InputError, match="unknown correction 'fdr'. Choose one of holm"):
        adjust_p_values(p_values, "fdr")


@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between(p_values):
    none, holm, bonferroni = (adjust_p_values(p_values, method) for method in ("none", "holm", "bonferroni"))
    assert all(a <= b + 1e-12 <= c + 2e-12 for a, b, c in zip(none, holm, bonferroni))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(holm)[order]) >= -1e-12).all()


def table(**columns: list[float]) -> dict:
    """One measure of each system on q0, q1, ..."""
    return {name: {f"q{i}": {"RR@10": value} for i, value in enumerate(row)} for name, row in columns.items()}


def test_comparison_by_hand():
    systems = table(base=[0.0, 0.5, 1.0, 0.2], new=[0.5, 0.5, 0.5, 1.0], other=[0.1, 0.6, 1.1, 0.3])
    new, other = compare_systems(systems)
    assert (new.baseline, new.system, new.measure, new.n_queries) == ("base", "new", "RR@10", 4)
    assert (new.wins, new.losses, new.ties) == (2, 1, 1)
    assert new.difference == pytest.approx(0.2) and new.baseline_mean == pytest.approx(0.425)
    assert new.p_randomization == pytest.approx(6 / 8)  # differences .5, -.5, .8: |sum| >= .8 in six of eight cases
    assert other.p_randomization == pytest.approx(2 / 16) and math.isinf(other.effect_size)
    assert [new.p_randomization_adjusted, other.p_randomization_adjusted] == pytest.approx([6 / 8, 2 / 8])
    assert not new.significant and not other.significant
    pairs = [(c.baseline, c.system) for c in compare_systems(systems, all_pairs=True)]
    assert pairs == [("base", "new"), ("base", "other"), ("new", "other")]
    assert [c.system for c in compare_systems(systems, baseline="new")] == ["base", "other"]


def test_seeds_are_averaged_for_each_query():
    systems = table(base=[0.0, 0.5], **{"new@1": [0.2, 0.6], "new@2": [0.4, 1.0]})
    averaged = average_seeds(systems)
    assert list(averaged) == ["base", "new"]
    assert [row["RR@10"] for row in averaged["new"].values()] == pytest.approx([0.3, 0.8])
    assert compare_systems(averaged)[0].n_queries == 2


def test_what_cannot_be_compared():
    with pytest.raises(InputError, match="a was measured on 3 queries and b on 2; 1 are not common.*'q2' of a"):
        compare_systems(table(a=[0, 1, 0], b=[0, 1]))
    with pytest.raises(InputError, match="needs at least 2 queries"):
        compare_systems(table(a=[0], b=[1]))
    with pytest.raises(InputError, match="1 system.*at least two"):
        compare_systems(average_seeds(table(**{"a@1": [0, 1], "a@2": [0, 1]})))
    with pytest.raises(InputError, match="no system 'c'"):
        compare_systems(table(a=[0, 1], b=[0, 1]), baseline="c")
    with pytest.raises(InputError, match="a, b was not measured by AP.*RR@10"):
        compare_systems(table(a=[0, 1], b=[0, 1]), ["AP"])
    with pytest.raises(InputError, match="shapes"):
        paired_t_test([1, 2], [1, 2, 3])
