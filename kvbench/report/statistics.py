"""How far a score can be trusted: bootstrap intervals, paired comparisons, and which arm is really ahead.

A *column* is one data set's scores of several arms. Samples are resampled with the same draws for all arms, so what is
hard for one is hard for all, and an average over data sets resamples within each data set. Everything is seeded by the
names of the data sets, so the same records always give the same numbers.

An arm is called *separated* from another only if two tests agree after Holm's correction over all pairs of the column:
the paired bootstrap (is the mean ahead?) and the exact sign test (is it ahead on more samples?). The bootstrap alone
is too quick with the handful of informative samples that a 10-row data set has.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from kvbench.metrics import get_metric
from kvbench.metrics.base import BestAnswerMetric
from kvbench.metrics.zeroscrolls import ROUGE_TYPES, GeometricRouge

N_RESAMPLES = 10_000
CONFIDENCE = 0.95
ALPHA = 0.05
TIE = 1e-9  # resampled differences below this are rounding, not differences
SEED = 20_240

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A bootstrap percentile interval.

    Attributes:
        low: lower end on the 0..100 scale.
        high: upper end.
        n: samples behind it.
    """

    low: float
    high: float
    n: int

    @property
    def flat(self) -> bool:
        """Whether all resamples agree (all samples score the same): no evidence of certainty, only of few samples."""
        return self.high - self.low < TIE


@dataclass(frozen=True)
class Comparison:
    """Two arms on the samples both answered.

    Attributes:
        first: arm key.
        second: arm key.
        n: common samples.
        difference: score of `first` minus score of `second` on them, 0..100 scale.
        interval: its paired bootstrap interval; None below 2 samples.
        wins: samples on which `first` scores higher.
        losses: samples on which `second` does.
        p_bootstrap: two-sided p value of the paired bootstrap.
        p_sign: two-sided p value of the exact sign test; ties are left out.
        p_bootstrap_holm: corrected for all pairs of the column.
        p_sign_holm: likewise.
    """

    first: str
    second: str
    n: int
    difference: float
    interval: Interval | None
    wins: int
    losses: int
    p_bootstrap: float
    p_sign: float
    p_bootstrap_holm: float = 1.0
    p_sign_holm: float = 1.0

    @property
    def separated(self) -> bool:
        """Whether both corrected tests reject equality."""
        return max(self.p_bootstrap_holm, self.p_sign_holm) < ALPHA


@dataclass(frozen=True)
class Scores:
    """Scored samples of one arm on one data set.

    Attributes:
        metric: metric name.
        parts: sample id -> the metric's parts.
    """

    metric: str
    parts: Mapping[str, Mapping[str, float]]

    def matrix(self, samples: Sequence[str]) -> Floats:
        """`(samples, parts)`: what has to be averaged before the metric joins it."""
        names = part_names(self.metric, self.parts[samples[0]])
        return np.array([[self.parts[sample][name] for name in names] for sample in samples], dtype=np.float64)


Column = Mapping[str, Scores]  # arm key -> its scores on one data set


def part_names(metric: str, parts: Mapping[str, float]) -> tuple[str, ...]:
    """The parts whose means make the metric's aggregate, in the order `aggregate_means` expects."""
    kind = get_metric(metric)
    if isinstance(kind, GeometricRouge):
        return ROUGE_TYPES
    return ("score",) if isinstance(kind, BestAnswerMetric) else tuple(sorted(parts))


def aggregate_means(metric: str, means: Floats, names: Sequence[str]) -> Floats:
    """The metric's aggregate of many data sets at once, each given by its parts' means.

    Args:
        metric: metric name.
        means: `(resamples, parts)` means in [0, 1].
        names: the parts' names.

    Returns:
        `(resamples,)` on the 0..100 scale. A metric of another kind is asked one data set at a time, which is right as
        long as its aggregate depends on the means alone.
    """
    kind = get_metric(metric)
    if isinstance(kind, GeometricRouge):
        return 100.0 * np.prod(means, axis=1) ** (1.0 / means.shape[1])
    if isinstance(kind, BestAnswerMetric):
        return 100.0 * means[:, 0]
    rows = (dict(zip(names, row, strict=True)) for row in means.tolist())
    return np.array([kind.aggregate([row]) for row in rows], dtype=np.float64)


def resample_counts(dataset: str, n_samples: int, n_resamples: int = N_RESAMPLES) -> Floats:
    """How often each sample is drawn in each resample.

    Args:
        dataset: name of the data set; seeds the draws together with `n_samples`.
        n_samples: samples to draw from and to draw.
        n_resamples: number of resamples.

    Returns:
        `(resamples, samples)` counts; every row sums to `n_samples`.
    """
    generator = np.random.default_rng([SEED, zlib.crc32(dataset.encode()), n_samples])
    drawn = generator.integers(0, n_samples, size=(n_resamples, n_samples))
    drawn += np.arange(n_resamples)[:, None] * n_samples
    counts = np.bincount(drawn.ravel(), minlength=n_resamples * n_samples)
    return counts.reshape(n_resamples, n_samples).astype(np.float64)


