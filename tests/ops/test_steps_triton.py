"""The one-launch steps of H2O and CaM against their `step`, row by row, through the cache that calls either."""

from dataclasses import dataclass

import pytest
import torch
from policy_inputs import relative_rms

from kvbench.methods.base import LayerStates, find_rows_stepper, slot_state
from kvbench.methods.cam import CaM
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O
from kvbench.runtime.cache import RaggedCache

HEAD_DIM = 16


def fill(cache, policies, lengths, n_layers, n_query_heads, n_kv_heads, device):
    for policy, n_tokens in zip(policies, lengths, strict=True):
        row = cache.add_row(policy, n_tokens, 40)
        for index in range(n_layers):
            generator = torch.Generator().manual_seed(1000 * n_tokens + index)
            keys, values = torch.randn(2, n_kv_heads, n_tokens, HEAD_DIM, generator=generator).to(device)
            sums = torch.rand(n_query_heads, n_tokens, generator=generator).pow(8).to(device)
            states = LayerStates(keys, values, index, n_layers, n_query_heads, seed=n_tokens, column_sums=sums)
            cache.write(index, row, policy.compress(states, policy.budget_tokens(n_tokens)))


def contents(cache, n_layers):
    """`(row, kind, tensor)` of keys, values and states of all stepping rows, without the scratch slot."""
    found = []
    for index in range(n_layers):
        for row, record in enumerate(cache._rows):
            if record.policy.steps:
                slots = cache._layers[index].decode_slots(record.blocks[index], torch.tensor(0))
                found += [(row, "keys", slots.keys[:, :-1].clone()), (row, "values", slots.values[:, :-1].clone())]
                found += [(row, name, state[:, :-1].clone()) for name, state in sorted(slot_state(slots.state).items())]
    return found


H2O_OPTIONS = [
    H2O(budget=0.5), H2O(budget=0.5, group_reduce="max"), H2O(budget=0.4, normalise_by_count=True),
    H2O(budget=0.4, group_reduce="first", recent_share=0.25), H2O(budget=0.3, recent_share=1.0),
    H2O(budget=0.4, recent_share=0.0), H2O(budget=0.4, recent_share=0.0, normalise_by_count=True),
]  # fmt: skip
CAM_OPTIONS = [
    CaM(budget=0.5, gate="accumulated"), CaM(budget=0.6, gate="accumulated", merge_tokens=2), CaM(budget=0.4),
    CaM(budget=0.5, merge=False), CaM(budget=0.4, start_share=0.0, gate="decoding"),
    CaM(budget=0.5, gate="decoding", gate_mean="window", merge_tokens=2), CaM(budget=0.5, gate_mean="targets"),
    *(CaM(budget=budget, start_share=0.9) for budget in (0.3, 0.2)),  # the new token is the only target
]  # fmt: skip
MIXED = [Full(), CaM(budget=0.5), H2O(budget=0.5), H2O(budget=0.35), CaM(budget=0.35, gate="decoding")]


# Rings of about 5 slots and 7 steps: every ring starts anew once. Triton's interpreter takes 10 ms a program.
@pytest.mark.parametrize(
    ("policies", "n_query_heads", "n_kv_heads", "n_layers"),
    [(H2O_OPTIONS, 3, 1, 1), (CAM_OPTIONS, 3, 1, 1), (CAM_OPTIONS[2:4], 2, 1, 1), (MIXED, 2, 2, 2)],
    ids=["h2o", "cam", "cam without sums", "mixed"],
)
def test_same_cache_after_every_step(policies, n_query_heads, n_kv_heads, n_layers, triton_device):
    caches = {}
    for kernels in ("torch", "triton"):
        caches[kernels] = RaggedCache(n_layers, n_query_heads, n_kv_heads, HEAD_DIM, torch.float32, kernels)
        lengths = [16 + i for i in range(len(policies))]
        fill(caches[kernels], policies, lengths, n_layers, n_query_heads, n_kv_heads, triton_device)
    generator, merged = torch.Generator().manual_seed(5), []
    before = contents(caches["torch"], n_layers)
    for step in range(7):
        for index in range(n_layers):
            query = torch.randn(len(policies), n_query_heads, 1, HEAD_DIM, generator=generator).to(triton_device)
            new = torch.randn(2, len(policies), n_kv_heads, 1, HEAD_DIM, generator=generator).to(triton_device)
            expected, got = (cache.attend(index, query * 2, *new, 0.25) for cache in caches.values())
            assert relative_rms(got, expected) < 1e-5, step
        for cache in caches.values():
            cache.advance()
        after = contents(caches["torch"], n_layers)
        for (row, kind, actual), (_, _, expected) in zip(contents(caches["triton"], n_layers), after, strict=True):
            assert relative_rms(actual, expected) < 1e-5, (step, row, kind)
        for (row, old), (_, new_values) in zip(values_of(before), values_of(after), strict=True):
            changed = (old != new_values).any(-1).sum(1)  # slots per head; the new token alone changes one or two
            assert (changed >= 1).all() or getattr(policies[row], "recent_share", 1) == 0
            if isinstance(policies[row], CaM) and policies[row].merge:
                merged += (changed > 1).tolist()
        before = after
    for plan in caches["triton"]._plans:
        assert not plan.steps
        assert sum(len(rows) for _, rows in plan.steppers) == sum(p.steps for p in policies)
    assert any(isinstance(p, CaM) for p in policies) == bool(merged)
    assert not merged or (any(merged) and not all(merged))  # the gate was seen open and shut


def values_of(found):
    return [(row, values) for row, kind, values in found if kind == "values"]


def test_a_changed_step_is_not_replaced_by_its_parents_kernel():
    @dataclass(frozen=True, kw_only=True)
    class Lazy(H2O):
        def step(self, slots, attention):
            pass

    assert find_rows_stepper(Lazy) is None
    assert find_rows_stepper(Full) is None


def test_a_step_captured_without_counts_is_not_replayed_with_them(triton_device):
    cache, seen = RaggedCache(1, 2, 2, HEAD_DIM, torch.float32, "triton"), []
    for counted in (False, True, False):
        cache.clear()
        fill(cache, [H2O(budget=0.5, normalise_by_count=counted)], [16], 1, 2, 2, triton_device)
        seen.append((cache.graph_key, sorted(name for name, *_ in cache._plans[0].states)))
    assert seen[0] != seen[1] == seen[2]  # once there is a pool of counts, every step looks whether a row has some
    assert [names for _, names in seen] == [["scores"], *[["counts", "scores"]] * 2]
