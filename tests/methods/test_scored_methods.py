"""Methods that keep the best-scored tokens against their loop twins, and their line of budgets."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import make_layer, relative_rms

from kvbench.errors import BudgetError
from kvbench.methods.knorm import Knorm
from kvbench.methods.pyramidkv import PyramidKV
from kvbench.methods.snapkv import SnapKV
from kvbench.reference.scored import budget_line, pooled_votes, reference_knorm, reference_snapkv

SNAPKV_SHAPES = [(4, 4, 61), (6, 2, 97), (4, 1, 130)]
SNAPKV_OPTIONS = [
    {},
    {"pooling": "avg", "kernel_tokens": 5},
    {"kernel_tokens": 1},
    {"group_reduce": "max"},
    {"group_reduce": "first", "pooling": "avg"},
    {"observation_tokens": 1},
]


def snapkv_reference(policy: SnapKV, layer, m: int) -> list[list[int]]:
    options = (policy.observation_tokens, policy.kernel_tokens, policy.pooling, policy.group_reduce)
    return reference_snapkv(layer.window_attention, layer.n_kv_heads, m, *options)


@pytest.mark.parametrize("options", SNAPKV_OPTIONS, ids=str)
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), SNAPKV_SHAPES)
def test_snapkv_matches_reference(n_query_heads, n_kv_heads, n_tokens, options):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=3)
    policy = SnapKV(budget=0.5, **{"observation_tokens": 16, **options})
    m = policy.layer_budgets(n_tokens, 2)[0]
    compressed = policy.compress(layer, m)
    expected = torch.tensor(snapkv_reference(policy, layer, m))
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
def test_snapkv_matches_reference_for_any_length_and_window(n_tokens, budget, window, kernel, heads):
    policy = SnapKV(budget=budget, observation_tokens=window, kernel_tokens=kernel)
    m = policy.budget_tokens(n_tokens)
    if m < policy.minimum_tokens:
        with pytest.raises(BudgetError):
            policy.layer_budgets(n_tokens, 2)
        return
    layer = make_layer(*heads, n_tokens, seed=n_tokens, window_tokens=6)
    assert policy.compress(layer, m).positions.tolist() == snapkv_reference(policy, layer, m)


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


@pytest.mark.parametrize("recent_tokens", [0, 7])
@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97), (3, 1, 20)])
def test_knorm_matches_reference(n_query_heads, n_kv_heads, n_tokens, correlated, recent_tokens):
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


def test_knorm_whole_layers_are_paid_for_by_the_others():
    budgets = Knorm(budget=0.5, whole_first_layers=2).layer_budgets(100, 7)
    assert budgets == [100, 100, 30, 30, 30, 30, 30]
    assert sum(Knorm(budget=0.5, whole_first_layers=2).layer_budgets(101, 9)) == 9 * 50
