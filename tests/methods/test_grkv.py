"""What GRKV's refit is for, and what it leaves alone."""

import pytest
import torch
from policy_inputs import make_layer

from kvbench.methods.adakv import AdaKV
from kvbench.methods.grkv import GRKV, layer_slots
from kvbench.methods.snapkv import SnapKV
from kvbench.ops.refit import attend, attend_to_all

BASE = AdaKV(base=SnapKV(observation_tokens=8))


def misfit(policy, layer, kept) -> float:
    queries, _ = policy.fitting_queries(layer)
    target, _ = attend_to_all(queries, layer.keys, layer.values)
    _, padding = layer_slots(kept)
    return float((attend(queries, kept.keys, kept.values, hidden=padding.unsqueeze(1)).output - target).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_over_the_prompt_come_closer_within_the_caps_and_guarded_slots_stay(dtype):
    layer = make_layer(6, 2, 160, seed=4, correlated=True, dtype=dtype)
    policies = {refit: GRKV(budget=0.3, base=BASE, refit=refit) for refit in ("none", "values", "both")}
    kept = {refit: policy.compress(layer, 48) for refit, policy in policies.items()}
    base = BASE.compress(layer, 48)
    assert torch.equal(kept["none"].keys, base.keys)
    assert torch.equal(kept["none"].values, base.values)
    errors = [misfit(policies["both"], layer, kept[refit]) for refit in ("both", "values", "none")]
    assert errors[0] < errors[1] < 0.99 * errors[2]
    fixed = layer_slots(base)[1] | policies["both"].guarded(layer, *layer_slots(base))
    for head, slots in enumerate(fixed):
        assert 8 < int(slots.sum()) < slots.numel()
        for name, cap in (("keys", 0.025), ("values", 0.1)):
            before, after = (getattr(states, name)[head].float() for states in (base, kept["both"]))
            assert torch.equal(before[slots], after[slots])
            assert 0.0 < (after - before).norm() <= cap * before[~slots].norm()


def test_a_correction_that_helps_nothing_or_is_not_finite_is_left_out():
    layer = make_layer(4, 2, 80, seed=1)
    layer.values *= 0.0  # every output is right as it is
    kept = GRKV(budget=0.4, base=BASE).compress(layer, 32)
    assert torch.equal(kept.keys, BASE.compress(layer, 32).keys)
    layer = make_layer(4, 2, 80, seed=1)
    layer.extras["queries"][:, 40] = torch.inf
    kept, base = GRKV(budget=0.4, base=BASE, fit_queries=80).compress(layer, 32), BASE.compress(layer, 32)
    assert torch.equal(kept.keys, base.keys)
    assert torch.equal(kept.values, base.values)


@pytest.mark.parametrize(("n_tokens", "places"), [(80, [9, 29, 49, 69]), (10, [0, 3, 5, 8]), (3, [0, 1, 2])])
def test_queries_come_from_the_middle_of_equal_parts(n_tokens, places):
    layer = make_layer(4, 2, n_tokens)
    policy = GRKV(fit_queries=4, base=BASE, place="own")
    queries, seen = policy.fitting_queries(layer)
    assert seen.tolist() == 2 * places
    expected = layer.extras["queries"][2, places] * layer.extras["scaling"]
    assert torch.allclose(queries[1, : len(places)], expected)
