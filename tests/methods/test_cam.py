"""CaM against its loop twin over 50 decoding steps, and its gate."""

import pytest
import torch
from policy_inputs import make_layer, new_tokens, relative_rms

from kvbench.methods.cam import CaM
from kvbench.ops.counter_rng import counter_hash, counter_uniform
from kvbench.reference.stepped import ReferenceCaM
from kvbench.testing import decode_slots

SHAPES = [(4, 4, 61), (6, 2, 97)]


def run_both(policy: CaM, layer, merges: list[bool], n_steps: int = 50):
    """Yield (slots, order of the slots by position, reference) after every step; `merges` collects the gates."""
    n_query_heads, n_kv_heads, n_tokens = layer.n_query_heads, layer.n_kv_heads, layer.n_tokens
    m = policy.layer_budgets(n_tokens, 2)[0]
    compressed = policy.compress(layer, m)
    reference = ReferenceCaM(
        layer.keys, layer.values, layer.column_sums, m, policy.start_share, policy.merge_tokens, policy.merge
    )
    slots, group = decode_slots(compressed), n_query_heads // n_kv_heads
    start, recent = policy.split(m)
    slot_positions = compressed.positions[0].tolist()
    for step, (key, value, attention) in enumerate(new_tokens(n_steps, n_query_heads, n_kv_heads, m, seed=6)):
        position = n_tokens + step
        slots.step_index.fill_(step)
        slots.keys[:, m], slots.values[:, m], slots.state.scores[:, m] = key, value, 0
        for h in range(n_kv_heads):
            row = attention[h * group : (h + 1) * group]
            by_position = {p: row[:, s].tolist() for s, p in enumerate([*slot_positions, position])}
            draw = float(counter_uniform(counter_hash(layer.seed, layer.layer_index), h, step))
            merges.append(reference.step(h, position, key[h], value[h], by_position, lambda u=draw: u))
        policy.step(slots, attention)
        slot_positions[start + step % recent] = position
        order = torch.tensor(slot_positions).argsort()
        yield slots, order, reference


@pytest.mark.parametrize("options", [{}, {"merge_tokens": 3}, {"merge": False}, {"start_share": 0.1}])
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), SHAPES)
def test_fifty_steps_match_reference(n_query_heads, n_kv_heads, n_tokens, options):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=8)
    policy = CaM(budget=0.35, **options)
    merges: list[bool] = []
    for slots, order, reference in run_both(policy, layer, merges):
        keys, values, _ = reference.stacked()
        assert relative_rms(slots.keys[:, order], keys) == 0.0
        assert relative_rms(slots.values[:, order], values) < 1e-6
        assert relative_rms(slots.state.scores[:, order], reference.scores()) < 1e-5
    assert any(merges) == policy.merge
    assert not all(merges)  # the gate closed at least once


def test_prompt_keeps_start_and_recent_without_merging():
    layer = make_layer(4, 2, 41)
    compressed = CaM(budget=0.25).compress(layer, 11)
    assert compressed.positions[0].tolist() == [0, 1, 2, 3, 4, 35, 36, 37, 38, 39, 40]
    assert torch.equal(compressed.values, layer.values[:, compressed.positions[0]])


def test_gate_depends_on_seed_layer_head_and_step_only():
    def hashes(seed: int, layer_index: int) -> list[int]:
        compressed = CaM().compress(make_layer(2, 2, 20, seed=seed, layer_index=layer_index), 10)
        return compressed.state.head_hashes.flatten().tolist()

    seen = [word for seed in (0, 1) for layer_index in (2, 3) for word in hashes(seed, layer_index)]
    assert len(set(seen)) == 8
    assert hashes(1, 3) == seen[6:]


def test_gate_opens_with_the_ratio_of_the_scores():
    layer = make_layer(2, 2, 40)
    policy = CaM(budget=0.5, start_share=0.5, merge_tokens=4)
    opened = 0
    for step in range(400):
        slots = decode_slots(policy.compress(layer, 20))
        slots.step_index.fill_(step)
        slots.state.scores.fill_(1.0)
        slots.state.scores[:, 10 + step % 10] = 0.25  # the leaving token has a quarter of its targets' score
        before = slots.values.clone()
        policy.step(slots, torch.zeros(2, 21))
        slots.values[:, 10 + step % 10] = before[:, 10 + step % 10]
        opened += int((slots.values != before).any(dim=(1, 2)).sum())
    expected = 800 * 0.25  # all four targets are old tokens with score 1
    assert abs(opened - expected) < 4 * (800 * 0.25 * 0.75) ** 0.5