def bootstrap_scores(scores: Scores, samples: Sequence[str], counts: Floats) -> Floats:
    """The data set's score in every resample, `(resamples,)` on the 0..100 scale."""
    means = counts @ scores.matrix(samples) / len(samples)
    return aggregate_means(scores.metric, means, part_names(scores.metric, scores.parts[samples[0]]))


def percentile_interval(values: Floats, n: int) -> Interval | None:
    """The central `CONFIDENCE` share of bootstrap values; None below 2 samples, which say nothing about spread."""
    if n < 2:
        return None
    tail = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return Interval(float(low), float(high), n)


def cell_interval(dataset: str, scores: Scores) -> Interval | None:
    """Interval of one arm's score on one data set."""
    samples = sorted(scores.parts)
    if len(samples) < 2:
        return None
    return percentile_interval(bootstrap_scores(scores, samples, resample_counts(dataset, len(samples))), len(samples))


def average_interval(columns: Mapping[str, Scores]) -> Interval | None:
    """Interval of one arm's unweighted mean over data sets, resampling within each of them.

    Args:
        columns: data set -> the arm's scores.

    Returns:
        The interval; None if a data set has fewer than 2 samples, as its spread is then unknown.
    """
    if not columns or any(len(scores.parts) < 2 for scores in columns.values()):
        return None
    total = np.zeros(N_RESAMPLES)
    for dataset, scores in sorted(columns.items()):
        samples = sorted(scores.parts)
        total += bootstrap_scores(scores, samples, resample_counts(dataset, len(samples)))
    return percentile_interval(total / len(columns), sum(len(scores.parts) for scores in columns.values()))


def compare_arms(columns: Mapping[str, Column]) -> list[Comparison]:
    """All pairs of arms over one or more data sets, Holm-corrected for the number of pairs.

    Args:
        columns: data set -> arm key -> scores. With several data sets the difference is that of the unweighted means,
            and only arms present in all of them are compared.

    Returns:
        One comparison per pair that shares samples in every data set, in sorted order of the arm keys.
    """
    if not columns:
        return []
    arms = sorted(set.intersection(*(set(column) for column in columns.values())))
    counts: dict[tuple[str, int], Floats] = {}
    cache: dict[tuple[str, str, tuple[str, ...]], Floats] = {}

    def resampled(dataset: str, arm: str, samples: tuple[str, ...]) -> Floats:
        key = (dataset, arm, samples)
        if key not in cache:
            drawn = (dataset, len(samples))
            if drawn not in counts:
                counts[drawn] = resample_counts(dataset, len(samples))
            cache[key] = bootstrap_scores(columns[dataset][arm], samples, counts[drawn])
        return cache[key]

    found = []
    for first, second in itertools.combinations(arms, 2):
        difference, wins, losses, n = 0.0, 0, 0, 0
        values = np.zeros(N_RESAMPLES)
        for dataset, column in sorted(columns.items()):
            a, b = column[first], column[second]
            samples = tuple(sorted(set(a.parts) & set(b.parts)))
            if not samples or a.metric != b.metric:
                break
            values += resampled(dataset, first, samples) - resampled(dataset, second, samples)
            difference += _score(a, samples) - _score(b, samples)
            single = np.array([a.parts[s]["score"] - b.parts[s]["score"] for s in samples])
            wins, losses, n = wins + int((single > TIE).sum()), losses + int((single < -TIE).sum()), n + len(samples)
        else:
            values /= len(columns)
            found.append(
                Comparison(
                    first, second, n, difference / len(columns), percentile_interval(values, n), wins, losses,
                    _bootstrap_p(values, n), sign_test(wins, losses),
                )
            )  # fmt: skip
    return _corrected(found)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided sign test; 1 if there is nothing but ties."""
    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979), in the order given."""
    corrected = [1.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def best_arm(scores: Mapping[str, float], comparisons: Sequence[Comparison]) -> str | None:
    """The arm with the highest score, if it is separated from every other contestant; else None.

    Args:
        scores: contestants -> score.
        comparisons: comparisons of the column (more arms may be in it).
    """
    if len(scores) < 2:
        return None
    best = max(sorted(scores), key=lambda arm: scores[arm])
    separated = {frozenset((c.first, c.second)) for c in comparisons if c.separated}
    return best if all(frozenset((best, other)) in separated for other in scores if other != best) else None


def _score(scores: Scores, samples: Sequence[str]) -> float:
    return get_metric(scores.metric).aggregate([scores.parts[sample] for sample in samples])


def _bootstrap_p(values: Floats, n: int) -> float:
    """Twice the smaller share of resampled differences on one side of zero; ties count for both sides."""
    if n < 2:
        return 1.0
    at_most, at_least = int((values <= TIE).sum()), int((values >= -TIE).sum())
    return min(1.0, 2.0 * (min(at_most, at_least) + 1) / (len(values) + 1))


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    bootstrap = holm([c.p_bootstrap for c in comparisons])
    sign = holm([c.p_sign for c in comparisons])
    return [
        Comparison(**{**vars(c), "p_bootstrap_holm": b, "p_sign_holm": s})
        for c, b, s in zip(comparisons, bootstrap, sign, strict=True)
    ]
