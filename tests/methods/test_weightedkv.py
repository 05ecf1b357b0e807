"""WeightedKV against its loop twin."""

import pytest
import torch
from policy_inputs import make_layer, relative_rms

from kvbench.methods.base import reduce_groups
from kvbench.methods.weightedkv import WeightedKV
from kvbench.reference.merged import reference_weightedkv

OPTIONS = [{}, {"start_tokens": 0}, {"recent_share": 0.1}, {"group_reduce": "max"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("budget", [0.15, 0.5])
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97), (3, 1, 41)])
def test_matches_reference(n_query_heads, n_kv_heads, n_tokens, budget, options):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=6)
    policy = WeightedKV(budget=budget, **options)
    m = policy.layer_budgets(n_tokens, 2)[0]
    compressed = policy.compress(layer, m)
    sums = reduce_groups(layer.column_sums, n_kv_heads, policy.group_reduce)
    positions, values = reference_weightedkv(layer.values, sums, m, policy.start_tokens, policy.recent_share)
    assert compressed.positions.tolist() == positions
    assert relative_rms(compressed.values, values) < 1e-6
    for head, kept in enumerate(positions):
        assert torch.equal(compressed.keys[head], layer.keys[head, kept])  # keys are never mixed
    dropped = WeightedKV(budget=budget, merge=False, **options).compress(layer, m)
    assert dropped.positions.tolist() == positions
    assert relative_rms(compressed.values, dropped.values) > 0.1


def test_values_go_forwards_by_their_weight():
    layer = make_layer(1, 1, 10)
    layer.values = torch.arange(10.0).reshape(1, 10, 1).expand(1, 10, 16)
    layer.column_sums = layer.query_counts * torch.tensor([[1, 1, 1, 1, 1, 3, 9, 1, 2, 1.0]])
    compressed = WeightedKV(budget=0.4, start_tokens=1, recent_share=0.25).compress(layer, 4)
    assert compressed.positions.tolist() == [[0, 5, 6, 9]]
    expected = [0.0, (1 + 2 + 3 + 4 + 3 * 5) / 7, 6.0, (7 + 2 * 8 + 9) / 4]
    torch.testing.assert_close(compressed.values[0, :, 0], torch.tensor(expected))
