"""Which arm is really ahead: paired comparisons of arms, corrected for their number.

A *column* is one data set's scores of several arms. An arm is called *separated* from another only if two tests agree
after Holm's correction over all pairs of the column: the paired bootstrap (is the mean ahead?) and the exact sign test
(is it ahead on more samples?). The bootstrap alone is too quick with the handful of informative samples that a 10-row
data set has.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from kvbench.metrics import get_metric
from kvbench.results.statistics import (
    N_RESAMPLES,
    TIE,
    Column,
    Floats,
    Interval,
    Scores,
    bootstrap_scores,
    percentile_interval,
    resample_counts,
)

ALPHA = 0.05


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
