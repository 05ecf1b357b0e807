"""AdaKV against its loop twin, over several scores; the division of slots among heads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import make_layer

from kvbench.methods.adakv import AdaKV
from kvbench.methods.knorm import Knorm
from kvbench.methods.pyramidkv import PyramidKV
from kvbench.methods.snapkv import SnapKV
from kvbench.reference.scored import head_budgets, reference_adakv
from kvbench.runtime.requests import Arm

BASES = [
    SnapKV(observation_tokens=12),
    SnapKV(observation_tokens=5, pooling="avg"),
    PyramidKV(),
    Knorm(),
    Knorm(recent_tokens=6),
]


@pytest.mark.parametrize("floor_share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97), (3, 1, 80)])
def test_matches_reference(n_query_heads, n_kv_heads, n_tokens, base, floor_share):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=3)
    layer.keys *= torch.linspace(0.5, 2.0, n_kv_heads).reshape(-1, 1, 1)  # heads of different norm
    policy = AdaKV(budget=0.4, base=base, floor_share=floor_share)
    m = policy.layer_budgets(n_tokens, layer.n_layers)[layer.layer_index]
    compressed = policy.compress(layer, m)
    expected = reference_adakv(base.scores(layer).tolist(), m, base.first_tokens, base.last_tokens, floor_share)
    assert compressed.lengths.tolist() == [len(head) for head in expected]
    assert compressed.n_slots == n_kv_heads * m
    for head, positions in enumerate(expected):
        n = len(positions)
        assert compressed.positions[head, :n].tolist() == positions
        assert torch.equal(compressed.keys[head, :n], layer.keys[head, positions])
        assert torch.equal(compressed.values[head, :n], layer.values[head, positions])
    if floor_share == 1.0:
        assert torch.equal(compressed.positions, base.compress(layer, m).positions)


@settings(max_examples=60, deadline=None)
@given(
    n_heads=st.integers(1, 5),
    n_tokens=st.integers(1, 30),
    share=st.floats(0.0, 1.0),
    alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    levels=st.integers(1, 50),
    seed=st.integers(0, 9999),
)
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


def test_needs_window_and_layer_budgets_are_the_base_method_s():
    policy = AdaKV(budget=0.4, base=PyramidKV())
    assert (policy.needs, policy.window_tokens) == (frozenset({"window_attention"}), 8)
    assert policy.layer_budgets(500, 6) == PyramidKV(budget=0.4).layer_budgets(500, 6)
    assert AdaKV(base=Knorm()).needs == frozenset()
    assert Arm.of(AdaKV(budget=0.4, base=Knorm(recent_tokens=3))).key == "adakv@0.4,base=knorm(recent_tokens=3)"
    assert Arm.of(AdaKV(budget=0.4)).key == "adakv@0.4"
