"""Intervals and tests against scipy and against data whose answer is known."""

import numpy as np
import pytest
import scipy.stats

from kvbench.metrics import get_metric
from kvbench.results import statistics
from kvbench.results.statistics import (
    Scores,
    aggregate_means,
    average_interval,
    cell_interval,
    resample_counts,
)


def scores(values, metric="qa_f1"):
    return Scores(metric, {f"s{i:04d}": {"score": float(v)} for i, v in enumerate(values)})


def rouge(rows):
    return Scores("zs_rouge", {f"s{i:04d}": {"score": 0.0, "rouge1": a, "rouge2": b, "rougeL": c}
                               for i, (a, b, c) in enumerate(rows)})  # fmt: skip


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(0).beta(2, 3, size=60)
    ours = cell_interval("qasper", scores(values))
    theirs = scipy.stats.bootstrap(
        (values * 100,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.25)  # Monte Carlo error of the ends
    assert ours.high - ours.low > 5
    assert ours.n == 60


def test_geometric_mean_of_means_agrees_with_scipy():
    rows = np.random.default_rng(0).beta(2, 3, size=(40, 3))
    ours = cell_interval("qmsum", rouge(rows))
    theirs = scipy.stats.bootstrap(
        tuple(rows.T), lambda a, b, c: 100 * (a.mean() * b.mean() * c.mean()) ** (1 / 3), paired=True,
        vectorized=False, n_resamples=5_000, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.5)


@pytest.mark.parametrize("metric", ["zs_rouge", "qa_f1"])
def test_vectorised_aggregate_is_the_metrics_own(metric):
    rows = np.random.default_rng(2).random((7, 3))
    names = ("rouge1", "rouge2", "rougeL") if metric == "zs_rouge" else ("score",)
    data = [dict(zip(names, row, strict=False)) for row in rows]
    means = rows[:, : len(names)].mean(0, keepdims=True)
    assert aggregate_means(metric, means, names)[0] == pytest.approx(get_metric(metric).aggregate(data), abs=1e-4)


def test_every_resample_draws_as_many_samples_as_there_are_and_is_reproducible():
    counts = resample_counts("a", 7, 50)
    assert (counts.sum(1) == 7).all()
    assert (counts == resample_counts("a", 7, 50)).all()
    assert (counts != resample_counts("b", 7, 50)).any()


def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(statistics, "N_RESAMPLES", 600)
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        data = scores(generator.beta(2, 2, size=40))
        counts = resample_counts(f"t{trial}", 40, 600)
        interval = statistics.percentile_interval(statistics.bootstrap_scores(data, sorted(data.parts), counts), 40)
        hits += interval.low <= 50.0 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98  # percentile intervals of 40 samples cover a little less than 95 %


def test_one_sample_has_no_interval_and_equal_samples_a_flat_one():
    assert cell_interval("a", scores([0.3])) is None
    assert cell_interval("a", scores([1, 1, 1])).flat
    assert not cell_interval("a", scores([1, 1, 0])).flat


def test_the_average_resamples_within_each_data_set():
    # Two data sets without spread inside: however far apart they are, their mean is certain.
    flat = average_interval({"a": scores([1, 1, 1]), "b": scores([0, 0])})
    assert (flat.low, flat.high, flat.n) == (50.0, 50.0, 5)
    # Independent strata: the variance of the mean of two is a quarter of the sum of variances.
    generator = np.random.default_rng(4)
    a, b = scores(generator.random(50)), scores(generator.random(50))
    widths = [
        i.high - i.low for i in (cell_interval("a", a), cell_interval("b", b), average_interval({"a": a, "b": b}))
    ]
    assert widths[2] == pytest.approx(np.hypot(widths[0], widths[1]) / 2, rel=0.05)
    assert average_interval({"a": a, "b": scores([0.5])}) is None
