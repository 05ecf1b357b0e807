"""D2O against its loop twin, and its budgets."""

import pytest
import torch
from policy_inputs import make_layer, relative_rms

from kvbench.errors import BudgetError
from kvbench.methods.base import reduce_groups
from kvbench.methods.d2o import D2O
from kvbench.reference.merged import reference_d2o

OPTIONS = [{}, {"start_tokens": 0}, {"recent_share": 0.1}, {"group_reduce": "max"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97), (3, 1, 41)])
def test_matches_reference(n_query_heads, n_kv_heads, n_tokens, correlated, options):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=9, correlated=correlated)
    policy = D2O(**options)
    m = n_tokens // 3
    compressed = policy.compress(layer, m)
    sums = reduce_groups(layer.column_sums, n_kv_heads, policy.group_reduce)
    positions, keys, values = reference_d2o(layer.keys, layer.values, sums, m, policy.start_tokens, policy.recent_share)
    assert compressed.positions.tolist() == positions
    assert relative_rms(compressed.keys, keys) < 1e-6
    assert relative_rms(compressed.values, values) < 1e-6
    dropped = D2O(merge=False, **options).compress(layer, m)
    assert dropped.positions.tolist() == positions
    assert relative_rms(compressed.keys, dropped.keys) > 0.01


def test_a_token_below_the_mean_cosine_is_dropped_and_one_above_is_averaged_by_its_cosine():
    layer = make_layer(1, 1, 6, head_dim=2)
    layer.keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6], [-0.8, 0.6], [0.0, -1.0]]])
    layer.values = torch.arange(6.0).reshape(1, 6, 1).expand(1, 6, 2)
    layer.column_sums = torch.tensor([[9.0, 8.0, 2.0, 1.0, 1.0, 9.0]])
    compressed = D2O(start_tokens=1, recent_share=0.3).compress(layer, 3)
    assert compressed.positions.tolist() == [[0, 1, 5]]
    # nearest cosines: token 2 0.8 (to 1), token 3 0.8 (to 0), token 4 0.6 (to 1); their mean is 0.733
    torch.testing.assert_close(compressed.values[0, :, 0], torch.tensor([(0 + 0.8 * 3) / 2, (1 + 0.8 * 2) / 2, 5.0]))
    torch.testing.assert_close(compressed.keys[0], torch.tensor([[0.82, 0.24], [0.24, 0.82], [0.0, -1.0]]))


def test_whole_layers_are_paid_for_by_the_others():
    budgets = D2O(budget=0.5).layer_budgets(100, 8)
    assert budgets == [100, 100, 20, 20, 20, 20, 20, 100]
    with pytest.raises(BudgetError, match=r"140 slots per KV head; d2o needs 300 for 3 whole layers"):
        D2O(budget=0.35).layer_budgets(100, 4)
