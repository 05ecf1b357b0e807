"""How KVMerger Plus divides and fills its slots, and what its refit is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import make_layer, relative_rms

from kvbench.methods.kvmerger_plus import KVMergerPlus
from kvbench.ops.refit import kept_mass
from kvbench.reference.kvmerger_plus import twin

SHORT = {"reach_queries": 9, "recent_tokens": 3, "question_queries": 4, "kernel_tokens": 5, "text_queries": 20}
SHORT |= {"refit_queries": 8}


@settings(max_examples=20, deadline=None)
@given(
    n_tokens=st.integers(24, 70), budget=st.floats(0.4, 0.99), shares=st.tuples(*[st.floats(0.0, 1.0)] * 3),
    kernel=st.sampled_from([1, 3, 13, 41]), heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    reach_queries=st.sampled_from([2, 7, 100]), recent=st.integers(0, 20), part=st.floats(0.5, 1.5),
)  # fmt: skip
def test_chooses_as_the_reference_for_any_length_shares_and_slots(
    n_tokens, budget, shares, kernel, heads, reach_queries, recent, part
):
    # Not one query alone: its attention has the same mean in every head, and rounding would decide between them.
    options = {**SHORT, "kernel_tokens": kernel, "reach_queries": reach_queries, "recent_tokens": recent}
    options |= dict(zip(("floor_share", "question_share", "reach_share"), shares, strict=True))
    policy = KVMergerPlus(budget=budget, refit="none", **options)
    certain = max(1, int(policy.floor_share * policy.budget_tokens(n_tokens) + 1e-9)) * heads[1]
    n_slots = min(max(certain, int(part * heads[1] * policy.budget_tokens(n_tokens))), heads[1] * n_tokens)
    layer = make_layer(*heads, n_tokens, seed=n_tokens)
    kept = policy.compress(layer, n_slots)
    lengths = [n_tokens] * heads[1] if kept.lengths is None else kept.lengths.tolist()
    assert sum(lengths) == n_slots
    found = [kept.positions[h, :length].tolist() for h, length in enumerate(lengths)]
    assert found == [positions for positions, *_ in twin(policy, layer, n_slots)]


def rows_and_mass(policy, layer, compressed):
    """Attention of the refitted queries, and what of it the kept slots get without their bias."""
    last, reaching = policy.last_rows(layer), policy.reaching_rows(layer)
    rows = torch.cat([last[:, :, -8:], reaching[:, :, 1::4]], 2).flatten(1, 2)
    padding = torch.arange(compressed.positions.shape[1]) >= compressed.lengths.unsqueeze(1)
    return rows, kept_mass(rows, compressed.positions).masked_fill(padding.unsqueeze(1), 0.0)


def output_error(policy, layer, compressed) -> float:
    rows, mass = rows_and_mass(policy, layer, compressed)
    if compressed.bias is not None:
        mass = mass * compressed.bias.exp().unsqueeze(1)
    return relative_rms(mass / mass.sum(-1, keepdim=True) @ compressed.values, rows @ layer.values)


@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97), (4, 1, 130)])
def test_refit_brings_the_queries_closer_to_their_output(n_query_heads, n_kv_heads, n_tokens):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=5, correlated=True)
    errors = {}
    for refit, ridge in [("none", 0.1), ("values", 0.1), ("both", 0.1), ("values", 1e-3), ("values", 1e4)]:
        policy = KVMergerPlus(budget=0.4, **SHORT, refit=refit, ridge=ridge)
        compressed = policy.compress(layer, n_kv_heads * int(0.4 * n_tokens))
        errors[refit, ridge] = output_error(policy, layer, compressed)
    assert errors["values", 1e-3] < errors["values", 0.1] < errors["none", 0.1]
    assert errors["both", 0.1] < errors["none", 0.1]
    assert errors["values", 1e4] == pytest.approx(errors["none", 0.1], rel=1e-2)


def test_bias_gives_back_the_mass_that_was_dropped():
    layer = make_layer(4, 2, 80, seed=2)
    policy = KVMergerPlus(budget=0.4, **SHORT, refit="both", ridge=1e-4)
    compressed = policy.compress(layer, 64)
    _, mass = rows_and_mass(policy, layer, compressed)
    before = (1.0 - mass.sum(-1)).abs().mean()
    after = (1.0 - (mass * compressed.bias.exp().unsqueeze(1)).sum(-1)).abs().mean()
    assert before > 0.3
    assert after < before / 3  # not zero: a factor stays between exp(-2) and exp(3)


def test_heads_that_look_everywhere_get_the_slots_and_others_their_floor():
    """Head 0 finds whatever a query asks for; head 1 looks at the first token whoever asks."""
    n_tokens, policy = 60, KVMergerPlus(budget=0.4, **{**SHORT, "reach_queries": 60, "floor_share": 0.5})
    layers = [make_layer(2, 2, n_tokens, seed=index, head_dim=64) for index in range(3)]
    for index, layer in enumerate(layers):
        layer.extras["rotary_frequencies"] *= 0.0  # nothing but content counts
        layer.keys = 0.1 * layer.keys
        layer.keys[1, 0] = 10.0
        layer.extras["queries"] = 10.0 * layer.keys.clone()
        layer.extras["queries"][1] = 1.0
        if index < 2:
            layer.keys[0], layer.keys[1] = layer.keys[1].clone(), layer.keys[1].clone()
            layer.extras["queries"][0] = 1.0
    layers[2].keys[0] = 40.0 * torch.eye(n_tokens, 64)
    layers[2].extras["queries"][0] = layers[2].keys[0]
    slots = policy.allocate([policy.preference(layer) for layer in layers], n_tokens, 2)
    assert sum(slots) == 3 * 2 * 24
    lengths = [policy.compress(layer, n).lengths.tolist() for layer, n in zip(layers, slots, strict=True)]
    assert lengths[2][0] == n_tokens  # 12 for certain in each of six heads leave 72 slots, of which it takes 48 first
    assert all(12 <= length <= 17 for pair in lengths for length in pair if length < n_tokens)


def test_slots_are_filled_by_the_last_the_question_the_reach_and_the_text_in_turn():
    layer = make_layer(2, 2, 60)
    options = {**SHORT, "recent_tokens": 4, "question_share": 0.5, "reach_share": 0.25, "kernel_tokens": 3}
    policy = KVMergerPlus(budget=0.2, **options, refit="none")
    last, reaching = torch.full((2, 1, 20, 60), 1e-3), torch.full((2, 1, 9, 60), 1e-3)
    last[:, :, -4:, 25] = 1.0  # the question's queries look here
    last[:, :, :-4, 40:50] = 0.5  # those before it there
    reaching[:, :, 3, 10:12] = 0.9
    layer.column_sums = torch.zeros(2, 60)
    marks = policy.marks(layer, 24, reaching, last)
    assert marks.sum(1).tolist() == [12, 12]
    assert marks[0].nonzero().flatten().tolist() == [10, 11, 24, 25, 26, 48, 49, 55, *range(56, 60)]
