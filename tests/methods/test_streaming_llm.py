"""StreamingLLM against its loop twin, over the prompt and fifty decoding steps."""

import pytest
import torch
from policy_inputs import make_layer, new_tokens

from kvbench.methods.streaming_llm import StreamingLLM
from kvbench.reference.stepped import ReferenceStreamingLLM
from kvbench.testing import decode_slots


@pytest.mark.parametrize("start_tokens", [0, 4, 9])
@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97)])
def test_fifty_steps_match_reference(n_query_heads, n_kv_heads, n_tokens, budget, start_tokens):
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
