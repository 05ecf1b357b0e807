import math

import pytest
import torch

from kvbench.metrics import fidelity
from kvbench.metrics.fidelity import equal_share, first_divergence, gold_nll, kl_to_full, rouge_l_to_full


def log_probs(tokens, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(3 * torch.randn(tokens, vocabulary, generator=generator), dim=-1)


def slow_kl(full, arm):
    """Sum over the vocabulary of p (log p - log q), one term at a time."""
    return [
        math.fsum(math.exp(p) * (p - q) for p, q in zip(row_p, row_q, strict=True) if p > -math.inf)
        for row_p, row_q in zip(full.tolist(), arm.tolist(), strict=True)
    ]


def test_kl_equals_the_slow_sum():
    full, arm = log_probs(5, 97, 0), log_probs(5, 97, 1)
    result = kl_to_full(full, arm)
    assert result.dtype == torch.float64
    assert result.tolist() == pytest.approx(slow_kl(full, arm), rel=1e-6)
    assert kl_to_full(arm, full).tolist() != pytest.approx(result.tolist(), rel=1e-2)


def test_kl_by_hand():
    full = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    arm = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)]
    assert kl_to_full(full, arm).tolist() == pytest.approx(expected, rel=1e-6)


def test_kl_of_equal_rows_is_zero_and_of_an_excluded_token_infinite():
    full = log_probs(3, 50, 2)
    assert kl_to_full(full, full).tolist() == [0.0, 0.0, 0.0]
    assert (kl_to_full(full, full + 1e-7 * log_probs(3, 50, 3)) >= 0).all()
    assert kl_to_full(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()).item() == math.inf


def test_tiny_divergences_are_resolved():
    # To second order KL = sum p d^2 / 2 for a mean-free perturbation d of the log-probabilities; float32 sums lose it.
    full = log_probs(1, 1000, 4).double()
    step = 1e-4 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mean_free = step - (full.exp() * step).sum()
    expected = (full.exp() * mean_free**2).sum() / 2
    assert kl_to_full(full, full + step).item() == pytest.approx(expected.item(), rel=1e-2)


def test_chunks_change_nothing(monkeypatch):
    full, arm = log_probs(7, 33, 6), log_probs(7, 33, 7)
    whole = kl_to_full(full, arm)
    monkeypatch.setattr(fidelity, "_CHUNK_ELEMENTS", 70)
    assert torch.equal(kl_to_full(full, arm), whole)


def test_gold_nll():
    rows = log_probs(4, 20, 8)
    ids = torch.tensor([3, 0, 19, 7])
    expected = [-rows[row, column].item() for row, column in enumerate(ids.tolist())]
    assert gold_nll(rows, ids).tolist() == expected
    assert gold_nll(rows, ids).dtype == torch.float64


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(3, 5\)"):
        kl_to_full(log_probs(2, 5, 0), log_probs(3, 5, 0))
    with pytest.raises(ValueError, match=r"gold ids of shape \(1,\)"):
        gold_nll(log_probs(2, 5, 0), torch.tensor([1]))


@pytest.mark.parametrize(
    ("first", "second", "divergence", "share"),
    [
        ([], [], None, 1.0),
        ([1, 2, 3], [1, 2, 3], None, 1.0),
        ([1, 2, 3], [1, 9, 3], 1, 2 / 3),
        ([1, 2], [1, 2, 3, 4], 2, 0.5),
        ([], [1], 0, 0.0),
        ([2, 1], [1, 2], 0, 0.0),
    ],
)
def test_token_agreement(first, second, divergence, share):
    for a, b in ((first, second), (second, first)):
        assert first_divergence(a, b) == divergence
        assert equal_share(a, b) == pytest.approx(share)


def test_rouge_l_to_full():
    assert rouge_l_to_full("", "") == 1.0
    assert rouge_l_to_full("the boat", "the boat") == 1.0
    assert rouge_l_to_full("the boat", "a boat") == pytest.approx(0.5, abs=1e-8)
    assert rouge_l_to_full("", "a boat") == 0.0
