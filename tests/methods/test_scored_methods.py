"""Methods that score keys: what their parts do, by hand or for any length; budgets of layers and heads."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import make_layer, relative_rms
from twins import assert_as_twin

from kvbench.errors import BudgetError
from kvbench.methods.adakv import AdaKV
from kvbench.methods.expected_attention import ExpectedAttention
from kvbench.methods.knorm import Knorm
from kvbench.methods.pyramidkv import PyramidKV
from kvbench.methods.snapkv import SnapKV
from kvbench.reference.expected_attention import rope
from kvbench.reference.scored import budget_line, head_budgets, pooled_votes
from kvbench.runtime.requests import Arm


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(20, 90), budget=st.floats(0.2, 1.0), window=st.integers(1, 6),
    kernel=st.sampled_from([1, 3, 9, 41]), heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
)  # fmt: skip
def test_snapkv_is_its_twin_for_any_length_and_window(n_tokens, budget, window, kernel, heads):
    policy = SnapKV(budget=budget, observation_tokens=window, kernel_tokens=kernel)
    m = policy.budget_tokens(n_tokens)
    if m < policy.minimum_tokens:
        with pytest.raises(BudgetError):
            policy.layer_budgets(n_tokens, 2)
        return
    layer = make_layer(*heads, n_tokens, seed=n_tokens, window_tokens=6)
    assert_as_twin(policy, layer, m)


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
    n_tokens=st.integers(20, 5000), n_layers=st.integers(1, 40), budget=st.floats(0.01, 1.0),
    window=st.integers(1, 64), beta=st.integers(1, 40),
)  # fmt: skip
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


@settings(max_examples=60, deadline=None)
@given(
    n_heads=st.integers(1, 5), n_tokens=st.integers(1, 30), share=st.floats(0.0, 1.0),
    alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]), levels=st.integers(1, 50), seed=st.integers(0, 9999),
)  # fmt: skip
def test_slots_are_divided_exactly_even_among_equal_scores(n_heads, n_tokens, share, alpha, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (n_heads, n_tokens), generator=generator).float()
    average = int(share * n_tokens)
    slots = AdaKV(floor_share=alpha).head_slots(scores, average).tolist()
    assert slots == head_budgets(scores.tolist(), average, alpha)
    assert sum(slots) == n_heads * average
    assert all(int(alpha * average + 1e-9) <= n <= n_tokens for n in slots)


def test_the_head_with_the_high_scores_gets_the_slots():
    scores = torch.zeros(3, 20)
    scores[1, :12] = 1.0
    assert AdaKV(floor_share=0.0).head_slots(scores, 4).tolist() == [0, 12, 0]
    # a quarter of 4 slots is certain for everyone; of the other 9, all go where the 12 best scores are
    assert AdaKV(floor_share=0.25).head_slots(scores, 4).tolist() == [1, 10, 1]


def test_adakv_s_needs_window_and_layer_budgets_are_the_base_method_s():
    policy = AdaKV(budget=0.4, base=PyramidKV())
    assert (policy.needs, policy.window_tokens) == (frozenset({"window_attention"}), 8)
    assert policy.layer_budgets(500, 6) == PyramidKV(budget=0.4).layer_budgets(500, 6)
    assert AdaKV(base=Knorm()).needs == frozenset()
    assert Arm.of(AdaKV(budget=0.4, base=Knorm(recent_tokens=3))).key == "adakv@0.4,base=knorm(recent_tokens=3)"
    assert Arm.of(AdaKV(budget=0.4)).key == "adakv@0.4"


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
