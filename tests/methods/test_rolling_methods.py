"""StreamingLLM and TOVA against their loop twins, over the prompt and fifty decoding steps."""

import pytest
import torch
from policy_inputs import make_layer, new_tokens

from kvbench.methods.streaming_llm import StreamingLLM
from kvbench.methods.tova import TOVA
from kvbench.reference.stepped import ReferenceStreamingLLM, ReferenceTOVA
from kvbench.testing import decode_slots


@pytest.mark.parametrize("start_tokens", [0, 4, 9])
@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97)])
def test_streaming_llm_fifty_steps_match_reference(n_query_heads, n_kv_heads, n_tokens, budget, start_tokens):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens)
    policy = StreamingLLM(budget=budget, start_tokens=start_tokens)
    m = policy.layer_budgets(n_tokens, 2)[0]
    compressed = policy.compress(layer, m)
    reference = ReferenceStreamingLLM(layer.keys, layer.values, m, start_tokens)
    keys, values, positions = reference.stacked()
    assert compressed.positions.tolist() == [positions] * n_kv_heads
    slots, slot_positions = decode_slots(compressed), positions
    for step, (key, value, attention) in enumerate(new_tokens(50, n_query_heads, n_kv_heads, m)):
        slots.step_index.fill_(step)
        slots.keys[:, m], slots.values[:, m] = key, value
        policy.step(slots, attention)
        slot_positions[start_tokens + step % (m - start_tokens)] = n_tokens + step
        reference.append(n_tokens + step, key, value)
        keys, values, positions = reference.stacked()
        assert sorted(slot_positions) == positions
        order = torch.tensor(slot_positions).argsort()
        assert torch.equal(slots.keys[:, order], keys)
        assert torch.equal(slots.values[:, order], values)


@pytest.mark.parametrize("keep_newest", [False, True])
@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97), (4, 1, 30)])
def test_tova_fifty_steps_match_reference(n_query_heads, n_kv_heads, n_tokens, budget, keep_newest):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=7)
    policy = TOVA(budget=budget, keep_newest=keep_newest)
    m = policy.layer_budgets(n_tokens, 2)[0]
    compressed = policy.compress(layer, m)
    reference = ReferenceTOVA(layer.keys, layer.values, layer.window_attention[:, -1], m, keep_newest)
    keys, values, positions = reference.stacked()
    assert compressed.positions.tolist() == [positions] * n_kv_heads
    assert torch.equal(compressed.keys, keys)
    assert torch.equal(compressed.values, values)
    slots, slot_positions, survived = decode_slots(compressed), positions, 0
    for step, (key, value, attention) in enumerate(new_tokens(50, n_query_heads, n_kv_heads, m, seed=8)):
        position = n_tokens + step
        slots.keys[:, m], slots.values[:, m] = key, value
        rows = dict(zip([*slot_positions, position], attention.T.tolist(), strict=True))
        reference.step(position, key, value, rows)
        before = slots.keys[:, :m].clone()
        policy.step(slots, attention)
        for changed in (slots.keys[:, :m] != before).any(-1).any(0).nonzero().flatten().tolist():
            slot_positions[changed] = position
        keys, values, positions = reference.stacked()
        survived += position in positions
        assert sorted(slot_positions) == positions
        order = torch.tensor(slot_positions).argsort()
        assert torch.equal(slots.keys[:, order], keys)
        assert torch.equal(slots.values[:, order], values)
    assert survived == 50 if keep_newest else 0 < survived <= 50


def test_the_newest_token_may_go_unless_it_is_kept():
    layer = make_layer(2, 2, 20)
    layer.window_attention = torch.arange(20.0, 0.0, -1.0).expand(2, 1, 20)
    assert TOVA(budget=0.2).compress(layer, 4).positions[1].tolist() == [0, 1, 2, 3]
    assert TOVA(budget=0.2, keep_newest=True).compress(layer, 4).positions[1].tolist() == [0, 1, 2, 19]
    for keep_newest, place in ((False, None), (True, 3)):
        policy = TOVA(budget=0.2, keep_newest=keep_newest)
        slots = decode_slots(policy.compress(layer, 4))
        before = slots.keys.clone()
        slots.keys[:, 4] = 9.0
        policy.step(slots, torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).expand(2, 5))
        changed = [s for s in range(4) if not torch.equal(slots.keys[:, s], before[:, s])]
        assert changed == ([] if place is None else [place])


def test_all_query_heads_vote_for_one_set():
    layer = make_layer(4, 2, 30, seed=1)
    positions = TOVA(budget=0.5).compress(layer, 15).positions
    mean = layer.window_attention[:, -1].mean(0)
    assert positions[0].tolist() == positions[1].tolist() == sorted(mean.topk(15).indices.tolist())
