"""Comparisons of arms against scipy and on data whose answer is known."""

import numpy as np
import pytest
import scipy.stats

from kvbench.results.comparisons import best_arm, compare_arms, holm, sign_test
from kvbench.results.statistics import Scores, cell_interval


def scores(values, metric="qa_f1"):
    return Scores(metric, {f"s{i:04d}": {"score": float(v)} for i, v in enumerate(values)})


def test_sign_test_is_scipys_binomial_test():
    assert sign_test(9, 1) == pytest.approx(scipy.stats.binomtest(9, 10).pvalue)
    assert sign_test(9, 1) == pytest.approx(22 / 1024)
    assert sign_test(0, 0) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_small_steady_lead_is_found_paired_and_a_noise_lead_is_not():
    generator = np.random.default_rng(5)
    base = generator.random(100) * 0.8
    noisy = np.clip(base + generator.normal(0, 0.2, 100), 0, 1)
    column = {"a": scores(base + 0.01), "b": scores(base), "c": scores(noisy)}
    by_pair = {(c.first, c.second): c for c in compare_arms({"d": column})}
    steady = by_pair["a", "b"]
    assert steady.separated
    assert steady.difference == pytest.approx(1.0)
    assert (steady.wins, steady.losses) == (100, 0)
    assert steady.interval.low == pytest.approx(1.0)
    assert steady.interval.high == pytest.approx(1.0)
    assert cell_interval("d", column["b"]).high > cell_interval("d", column["a"]).low  # unpaired intervals overlap
    assert not by_pair["b", "c"].separated


def test_paired_bootstrap_agrees_with_scipy():
    generator = np.random.default_rng(6)
    a, b = generator.random(30), generator.random(30)
    (ours,) = compare_arms({"d": {"a": scores(a), "b": scores(b)}})
    theirs = scipy.stats.bootstrap(
        (100 * (a - b),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    )
    low, high = theirs.confidence_interval
    assert (ours.interval.low, ours.interval.high) == pytest.approx((low, high), abs=0.6)
    below = (theirs.bootstrap_distribution <= 0).mean()
    assert ours.p_bootstrap == pytest.approx(2 * min(below, 1 - below), abs=0.02)


def test_equal_arms_are_never_separated_and_false_alarms_are_rare():
    generator = np.random.default_rng(7)
    same = generator.random(20)
    (tie,) = compare_arms({"d": {"a": scores(same), "b": scores(same)}})
    assert (tie.p_bootstrap, tie.p_sign, tie.wins, tie.losses) == (1.0, 1.0, 0, 0)
    alarms = 0
    for _ in range(40):
        column = {arm: scores(generator.random(20)) for arm in "abc"}
        alarms += any(c.separated for c in compare_arms({"d": column}))
    assert alarms <= 4


def test_few_samples_cannot_separate_whatever_their_mean_says():
    (pair,) = compare_arms({"d": {"a": scores([1, 1, 1, 1]), "b": scores([0, 0, 0, 0])}})
    assert pair.p_bootstrap < 0.05
    assert not pair.separated


def test_only_common_samples_are_compared_and_correction_counts_the_pairs():
    a, b = scores([1, 0, 1]), Scores("qa_f1", {"s0001": {"score": 1.0}, "other": {"score": 1.0}})
    (pair,) = compare_arms({"d": {"a": a, "b": b}})
    assert (pair.n, pair.wins, pair.losses, pair.difference) == (1, 0, 1, -100.0)
    three = compare_arms({"d": {arm: scores([x, 0, 0, 0, 0, 0, 0]) for arm, x in zip("abc", (1, 0, 0.5), strict=True)}})
    assert len(three) == 3
    smallest = min(three, key=lambda c: c.p_sign)
    assert smallest.p_sign_holm == pytest.approx(min(1.0, 3 * smallest.p_sign))


def test_over_data_sets_the_difference_is_that_of_the_unweighted_means():
    columns = {
        "d": {"a": scores([1, 1]), "b": scores([0, 0])},
        "e": {"a": scores([0, 0, 0, 0]), "b": scores([1, 1, 0, 0])},
    }
    (pair,) = compare_arms(columns)
    assert (pair.difference, pair.n, pair.wins, pair.losses) == (25.0, 6, 2, 2)


def test_best_arm_only_where_separated_from_all_others():
    steps = np.linspace(0.1, 0.7, 30)
    column = {"a": scores(steps + 0.2), "b": scores(steps), "c": scores(steps + 0.1)}
    means = {"a": 60.0, "b": 40.0, "c": 50.0}
    comparisons = compare_arms({"d": column})
    assert best_arm(means, comparisons) == "a"
    assert best_arm({"a": 60.0}, comparisons) is None
    close = compare_arms({"d": {**column, "c": scores(np.where(np.arange(30) % 2, steps + 0.3, steps + 0.1))}})
    assert best_arm(means, close) is None
