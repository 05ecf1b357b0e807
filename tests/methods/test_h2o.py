"""H2O against its loop twin: selection at the end of the prompt and 50 decoding steps."""

from dataclasses import dataclass

import pytest
import torch
from policy_inputs import make_layer, new_tokens, relative_rms

from kvbench.methods.base import slot_state
from kvbench.methods.h2o import H2O, H2OState
from kvbench.reference.stepped import ReferenceH2O
from kvbench.testing import decode_slots

SHAPES = [(4, 4, 61), (6, 2, 97)]


def reference_for(policy: H2O, layer, m: int) -> ReferenceH2O:
    options = (policy.recent_share, policy.normalise_by_count, policy.group_reduce)
    return ReferenceH2O(layer.keys, layer.values, layer.column_sums, m, *options)


@pytest.mark.parametrize("group_reduce", ["mean", "max", "first"])
@pytest.mark.parametrize("normalise_by_count", [False, True])
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), SHAPES)
def test_prompt_selection_matches_reference(n_query_heads, n_kv_heads, n_tokens, normalise_by_count, group_reduce):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=3)
    policy = H2O(budget=0.35, recent_share=0.4, normalise_by_count=normalise_by_count, group_reduce=group_reduce)
    m = policy.layer_budgets(n_tokens, 2)[0]
    compressed = policy.compress(layer, m)
    keys, values, positions = reference_for(policy, layer, m).stacked()
    assert torch.equal(compressed.positions, positions)
    assert relative_rms(compressed.keys, keys) == 0.0
    assert relative_rms(compressed.values, values) == 0.0
    assert compressed.n_slots == n_kv_heads * m


@dataclass
class Tracked(H2OState):
    positions: torch.Tensor | None = None  # rides along as per-slot state


@pytest.mark.parametrize("options", [{}, {"normalise_by_count": True}, {"group_reduce": "max"}, {"recent_share": 0.2}])
@pytest.mark.parametrize("budget", [0.35, 1.0])
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), SHAPES)
def test_fifty_steps_match_reference(n_query_heads, n_kv_heads, n_tokens, budget, options):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=5)
    layer.column_sums *= 0.1  # as after a short prompt, so that new tokens can become heavy hitters
    policy = H2O(budget=budget, **options)
    m = policy.layer_budgets(n_tokens, 2)[0]
    compressed = policy.compress(layer, m)
    reference = reference_for(policy, layer, m)
    slots, positions = decode_slots(compressed), compressed.positions.clone()
    slots.state = Tracked(slots.state.scores, slots.state.counts, torch.cat([positions, positions[:, :1]], dim=1))
    group = n_query_heads // n_kv_heads
    moved = False
    for step, (key, value, attention) in enumerate(new_tokens(50, n_query_heads, n_kv_heads, m, seed=6)):
        position = n_tokens + step
        slots.step_index.fill_(step)
        slots.keys[:, m], slots.values[:, m] = key, value
        for name, tensor in slot_state(slots.state).items():
            tensor[:, m] = position if name == "positions" else 0
        for h in range(n_kv_heads):
            row = attention[h * group : (h + 1) * group]
            by_position = {int(p): row[:, s].tolist() for s, p in enumerate(slots.state.positions[h])}
            reference.step(h, position, key[h], value[h], by_position)
        before = slots.state.positions[:, : policy.split(m)[0]].clone()
        policy.step(slots, attention)
        moved |= not torch.equal(before, slots.state.positions[:, : policy.split(m)[0]])
        order = slots.state.positions[:, :m].argsort(dim=1)
        keys, values, positions = reference.stacked()
        assert torch.equal(slots.state.positions[:, :m].gather(1, order), positions)
        gather = order.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        assert relative_rms(slots.keys[:, :m].gather(1, gather), keys) == 0.0
        assert relative_rms(slots.values[:, :m].gather(1, gather), values) == 0.0
        assert relative_rms(slots.state.scores[:, :m].gather(1, order), reference.scores()) < 1e-5
    assert moved  # some leaving token became a heavy hitter, so the test saw both branches


def test_recent_share_one_is_a_sliding_window():
    layer = make_layer(2, 2, 40)
    policy = H2O(budget=0.25, recent_share=1.0)
    compressed = policy.compress(layer, 10)
    assert torch.equal(compressed.positions, torch.arange(30, 40).expand(2, -1))
    slots = decode_slots(compressed)
    ((key, value, attention),) = new_tokens(1, 2, 2, 10)
    slots.keys[:, 10], slots.values[:, 10] = key, value
    policy.step(slots, attention)
    assert torch.equal(slots.keys[:, 0], key)
    assert torch.equal(slots.keys[:, 1:10], layer.keys[:, 31:])
