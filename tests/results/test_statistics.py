"""Intervals and comparisons of arms against scipy and on data whose answer is known."""

import numpy as np
import pytest
import scipy.stats
from report_records import make_scores as scores

from kvbench.results import statistics
from kvbench.results.statistics import Scores, against, best_arm, bootstrap_scores, compare_arms, score_interval

ROUGES = ("rouge1", "rouge2", "rougeL")


def rouge(rows):
    rows = ({"score": 0.0, **dict(zip(ROUGES, row, strict=True))} for row in rows)
    return Scores("zs_rouge", {f"s{i:04d}": row for i, row in enumerate(rows)})


def others_draws(data, statistic, **options):
    options |= {"n_resamples": 20_000, "method": "percentile", "rng": np.random.default_rng(1)}
    return scipy.stats.bootstrap(data, statistic, **options)


def mean(rows, axis):
    return 100 * rows.mean(axis)


def geometric(*rows, axis):
    return 100 * np.prod([part.mean(axis) for part in rows], axis=0) ** (1 / 3)


@pytest.mark.parametrize(
    ("make", "shape", "statistic", "error"),
    [(lambda values: scores(values[:, 0]), (60, 1), mean, 0.25), (rouge, (40, 3), geometric, 0.5)],
    ids=["mean", "geometric mean of means"],
)
def test_interval_agrees_with_other_draws_of_scipy(make, shape, statistic, error):
    rows = np.random.default_rng(0).beta(2, 3, size=shape)
    ours = score_interval({"qasper": make(rows)})
    theirs = others_draws(tuple(rows.T), statistic, paired=True).confidence_interval
    assert tuple(ours) == pytest.approx(tuple(theirs), abs=error)  # Monte Carlo error of the ends
    assert ours.high - ours.low > 5


@pytest.mark.parametrize("data", [rouge([[0.1, 0.4, 0.9]]), scores([0.3])], ids=["rouge", "mean"])
def test_the_aggregate_of_all_resamples_is_the_metrics_own(data):
    (sample,) = data.parts
    assert bootstrap_scores("a", data, (sample,)) == pytest.approx(data.aggregate([sample]), abs=1e-4)


def test_a_metric_of_another_kind_is_asked_for_each_resample(monkeypatch):
    class Squared:
        def aggregate(self, rows):
            return 100 * (sum(row["score"] for row in rows) / len(rows)) ** 2

    data = scores([0.0, 0.5, 1.0])
    means = bootstrap_scores("a", data, tuple(data.parts))
    monkeypatch.setattr(statistics, "get_metric", lambda name: Squared())
    squared = bootstrap_scores("a", scores([0.0, 0.5, 1.0], "squared"), tuple(data.parts))
    assert squared == pytest.approx(means**2 / 100)


def test_draws_are_the_same_for_all_arms_of_a_data_set_and_others_for_another():
    samples = tuple(scores([0, 0, 0, 1]).parts)
    first = bootstrap_scores("a", scores([0, 0, 0, 1]), samples)
    assert (bootstrap_scores("a", scores([1, 1, 1, 0]), samples) == 100 - first).all()
    assert (bootstrap_scores("b", scores([0, 0, 0, 1]), samples) != first).any()


def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(statistics, "N_RESAMPLES", 600)
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        data = scores(generator.beta(2, 2, size=40))
        interval = statistics.percentile_interval(bootstrap_scores(f"t{trial}", data, tuple(data.parts)), 40)
        hits += interval.low <= 50.0 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98  # percentile intervals of 40 samples cover a little less than 95 %


def test_one_sample_has_no_interval_and_equal_samples_a_flat_one():
    assert score_interval({"a": scores([0.3])}) is None
    assert score_interval({"a": scores([1, 1, 1])}).flat
    assert not score_interval({"a": scores([1, 1, 0])}).flat


