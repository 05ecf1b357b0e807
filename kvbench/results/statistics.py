"""Statistics of scores: bootstrap intervals of cells and of averages over data sets.

Samples are resampled with the same draws for all arms, so what is hard for one is hard for all, and an average over
data sets resamples within each data set. Everything is seeded by the names of the data sets, so the same records always
give the same numbers. Comparisons of arms are in `comparisons.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbench.metrics import get_metric
from kvbench.metrics.base import BestAnswerMetric
from kvbench.metrics.zeroscrolls import ROUGE_TYPES, GeometricRouge

N_RESAMPLES = 10_000
CONFIDENCE = 0.95
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
