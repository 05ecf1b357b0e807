"""Statistics of scores: bootstrap intervals, and which arm is really ahead.

Samples are resampled with the same draws for all arms, so what is hard for one is hard for all, and an average over
data sets resamples within each of them. Data sets' names seed the draws: the same records, the same numbers.

An arm is called *separated* from another only if two tests agree after Holm's correction over all pairs of a column:
the paired bootstrap (is the mean ahead?) and the exact sign test (is it ahead on more samples?). The bootstrap alone is
too quick with the handful of informative samples that a 10-row data set has.

The KL divergence to the full cache goes the same way, as one more measure: `Scores(KL, ...)`, in nats, lower is better.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, norm

from kvbench.metrics import get_metric

N_RESAMPLES = 10_000
CONFIDENCE = 0.95
ALPHA = 0.05
TIE = 1e-9  # resampled differences below this are rounding, not differences
SEED = 20_240
KL = "kl"
Floats = NDArray[np.float64]


class _Mean:
    """The mean of what is no metric, on its own scale; what is averaged is called "score" as everywhere."""

    averaged_parts = ("score",)
    scale = 1.0

    def aggregate(self, rows: Sequence[Mapping[str, float]]) -> float:
        return sum(row["score"] for row in rows) / len(rows)


def _measure(name: str) -> Any:
    return _Mean() if name == KL else get_metric(name)


class Interval(NamedTuple):
    """The ends of a bootstrap percentile interval, on the scale of what is measured."""

    low: float
    high: float

    @property
    def flat(self) -> bool:
        """Whether all resamples agree (all samples score the same): no evidence of certainty, only of few samples."""
        return self.high - self.low < TIE


@dataclass(frozen=True, eq=False)
class Scores:
    """One arm's scored samples of a data set: the name of the metric (or `KL`), and its parts by sample id."""

    metric: str
    parts: Mapping[str, Mapping[str, float]]

    def aggregate(self, samples: Sequence[str]) -> float:
        """The metric's score of some samples, 0..100 (nats for `KL`)."""
        value: float = _measure(self.metric).aggregate([self.parts[sample] for sample in samples])
        return value


@dataclass(frozen=True)
class Comparison:
    """Two arms on the samples both answered; p values are two-sided, corrected ones for all pairs of the column."""

    first: str
    second: str
    n: int  # common samples
    difference: float  # score of `first` minus score of `second` on them, 0..100 scale (KL: nats)
    interval: Interval | None  # its paired bootstrap interval; None where a data set has below 2 samples
    wins: int  # samples on which `first` scores higher; `losses`: lower
    losses: int
    p_bootstrap: float
    p_sign: float  # ties are left out
    p_bootstrap_holm: float = 1.0
    p_sign_holm: float = 1.0

    @property
    def separated(self) -> bool:
        """Whether both corrected tests reject equality."""
        return max(self.p_bootstrap_holm, self.p_sign_holm) < ALPHA

    def turned(self) -> Comparison:
        """The same with the other arm first."""
        interval = None if self.interval is None else Interval(0.0 - self.interval.high, 0.0 - self.interval.low)
        return replace(
            self, first=self.second, second=self.first, difference=0.0 - self.difference, interval=interval,
            wins=self.losses, losses=self.wins,
        )  # fmt: skip


@lru_cache(maxsize=2048)
def bootstrap_scores(dataset: str, scores: Scores, samples: tuple[str, ...]) -> Floats:
    """The data set's score in every resample of some samples, `(resamples,)` on its scale.

    A metric that names its `averaged_parts` is computed for all resamples at once; another is asked one resample at a
    time, which is right as long as its aggregate depends on the means of its parts alone.
    """
    metric = _measure(scores.metric)
    averaged = getattr(metric, "averaged_parts", ())
    names = averaged or tuple(sorted(scores.parts[samples[0]]))

    def aggregate(*parts: Floats, axis: int) -> Floats:
        means = np.stack([part.mean(axis) for part in parts], axis=-1)
        if averaged:
            return getattr(metric, "scale", 100.0) * np.prod(means, axis=-1) ** (1.0 / len(names))
        rows = [dict(zip(names, row, strict=True)) for row in np.atleast_2d(means).tolist()]
        return np.array([metric.aggregate([row]) for row in rows]).reshape(means.shape[:-1])

    parts = tuple(np.array([scores.parts[sample][name] for sample in samples], dtype=np.float64) for name in names)
    if len(samples) < 2:  # scipy refuses what has no spread
        return np.full(N_RESAMPLES, aggregate(*parts, axis=-1))
    seed = np.random.default_rng([SEED, zlib.crc32(dataset.encode(errors="backslashreplace")), len(samples)])
    found = bootstrap(parts, aggregate, paired=True, n_resamples=N_RESAMPLES, method="percentile", rng=seed)
    return np.asarray(found.bootstrap_distribution)


