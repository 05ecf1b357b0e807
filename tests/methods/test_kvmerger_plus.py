"""How KVMerger Plus chooses, and what its refit is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import make_layer, relative_rms
from twins import plus_positions

from kvbench.methods.kvmerger_plus import KVMergerPlus

SHORT = {"question_queries": 4, "kernel_tokens": 5, "text_queries": 20, "refit_queries": 8}


@settings(max_examples=20, deadline=None)
@given(
    n_tokens=st.integers(24, 70), budget=st.floats(0.4, 0.99), share=st.floats(0.0, 1.0),
    kernel=st.sampled_from([1, 3, 13, 41]), heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
)  # fmt: skip
def test_chooses_as_the_reference_for_any_length_share_and_kernel(n_tokens, budget, share, kernel, heads):
    policy = KVMergerPlus(budget=budget, **{**SHORT, "kernel_tokens": kernel, "question_share": share})
    n_slots = policy.layer_budgets(n_tokens, 2)[0]
    layer = make_layer(*heads, n_tokens, seed=n_tokens)
    assert policy.positions(layer, n_slots).tolist() == plus_positions(policy, layer, n_slots)


def rows_and_mass(layer, compressed):
    """Attention of the last 8 queries, and what of it the kept slots get without their bias."""
    rows = layer.window_attention[:, -8:].unflatten(0, (layer.n_kv_heads, -1)).flatten(1, 2)
    return rows, rows.gather(2, compressed.positions.unsqueeze(1).expand(-1, rows.shape[1], -1))


def output_error(layer, compressed) -> float:
    rows, mass = rows_and_mass(layer, compressed)
    if compressed.bias is not None:
        mass = mass * compressed.bias.exp().unsqueeze(1)
    return relative_rms(mass / mass.sum(-1, keepdim=True) @ compressed.values, rows @ layer.values)


@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens"), [(4, 4, 61), (6, 2, 97), (4, 1, 130)])
def test_refit_brings_the_last_queries_closer_to_their_output(n_query_heads, n_kv_heads, n_tokens):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=5, correlated=True)
    errors = {}
    for refit, ridge in [("none", 0.1), ("values", 0.1), ("both", 0.1), ("values", 1e-3), ("values", 1e4)]:
        policy = KVMergerPlus(budget=0.4, **SHORT, refit=refit, ridge=ridge)
        errors[refit, ridge] = output_error(layer, policy.compress(layer, int(0.4 * n_tokens)))
    assert errors["values", 1e-3] < errors["values", 0.1] < errors["none", 0.1]
    assert errors["both", 0.1] < errors["none", 0.1]
    assert errors["values", 1e4] == pytest.approx(errors["none", 0.1], rel=1e-2)


def test_bias_gives_back_the_mass_that_was_dropped():
    layer = make_layer(4, 2, 80, seed=2)
    policy = KVMergerPlus(budget=0.4, **SHORT, refit="both", ridge=1e-4)
    compressed = policy.compress(layer, 32)
    _, mass = rows_and_mass(layer, compressed)
    before = (1.0 - mass.sum(-1)).abs().mean()
    after = (1.0 - (mass * compressed.bias.exp().unsqueeze(1)).sum(-1)).abs().mean()
    assert before > 0.3
    assert after < before / 5  # not zero: a factor stays between exp(-2) and exp(3)


def test_half_of_the_slots_follow_the_question_and_half_the_text():
    layer = make_layer(2, 2, 60)
    layer.window_attention = torch.full((2, 20, 60), 1e-3)
    layer.window_attention[:, -4:, 25] = 1.0  # the question's queries look here
    layer.window_attention[:, :-4, 40:45] = 1.0  # those before it there
    layer.column_sums = torch.zeros(2, 60)
    options = {**SHORT, "question_share": 0.5, "recent_share": 0.23, "kernel_tokens": 7}
    compressed = KVMergerPlus(budget=0.3, **options, refit="none").compress(layer, 18)
    assert compressed.positions[0].tolist() == [22, 23, 24, 25, 26, 27, 28, *range(40, 45), *range(54, 60)]
