"""PyramidKV: its line of budgets against exact fractions, and SnapKV's selection within a layer."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import make_layer

from kvbench.errors import BudgetError
from kvbench.methods.pyramidkv import PyramidKV
from kvbench.reference.scored import budget_line, reference_snapkv


@settings(max_examples=300, deadline=None)
@given(
    n_tokens=st.integers(20, 5000),
    n_layers=st.integers(1, 40),
    budget=st.floats(0.01, 1.0),
    window=st.integers(1, 64),
    beta=st.integers(1, 40),
)
def test_budgets_lie_on_the_line_and_sum_exactly(n_tokens, n_layers, budget, window, beta):
    policy = PyramidKV(budget=budget, observation_tokens=window, beta=beta)
    average = policy.budget_tokens(n_tokens)
    if average <= window:
        with pytest.raises(BudgetError, match="pyramidkv needs at least"):
            policy.layer_budgets(n_tokens, n_layers)
        return
    budgets = policy.layer_budgets(n_tokens, n_layers)
    assert sum(budgets) == n_layers * average
    assert budgets == sorted(budgets, reverse=True)
    assert window <= budgets[-1]
    assert budgets[0] <= n_tokens
    if n_layers > 1:
        line = budget_line(n_tokens, n_layers, average, window, beta)
        assert sum(line) == n_layers * average
        assert all(abs(slots - exact) < 1 for slots, exact in zip(budgets, line, strict=True))
        assert (budgets[0], budgets[-1]) == (line[0], line[-1])


def test_a_pyramid_worked_by_hand():
    # 1000 tokens at 20.8 %: 208 slots, 200 beside the window of 8; the last layer 200 / 20 = 10, the first 390.
    budgets = PyramidKV(budget=0.208).layer_budgets(1000, 5)
    assert budgets == [398, 303, 208, 113, 18]
    assert budget_line(1000, 5, 208, 8, 20) == [Fraction(slots) for slots in budgets]
    assert PyramidKV(budget=0.8).layer_budgets(1000, 3) == [800, 800, 800]
    assert PyramidKV(budget=0.208, beta=1).layer_budgets(1000, 4) == [208] * 4
    assert PyramidKV(budget=0.208).layer_budgets(1000, 1) == [208]
    # 500 of 992 prefix tokens on average: the first layer would get 1000, so it is whole and the last gets what is left
    assert PyramidKV(budget=0.508, beta=1000).layer_budgets(1000, 3) == [1000, 508, 16]


@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97)])
def test_each_layer_keeps_what_snapkv_would(n_query_heads, n_kv_heads, n_tokens):
    policy = PyramidKV(budget=0.4)
    budgets = policy.layer_budgets(n_tokens, 6)
    assert len(set(budgets)) == 6
    for index, slots in enumerate(budgets):
        layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=index, layer_index=index, n_layers=6)
        expected = reference_snapkv(layer.window_attention, n_kv_heads, slots, 8)
        assert policy.compress(layer, slots).positions.tolist() == expected
