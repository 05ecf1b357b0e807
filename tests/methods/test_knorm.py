"""Knorm against its loop twin."""

import pytest
import torch
from policy_inputs import make_layer

from kvbench.methods.knorm import Knorm
from kvbench.reference.scored import reference_knorm


@pytest.mark.parametrize("recent_tokens", [0, 7])
@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97), (3, 1, 20)])
def test_matches_reference(n_query_heads, n_kv_heads, n_tokens, correlated, recent_tokens):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=2, correlated=correlated)
    policy = Knorm(budget=0.4, recent_tokens=recent_tokens)
    m = policy.layer_budgets(n_tokens, 2)[0]
    compressed = policy.compress(layer, m)
    expected = reference_knorm(layer.keys, m, recent_tokens)
    assert compressed.positions.tolist() == expected
    for head, positions in enumerate(expected):
        assert torch.equal(compressed.keys[head], layer.keys[head, positions])
        assert torch.equal(compressed.values[head], layer.values[head, positions])


def test_the_smallest_keys_stay():
    layer = make_layer(1, 1, 10)
    layer.keys = torch.arange(10.0, 0.0, -1.0).reshape(1, 10, 1).expand(1, 10, 16)
    assert Knorm(budget=0.3).compress(layer, 3).positions.tolist() == [[7, 8, 9]]
    layer.keys = -layer.keys.flip(1)
    assert Knorm(budget=0.3).compress(layer, 3).positions.tolist() == [[0, 1, 2]]


def test_whole_layers_are_paid_for_by_the_others():
    budgets = Knorm(budget=0.5, whole_first_layers=2).layer_budgets(100, 7)
    assert budgets == [100, 100, 30, 30, 30, 30, 30]
    assert sum(Knorm(budget=0.5, whole_first_layers=2).layer_budgets(101, 9)) == 9 * 50
