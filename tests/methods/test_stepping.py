"""Methods that step against their loop twins over fifty new tokens; what a step does, by hand; CaM's gate."""

import pytest
import torch
from policy_inputs import make_layer, new_tokens, relative_rms
from twins import stepped_twin

from kvbench.methods.base import slot_state
from kvbench.methods.cam import CaM
from kvbench.methods.h2o import H2O
from kvbench.methods.streaming_llm import StreamingLLM
from kvbench.methods.tova import TOVA
from kvbench.ops.counter_rng import counter_hash, counter_uniform
from kvbench.testing import decode_slots

H2O_OPTIONS = [
    {}, {"normalise_by_count": True}, {"group_reduce": "max"}, {"recent_share": 0.2}, {"recent_share": 1.0},
    {"recent_share": 0.0}, {"recent_share": 0.0, "normalise_by_count": True},
]  # fmt: skip
CAM_OPTIONS = [
    {}, {"merge_tokens": 3}, {"merge": False}, {"start_share": 0.1}, {"gate_mean": "targets", "merge_tokens": 4},
    *({"gate": gate, **options} for gate in ("accumulated", "decoding")
      for options in ({}, {"merge_tokens": 3}, {"merge_tokens": 3, "gate_mean": "window"}, {"start_share": 0.1})),
]  # fmt: skip
STEPPING = [
    *(H2O(budget=budget, **options) for options in H2O_OPTIONS for budget in (0.35, 1.0)),
    *(CaM(budget=0.35, **options) for options in CAM_OPTIONS),
    *(StreamingLLM(budget=budget, start_tokens=start) for start in (0, 4, 9) for budget in (0.2, 0.5, 1.0)),
    *(TOVA(budget=budget, keep_newest=keep) for keep in (False, True) for budget in (0.2, 0.5, 1.0)),
]  # fmt: skip


def positions_of(keys, history):
    """The positions of slots by their keys, of which no stepping method changes any, `(H_k, m)`."""
    return (keys.unsqueeze(2) == history.unsqueeze(1)).all(-1).int().argmax(-1)


def advance(twin, policy, layer, step, key, value, where, attention) -> list[bool]:
    """Hand the new token to the twin, with its attention by position; the gates of CaM's heads."""
    position, group = layer.n_tokens + step, layer.group_size
    by_slot = [dict(zip(where[h].tolist(), attention[h * group : (h + 1) * group].T.tolist(), strict=True))
               for h in range(layer.n_kv_heads)]  # fmt: skip
    if policy.name == "streaming_llm":
        twin.append(position, key, value)
    elif policy.name == "tova":
        twin.step(position, key, value, dict(zip(where[0].tolist(), attention.T.tolist(), strict=True)))
    elif policy.name == "h2o":
        for h, rows in enumerate(by_slot):
            twin.step(h, position, key[h], value[h], rows)
    else:
        seed = counter_hash(layer.seed, layer.layer_index)
        draws = [float(counter_uniform(seed, h, step)) for h in range(layer.n_kv_heads)]
        return [twin.step(h, position, key[h], value[h], by_slot[h], lambda h=h: draws[h]) for h in range(len(draws))]
    return []


@pytest.mark.parametrize("policy", STEPPING, ids=lambda policy: f"{policy.name} {policy.budget} {policy.options()}")
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97), (4, 1, 50)])
def test_fifty_steps_match_the_twin(n_query_heads, n_kv_heads, n_tokens, policy):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=5)
    if policy.name == "h2o":
        layer.column_sums *= 0.1 if policy.recent_share else 0.01  # so that new tokens can become heavy hitters
    m = policy.layer_budgets(n_tokens, 2)[0]
    twin, slots = stepped_twin(policy, layer, m), decode_slots(policy.compress(layer, m))
    tokens = new_tokens(50, n_query_heads, n_kv_heads, m, seed=6)
    history = torch.cat([layer.keys, torch.stack([key for key, _, _ in tokens], 1)], 1)
    merges, moved, survived = [], False, 0
    for step, (key, value, attention) in enumerate(tokens):
        slots.step_index.fill_(step)
        slots.keys[:, m], slots.values[:, m] = key, value
        for tensor in slot_state(slots.state).values():
            tensor[:, m] = 0
        before = positions_of(slots.keys, history)
        merges += advance(twin, policy, layer, step, key, value, before, attention)
        policy.step(slots, attention)
        after = positions_of(slots.keys[:, :m], history)
        moved |= policy.name == "h2o" and not torch.equal(*(p[:, : policy.split(m)[0]] for p in (before, after)))
        survived += int((after == n_tokens + step).any())
        order = after.argsort(1)
        rows = order.unsqueeze(-1).expand(-1, -1, history.shape[-1])
        keys, values, positions = twin.stacked()
        assert torch.equal(after.gather(1, order), torch.as_tensor(positions).expand(n_kv_heads, -1))
        assert torch.equal(slots.keys.gather(1, rows), keys)
        assert relative_rms(slots.values.gather(1, rows), values) <= (1e-6 if policy.name == "cam" else 0.0)
        if getattr(slots.state, "scores", None) is not None:
            assert relative_rms(slots.state.scores.gather(1, order), twin.scores()) < 1e-5
    if policy.name == "h2o":
        assert moved == (policy.recent_share < 1)  # some leaving token became a heavy hitter; at 1 it is a ring
    if policy.name == "cam":
        assert any(merges) == policy.merge
        assert not all(merges)  # the gate closed at least once
    may_drop_the_newest = policy == TOVA(budget=policy.budget) or getattr(policy, "recent_share", 1) == 0
    assert 0 < survived <= 50 if may_drop_the_newest else survived == 50


def test_cam_s_gate_depends_on_seed_layer_head_and_step_only():
    def hashes(seed: int, layer_index: int) -> list[int]:
        compressed = CaM().compress(make_layer(2, 2, 20, seed=seed, layer_index=layer_index), 10)
        return compressed.state.head_hashes.flatten().tolist()

    seen = [word for seed in (0, 1) for layer_index in (2, 3) for word in hashes(seed, layer_index)]
    assert len(set(seen)) == 8
    assert hashes(1, 3) == seen[6:]


def test_cam_s_gate_opens_with_the_ratio_of_the_scores():
    layer = make_layer(2, 2, 40)
    policy = CaM(budget=0.5, start_share=0.5, merge_tokens=4, gate="accumulated")
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


def test_tova_may_drop_the_newest_token_unless_it_is_kept():
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
