"""The paper's claim that a fixed threshold's ratio is "independent of the data set, persistent per model", as a test.

Ratios of all samples and layers are split into sums of squares: between models, between a model's layers, between data
sets (the part of a layer's ratio that moves with the data set), and between samples of one data set. If the claim
holds, the data sets' share is no larger than relabelling the samples at random makes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_PERMUTATIONS = 2000
SEED = 20_241


@dataclass(frozen=True)
class VarianceShares:
    """Shares of the total sum of squares; they sum to 1.

    Attributes:
        models: between models.
        layers: between the layers of a model.
        datasets: between data sets, within layers.
        samples: between samples of a data set, within layers.
        p_datasets: share of random relabellings of a model's samples whose data sets differ at least as much.
        max_range: largest range of a layer's data set means, in ratio units.
    """

    models: float
    layers: float
    datasets: float
    samples: float
    p_datasets: float
    max_range: float


def variance_shares(ratios: dict[str, tuple[NDArray[np.float64], list[str]]]) -> VarianceShares:
    """Split the variance of per-layer ratios.

    Args:
        ratios: model -> (`(samples, layers)` ratios, data set of each sample).

    Returns:
        The shares; `p_datasets` is 1 if no model has two data sets.
    """
    every = np.concatenate([values.ravel() for values, _ in ratios.values()])
    grand, total = every.mean(), float(((every - every.mean()) ** 2).sum())
    between_models = sum(values.size * (values.mean() - grand) ** 2 for values, _ in ratios.values())
    between_layers = sum(
        len(values) * float(((values.mean(0) - values.mean()) ** 2).sum()) for values, _ in ratios.values()
    )
    observed = sum(float(_between(values, _codes(labels)[None])[0]) for values, labels in ratios.values())
    generator = np.random.default_rng(SEED)
    shuffled = np.zeros(N_PERMUTATIONS)
    for values, labels in ratios.values():
        shuffled += _between(values, generator.permuted(np.tile(_codes(labels), (N_PERMUTATIONS, 1)), axis=1))
    exceeded = int((shuffled >= observed - 1e-12).sum())
    ranges = [float(np.ptp(_means(values, labels), axis=0).max()) for values, labels in ratios.values()]
    scale = total or 1.0
    return VarianceShares(
        models=float(between_models) / scale,
        layers=between_layers / scale,
        datasets=observed / scale,
        samples=(total - float(between_models) - between_layers - observed) / scale,
        p_datasets=(exceeded + 1) / (N_PERMUTATIONS + 1),
        max_range=max(ranges),
    )


def _means(values: NDArray[np.float64], labels: list[str]) -> NDArray[np.float64]:
    names = np.array(labels)
    return np.stack([values[names == name].mean(0) for name in sorted(set(labels))])


def _codes(labels: list[str]) -> NDArray[np.int64]:
    """The labels as numbers from 0."""
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _between(values: NDArray[np.float64], codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum of squares between the data sets' means, layer by layer and summed.

    Args:
        values: `(samples, layers)`.
        codes: `(labellings, samples)` data set of each sample, from 0; all labellings have the same sizes.

    Returns:
        `(labellings,)`.
    """
    centred = values - values.mean(0)
    total = np.zeros(len(codes))
    for code in np.unique(codes[0]):
        members = (codes == code).astype(np.float64)
        total += ((members @ centred) ** 2).sum(1) / members[0].sum()
    return total
