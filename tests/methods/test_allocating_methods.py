"""Slots over all layers: against rankings written out, what CAKE prefers, and the scores of a repetition in loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import make_layer

from kvbench.methods.cake import CAKE
from kvbench.methods.criticalkv import CriticalKV
from kvbench.methods.defensivekv import LayerDefensiveKV
from kvbench.methods.knorm import Knorm
from kvbench.methods.kvzip import KVzip
from kvbench.methods.scored import allocate_by_scores
from kvbench.ops.selection import largest_of_all
from kvbench.reference.cake import layer_slots, preference
from kvbench.reference.kvzip import reference_chunk_scores
from kvbench.runtime.reconstruct import chunk_scores


@pytest.mark.parametrize("policy", [LayerDefensiveKV(budget=0.4, observation_tokens=8), KVzip(budget=0.4)])
def test_layers_keep_the_best_of_the_whole_model(policy):
    layers = [make_layer(4, 2, 60, seed=index, layer_index=index, n_layers=5) for index in range(5)]
    ranks = [policy.preference(layer) for layer in layers]
    budgets = policy.allocate(ranks, 60, 2)
    assert len(set(budgets)) > 1
    everyone = sorted((float(r), j, -i) for i, head in enumerate(torch.cat(ranks)) for j, r in enumerate(head))
    best = {(-minus // 2, -minus % 2, j) for _, j, minus in everyone[-5 * 2 * 24 :]}
    kept = [policy.compress(*pair) for pair in zip(layers, budgets, strict=True)]
    found = {
        (index, head, int(j))
        for index, layer in enumerate(kept)
        for head in range(2)
        for j in layer.positions[head, : layer.lengths[head]]
    }
    assert found == best


@settings(max_examples=40, deadline=None)
@given(n_rows=st.integers(1, 6), n_tokens=st.integers(1, 12), levels=st.integers(1, 9), share=st.floats(0, 1))
def test_ties_go_to_the_more_recent_token_then_to_the_lower_row(n_rows, n_tokens, levels, share):
    scores = torch.randint(levels, (n_rows, n_tokens)).float()
    n_largest = int(share * n_rows * n_tokens)
    order = sorted(((float(scores[i, j]), j, -i) for i in range(n_rows) for j in range(n_tokens)), reverse=True)
    marks = torch.zeros(n_rows, n_tokens, dtype=torch.bool)
    for _, j, minus_row in order[:n_largest]:
        marks[-minus_row, j] = True
    assert torch.equal(largest_of_all(scores, n_largest), marks)
    assert allocate_by_scores(list(scores.unsqueeze(1)), n_largest) == marks.sum(1).tolist()


@pytest.mark.parametrize(("tau1", "tau2"), [(1.0, 1.0), (1.6, 0.4), (0.5, 2.0)])
def test_cake_s_preferences_and_shares_are_its_twin_s(tau1, tau2):
    policy = CAKE(budget=0.4, observation_tokens=6, tau1=tau1, tau2=tau2)
    layers = [make_layer(4, 2, 60, seed=index, head_dim=4 + 8 * index, correlated=index > 2) for index in range(5)]
    ours, theirs = [policy.preference(layer) for layer in layers], [preference(policy, layer) for layer in layers]
    assert torch.cat(ours).tolist() == pytest.approx(theirs, rel=1e-5)
    budgets = policy.allocate(ours, 60, 2)
    assert sum(budgets) == 5 * 2 * 24
    assert budgets == [2 * (share + 6) for share in layer_slots(torch.cat(ours).tolist(), 5 * 18, 54)]


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), budget=st.floats(0.1, 0.99))
def test_cake_gives_no_layer_more_than_it_has_and_loses_no_slot(weights, budget):
    policy = CAKE(budget=budget, observation_tokens=4)
    if policy.budget_tokens(60) < 5:
        return
    budgets = policy.allocate([torch.tensor([w], dtype=torch.float64) for w in weights], 60, 3)
    assert sum(budgets) == len(weights) * 3 * policy.budget_tokens(60)
    assert all(3 * 4 <= slots <= 3 * 60 for slots in budgets)


def test_cake_shares_evenly_where_all_queries_attend_alike():
    assert CAKE(budget=0.5, observation_tokens=4).allocate([torch.zeros(1, dtype=torch.float64)] * 3, 60, 2) == [60] * 3


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("n_sinks", [0, 3])
def test_scores_of_a_repetition_are_those_of_the_loop(n_sinks, softcap):
    queries, keys = torch.randn(4, 9, 8), torch.randn(2, 40, 8)
    chunk = slice(n_sinks, 14)
    got = chunk_scores(queries, keys, 25, chunk, 0.4, softcap)
    expected = reference_chunk_scores(queries, keys[:, :n_sinks], keys[:, chunk], keys[:, 25:34], 0.4, softcap)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_critical_kv_keeps_values_that_the_projection_enlarges():
    layer = make_layer(2, 2, 40, seed=3)
    layer.window_attention[:] = 1 / 40
    layer.values[:, 5] *= 100
    policy = CriticalKV(budget=0.5, base=type(CriticalKV().base)(observation_tokens=4))
    kept = policy.compress(layer, 20)
    assert all(5 in head for head in kept.positions.tolist())
    assert 5 not in policy.base.compress(layer, 20).positions[0].tolist()
    assert CriticalKV(base=Knorm()).needs == frozenset({"output_weight"})