def percentile_interval(values: Floats, n: float) -> Interval | None:
    """The central `CONFIDENCE` share of bootstrap values; None below 2 samples, which say nothing about spread."""
    if n < 2:
        return None
    tail = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return Interval(float(low), float(high))


def mean_interval(values: Floats) -> Interval | None:
    """Interval of a mean over samples; None below 2 of them."""
    if len(values) < 2:
        return None
    rng = np.random.default_rng([SEED, len(values)])
    found = bootstrap((values,), np.mean, n_resamples=N_RESAMPLES, method="percentile", rng=rng)
    return percentile_interval(np.asarray(found.bootstrap_distribution), len(values))


def score_interval(columns: Mapping[str, Scores]) -> Interval | None:
    """Interval of one arm's score by data set, over several that of their unweighted mean; None if one has 1 sample."""
    if not columns or any(len(scores.parts) < 2 for scores in columns.values()):
        return None
    total = np.zeros(N_RESAMPLES)
    for dataset, scores in sorted(columns.items()):
        total += bootstrap_scores(dataset, scores, tuple(sorted(scores.parts)))
    return percentile_interval(total / len(columns), 2)


def compare_arms(
    columns: Mapping[str, Mapping[str, Scores]], contests: Iterable[Iterable[str]] | None = None
) -> list[Comparison]:
    """All pairs of arms that share samples in every data set (data set -> arm key -> scores), in sorted order.

    With `contests` only pairs inside one of them. Over several data sets the difference is that of the unweighted
    means, and a data set of one sample, which says nothing about spread, leaves all equal. Holm's correction counts
    the pairs.
    """
    found = []
    arms = set.intersection(*map(set, columns.values())) if columns else set()
    groups = [sorted(arms.intersection(contest)) for contest in ((arms,) if contests is None else contests)]
    for first, second in itertools.chain.from_iterable(itertools.combinations(group, 2) for group in groups):
        difference, wins, losses, n, least = 0.0, 0, 0, 0, math.inf
        values = np.zeros(N_RESAMPLES)
        for dataset, column in sorted(columns.items()):
            a, b = column[first], column[second]
            samples = tuple(sorted(set(a.parts) & set(b.parts)))
            if not samples or a.metric != b.metric:
                break
            values += bootstrap_scores(dataset, a, samples) - bootstrap_scores(dataset, b, samples)
            difference += a.aggregate(samples) - b.aggregate(samples)
            single = np.array([a.parts[s]["score"] - b.parts[s]["score"] for s in samples])
            wins, losses, n = wins + int((single > TIE).sum()), losses + int((single < -TIE).sum()), n + len(samples)
            least = min(least, len(samples))
        else:
            values, difference = values / len(columns), difference / len(columns)
            interval = percentile_interval(values, least)
            tests = _bootstrap_p(values, least), sign_test(wins, losses)
            found.append(Comparison(first, second, n, difference, interval, wins, losses, *tests))
    corrected = zip(found, holm([c.p_bootstrap for c in found]), holm([c.p_sign for c in found]), strict=True)
    return [replace(comparison, p_bootstrap_holm=b, p_sign_holm=s) for comparison, b, s in corrected]


def best_arm(scores: Mapping[str, float], comparisons: Sequence[Comparison]) -> str | None:
    """The contestant (arm key -> score) with the highest score, if it is separated from every other; else None."""
    if len(scores) < 2:
        return None
    best = max(sorted(scores), key=lambda arm: scores[arm])
    separated = {frozenset((c.first, c.second)) for c in comparisons if c.separated}
    return best if all(frozenset((best, other)) in separated for other in scores if other != best) else None


def against(arm: str | None, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons that one arm takes part in, turned so that it is `first`."""
    return [c if c.first == arm else c.turned() for c in comparisons if arm in (c.first, c.second)]


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided sign test; 1 if there is nothing but ties."""
    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.array(p_values)[order] * (len(p_values) - np.arange(len(p_values)))
    return np.maximum.accumulate(np.minimum(stepped, 1.0))[np.argsort(order)].tolist()


def _bootstrap_p(values: Floats, n: float) -> float:
    """Twice the smaller share of resampled differences on one side of zero; ties count for both sides.

    Where no resample is there, 10,000 of them cannot say how small the share is, and Holm's correction over more than
    250 pairs would let nothing pass: then the tail of the normal distribution of their mean and spread, if smaller.
    """
    if n < 2:
        return 1.0
    at_most, at_least = int((values <= TIE).sum()), int((values >= -TIE).sum())
    share = min(at_most, at_least)
    p = min(1.0, 2.0 * (share + 1) / (len(values) + 1))
    spread = float(values.std())
    return min(p, 2.0 * float(norm.sf(abs(float(values.mean())) / spread))) if share == 0 and spread > TIE else p
