"""The variance test on data whose answer is known."""

import numpy as np
import pytest

from kvbench.results import analysis_variance as variance
from kvbench.results.analysis_variance import variance_shares


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(variance, "N_PERMUTATIONS", 300)


LABELS = ["a"] * 10 + ["b"] * 10
PROFILE = np.array([0.2, 0.5, 0.8, 0.4])


def noise(scale, seed=0):
    return np.random.default_rng(seed).normal(0, scale, (20, 4))


def test_the_claim_holds_where_only_layers_differ():
    shares = variance_shares({"m": (PROFILE + noise(0.01), LABELS)})
    assert shares.layers > 0.95
    assert shares.p_datasets > 0.05
    assert shares.max_range < 0.02


def test_the_claim_fails_where_data_sets_differ():
    shifted = PROFILE + noise(0.01)
    shifted[10:] += 0.1
    shares = variance_shares({"m": (shifted, LABELS)})
    assert shares.p_datasets < 0.01
    assert shares.max_range == pytest.approx(0.1, abs=0.02)
    assert 0.02 < shares.datasets < 0.2


def test_shares_sum_to_one_and_match_a_plain_decomposition():
    data = {"m": (PROFILE + noise(0.05), LABELS), "n": (PROFILE[::-1] + 0.3 + noise(0.05, 1), LABELS)}
    shares = variance_shares(data)
    assert shares.models + shares.layers + shares.datasets + shares.samples == pytest.approx(1.0)
    within = total = 0.0
    grand = np.concatenate([v.ravel() for v, _ in data.values()]).mean()
    for values, labels in data.values():
        total += ((values - grand) ** 2).sum()
        for layer in range(4):
            for name in "ab":
                cell = np.array([values[i, layer] for i in range(20) if labels[i] == name])
                within += ((cell - cell.mean()) ** 2).sum()
    assert shares.samples == pytest.approx(within / total)


def test_one_data_set_is_no_evidence():
    assert variance_shares({"m": (PROFILE + noise(0.01), ["a"] * 20)}).p_datasets == 1.0
