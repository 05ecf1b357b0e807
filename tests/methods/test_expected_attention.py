"""ExpectedAttention against its loop twin, over whole and partial rotary embeddings."""

import pytest
import torch
from policy_inputs import make_layer, relative_rms

from kvbench.methods.adakv import AdaKV
from kvbench.methods.expected_attention import ExpectedAttention, turn
from kvbench.reference.expected_attention import reference_scores, rope
from kvbench.reference.scored import keep_best, reference_adakv

OPTIONS = [
    {},
    {"use_covariance": False},
    {"use_value_norm": False},
    {"epsilon": 0.05},
    {"start_tokens": 0, "future_tokens": 1},
    {"start_tokens": 9},
]


def reference_for(policy: ExpectedAttention, layer) -> torch.Tensor:
    extras = layer.extras
    return reference_scores(
        extras["queries"], layer.keys, layer.values, extras["rotary_frequencies"], float(extras["scaling"]),
        n_future=policy.future_tokens, n_sink=policy.start_tokens, use_covariance=policy.use_covariance,
        use_vnorm=policy.use_value_norm, epsilon=policy.epsilon,
    )  # fmt: skip


@pytest.mark.parametrize("turning_pairs", [4, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 31), (6, 2, 47)])
def test_matches_reference(n_query_heads, n_kv_heads, n_tokens, options, turning_pairs):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=5, head_dim=8)
    layer.extras["queries"] = layer.extras["queries"] + 1.5  # a mean, so that the rotation of the mean matters
    layer.extras["rotary_frequencies"] = layer.extras["rotary_frequencies"][:turning_pairs]
    policy = ExpectedAttention(budget=0.4, **{"future_tokens": 20, **options})
    expected = reference_for(policy, layer)
    scores = policy.scores(layer)
    assert relative_rms(scores[:, policy.start_tokens :], expected) < 1e-5
    m = policy.layer_budgets(n_tokens, 2)[0]
    padded = [[0.0] * policy.start_tokens + head for head in expected.tolist()]
    compressed = policy.compress(layer, m)
    assert compressed.positions.tolist() == keep_best(padded, n_tokens, m, policy.start_tokens, 0)
    ragged = AdaKV(budget=0.4, base=policy).compress(layer, m)
    kept = reference_adakv(padded, m, policy.start_tokens, 0)
    assert ragged.lengths.tolist() == [len(head) for head in kept]
    assert [ragged.positions[h, : len(head)].tolist() for h, head in enumerate(kept)] == kept


def test_the_expected_logit_is_the_mean_over_gaussian_queries():
    """With one future position the formula is log E[exp(q.k)] of Gaussian queries: sampled, it comes out the same."""
    layer = make_layer(1, 1, 4000, seed=2, head_dim=4)
    layer.keys = layer.keys[:, :20].repeat(1, 200, 1) / 2
    layer.values = torch.ones_like(layer.values)
    policy = ExpectedAttention(future_tokens=1, start_tokens=0)
    scores = policy.scores(layer)[0, :20]
    frequencies, scaling = layer.extras["rotary_frequencies"], layer.extras["scaling"]
    before = torch.stack([rope(q, -t, frequencies) for t, q in enumerate(layer.extras["queries"][0])])
    coming = torch.stack([rope(q, 4000, frequencies) for q in before])
    sampled = (coming @ layer.keys[0, :20].T * scaling).exp().mean(0)
    assert relative_rms(scores / scores.sum(), sampled / sampled.sum()) < 0.01


def test_turning_back_and_forth_changes_nothing():
    layer = make_layer(3, 3, 50)
    angles = torch.arange(50).unsqueeze(-1) * layer.extras["rotary_frequencies"][:6]
    back = turn(turn(layer.keys, angles.cos(), angles.sin()), angles.cos(), -angles.sin())
    assert relative_rms(back, layer.keys) < 1e-6
    assert torch.equal(back[..., 12:], layer.keys[..., 12:])
