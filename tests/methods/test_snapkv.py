"""SnapKV against its loop twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import make_layer, relative_rms

from kvbench.errors import BudgetError
from kvbench.methods.snapkv import SnapKV
from kvbench.reference.scored import pooled_votes, reference_snapkv

SHAPES = [(4, 4, 61), (6, 2, 97), (4, 1, 130)]
OPTIONS = [
    {},
    {"pooling": "avg", "kernel_tokens": 5},
    {"kernel_tokens": 1},
    {"group_reduce": "max"},
    {"group_reduce": "first", "pooling": "avg"},
    {"observation_tokens": 1},
]


def reference_for(policy: SnapKV, layer, m: int) -> list[list[int]]:
    return reference_snapkv(
        layer.window_attention,
        layer.n_kv_heads,
        m,
        policy.observation_tokens,
        policy.kernel_tokens,
        policy.pooling,
        policy.group_reduce,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), SHAPES)
def test_matches_reference(n_query_heads, n_kv_heads, n_tokens, options):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=3)
    policy = SnapKV(budget=0.5, **{"observation_tokens": 16, **options})
    m = policy.layer_budgets(n_tokens, 2)[0]
    compressed = policy.compress(layer, m)
    expected = torch.tensor(reference_for(policy, layer, m))
    assert torch.equal(compressed.positions, expected)
    for head, positions in enumerate(expected):
        assert torch.equal(compressed.keys[head], layer.keys[head, positions])
        assert torch.equal(compressed.values[head], layer.values[head, positions])


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(20, 90),
    budget=st.floats(0.2, 1.0),
    window=st.integers(1, 6),
    kernel=st.sampled_from([1, 3, 9, 41]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
)
def test_matches_reference_for_any_length_and_window(n_tokens, budget, window, kernel, heads):
    policy = SnapKV(budget=budget, observation_tokens=window, kernel_tokens=kernel)
    m = policy.budget_tokens(n_tokens)
    if m < policy.minimum_tokens:
        with pytest.raises(BudgetError):
            policy.layer_budgets(n_tokens, 2)
        return
    layer = make_layer(*heads, n_tokens, seed=n_tokens, window_tokens=6)
    assert policy.compress(layer, m).positions.tolist() == reference_for(policy, layer, m)


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_scores_match_the_pooled_votes(pooling):
    layer = make_layer(6, 2, 80, seed=4)
    scores = SnapKV(pooling=pooling, observation_tokens=20).scores(layer)
    expected = torch.tensor(pooled_votes(layer.window_attention, 2, 20, 7, pooling))
    assert relative_rms(scores[:, :60], expected) < 1e-6


def test_a_looked_at_token_brings_its_neighbours():
    layer = make_layer(2, 2, 60)
    layer.window_attention = torch.full((2, 4, 60), 1e-3)
    layer.window_attention[:, :, 25] = 1.0
    compressed = SnapKV(budget=0.2, observation_tokens=4, kernel_tokens=7).compress(layer, 12)
    assert compressed.positions[0].tolist() == [22, 23, 24, 25, 26, 27, 28, 55, 56, 57, 58, 59]