def test_the_average_resamples_within_each_data_set():
    # Two data sets without spread inside: however far apart they are, their mean is certain.
    assert score_interval({"a": scores([1, 1, 1]), "b": scores([0, 0])}) == (50.0, 50.0)
    # Independent strata: the variance of the mean of two is a quarter of the sum of variances.
    generator = np.random.default_rng(4)
    a, b = scores(generator.random(50)), scores(generator.random(50))
    widths = [i.high - i.low for i in map(score_interval, ({"a": a}, {"b": b}, {"a": a, "b": b}))]
    assert widths[2] == pytest.approx(np.hypot(widths[0], widths[1]) / 2, rel=0.05)
    assert score_interval({"a": a, "b": scores([0.5])}) is None


def test_sign_test_and_holm_by_hand():
    assert statistics.sign_test(9, 1) == pytest.approx(22 / 1024)
    assert statistics.sign_test(0, 0) == 1.0
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]) == []


def test_a_small_steady_lead_is_found_paired_and_a_noise_lead_is_not():
    generator = np.random.default_rng(5)
    base = generator.random(100) * 0.8
    noisy = np.clip(base + generator.normal(0, 0.2, 100), 0, 1)
    column = {"a": scores(base + 0.01), "b": scores(base), "c": scores(noisy)}
    by_pair = {(c.first, c.second): c for c in compare_arms({"d": column})}
    steady = by_pair["a", "b"]
    assert steady.separated
    assert (steady.wins, steady.losses) == (100, 0)
    assert (steady.difference, *steady.interval) == pytest.approx((1.0, 1.0, 1.0))
    assert score_interval({"d": column["b"]}).high > score_interval({"d": column["a"]}).low  # unpaired ones overlap
    assert not by_pair["b", "c"].separated


def test_paired_bootstrap_agrees_with_scipy():
    generator = np.random.default_rng(6)
    a, b = generator.random(30), generator.random(30)
    (ours,) = compare_arms({"d": {"a": scores(a), "b": scores(b)}})
    theirs = others_draws((100 * (a - b),), np.mean)
    assert tuple(ours.interval) == pytest.approx(tuple(theirs.confidence_interval), abs=0.6)
    below = (theirs.bootstrap_distribution <= 0).mean()
    assert ours.p_bootstrap == pytest.approx(2 * min(below, 1 - below), abs=0.02)


def test_equal_arms_are_never_separated_and_false_alarms_are_rare():
    generator = np.random.default_rng(7)
    same = generator.random(20)
    (tie,) = compare_arms({"d": {"a": scores(same), "b": scores(same)}})
    assert (tie.p_bootstrap, tie.p_sign, tie.wins, tie.losses) == (1.0, 1.0, 0, 0)
    columns = [{arm: scores(generator.random(20)) for arm in "abc"} for _ in range(40)]
    assert sum(any(c.separated for c in compare_arms({"d": column})) for column in columns) <= 4


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
    second = {"a": scores([0, 0, 0, 0]), "b": scores([1, 1, 0, 0])}
    (pair,) = compare_arms({"d": {"a": scores([1, 1]), "b": scores([0, 0])}, "e": second})
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


def test_many_arms_can_still_be_separated_and_equal_ones_are_not():
    """Over 300 pairs, Holm's correction asks for less than 10,000 resamples can count."""
    noise = np.random.default_rng(3).normal(0, 0.02, (25, 30))
    arms = {f"a{i:02}": scores(0.1 + 0.03 * (i // 5) + noise[i]) for i in range(25)}
    found = {(c.first, c.second): c for c in compare_arms({"qasper": arms})}
    assert len(found) == 300
    assert found["a00", "a24"].separated
    assert not found["a00", "a01"].separated
    within = [c.separated for (a, b), c in found.items() if int(a[1:]) // 5 == int(b[1:]) // 5]
    assert sum(within) == 0


def test_pairs_are_compared_inside_contests_only():
    arms = {name: scores([0.1, 0.2, 0.3]) for name in "abcd"}
    found = compare_arms({"qasper": arms}, [["b", "a"], ["c", "d", "none"]])
    assert [(c.first, c.second) for c in found] == [("a", "b"), ("c", "d")]
    (turned, *_) = against("b", found)
    assert (turned.first, turned.second, turned.wins, turned.difference) == ("b", "a", 0, 0)
