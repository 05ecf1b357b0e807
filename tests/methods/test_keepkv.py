"""KeepKV against its loop twin, and what its votes are for: nothing is lost where keys are equal."""

import pytest
import torch
from policy_inputs import causal_attention, make_layer, relative_rms

from kvbench.methods.keepkv import KeepKV
from kvbench.reference.merged import reference_keepkv

OPTIONS = [
    {},
    {"threshold": 0.5},
    {"threshold": -1.0},
    {"threshold": 1.0},
    {"merge_keys": False},
    {"distance_weight": 3.0, "observation_tokens": 5},
    {"start_tokens": 0, "recent_share": 0.2},
    {"group_reduce": "max"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97), (3, 1, 24)])
def test_matches_reference(n_query_heads, n_kv_heads, n_tokens, options):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=13, correlated=True)
    policy = KeepKV(budget=0.4, **options)
    m = policy.layer_budgets(n_tokens, 2)[0]
    compressed = policy.compress(layer, m)
    reference = reference_keepkv(
        layer.keys,
        layer.values,
        policy.window(layer),
        m,
        n_start=policy.start_tokens,
        recent_share=policy.recent_share,
        T_sim=policy.threshold,
        distance_weight=policy.distance_weight,
        merge_keys=policy.merge_keys,
    )
    keys, values, positions, bias = reference
    assert torch.equal(compressed.positions, positions)
    assert relative_rms(compressed.keys, keys) < 1e-6
    assert relative_rms(compressed.values, values) < 1e-6
    assert relative_rms(compressed.bias, bias) < 1e-6
    merged = int((bias > 0).sum())
    assert (merged > 0) == (policy.threshold < 1.0)


@pytest.mark.parametrize(("group_reduce", "expected"), [("mean", 0.4), ("max", 0.6), ("first", 0.2)])
def test_a_group_s_query_heads_share_one_row(group_reduce, expected):
    layer = make_layer(2, 1, 20)
    layer.window_attention = torch.tensor([0.2, 0.6]).reshape(2, 1, 1).expand(2, 8, 20)
    window = KeepKV(group_reduce=group_reduce, observation_tokens=5).window(layer)
    torch.testing.assert_close(window, torch.full((1, 5, 20), expected))


def test_a_token_s_estimate_counts_only_the_queries_that_see_it():
    layer = make_layer(2, 2, 30, seed=1)
    visible = torch.ones(30, 30).tril()[-8:]
    layer.window_attention = (0.25 * visible).expand(2, 8, 30)
    torch.testing.assert_close(KeepKV(observation_tokens=8).attention_estimates(layer), torch.full((2, 30), 0.25))


def test_merging_equal_keys_loses_nothing():
    generator = torch.Generator().manual_seed(3)
    distinct, queries = torch.randn(2, 9, 16, generator=generator), torch.randn(4, 45, 16, generator=generator)
    layer = make_layer(4, 2, 45, seed=4)
    layer.keys = distinct.repeat(1, 5, 1)
    layer.window_attention = causal_attention(queries, layer.keys)[:, -1:]  # one query: equal keys, equal weights
    policy = KeepKV(budget=0.5, observation_tokens=1)
    compressed = policy.compress(layer, 22)
    kept = [{int(p) % 9 for p in head} for head in compressed.positions]
    assert kept == [set(range(9))] * 2  # an equal key was kept for every evicted one
    assert float(compressed.bias.exp().sum()) == pytest.approx(2 * 45)  # every token has its vote
    probe = torch.randn(2, 7, 16, generator=generator)
    full = torch.softmax(probe @ layer.keys.transpose(1, 2), -1) @ layer.values
    small = torch.softmax(probe @ compressed.keys.transpose(1, 2) + compressed.bias.unsqueeze(1), -1)
    assert relative_rms(small @ compressed.values, full) < 1e-5
