"""What `kvbench.testing` does not ask of a method: exact budgets over all layers of any model, refusals that help."""

import dataclasses
import itertools
import re

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import make_layer

from kvbench.errors import BudgetError
from kvbench.methods.adakv import AdaKV
from kvbench.methods.registry import build_policy, load_policies, merging_arms
from kvbench.methods.snapkv import SnapKV

N_LAYERS = 6
SHORT_PROMPTS = {  # windows and whole layers that leave something to choose on prompts of some fifty tokens
    "kvmerger": {"whole_first_layers": 1, "whole_last_layers": 0},
    "snapkv": {"observation_tokens": 4, "kernel_tokens": 3},
    "knorm": {"whole_first_layers": 1},
    "pyramidkv": {"observation_tokens": 4},
    "adakv": {"base": SnapKV(observation_tokens=4)},
    "grkv": {"base": AdaKV(base=SnapKV(observation_tokens=4))},
    "d2o": {"start_tokens": 1, "whole_first_layers": 1, "whole_last_layers": 0},
    "expected_attention": {"future_tokens": 16},
    "chunkkv": {"base": SnapKV(observation_tokens=4), "chunk_tokens": 6},
    "lagkv": {"lag_tokens": 16},
    "zsmerge": {"dense_slots": 3},
    "criticalkv": {"base": SnapKV(observation_tokens=4)},
    "critical_adakv": {"base": SnapKV(observation_tokens=4)},
    **{name: {"observation_tokens": 4} for name in ("defensivekv", "layer_defensivekv", "cake")},
}
COMPRESSED = [name for name in load_policies() if name != "full"]
WITH_OPTIONS = [
    *((name, SHORT_PROMPTS.get(name, {})) for name in COMPRESSED),
    ("kvmerger", {**SHORT_PROMPTS["kvmerger"], "linkage": "anchor"}),
]


@pytest.mark.parametrize(("name", "options"), WITH_OPTIONS, ids=str)
@settings(max_examples=8, deadline=None)
@given(
    n_tokens=st.integers(41, 75), budget=st.floats(0.35, 1.0), heads=st.sampled_from([(2, 2), (4, 2), (3, 1), (6, 3)])
)
def test_the_slots_kept_are_the_budget_to_the_last_one(name, options, n_tokens, budget, heads):
    policy = build_policy(name, {"budget": budget, **options})
    total = 0
    shape = {"n_layers": N_LAYERS, "head_dim": 8, "correlated": True}
    layers = [make_layer(*heads, n_tokens, seed=index, layer_index=index, **shape) for index in range(N_LAYERS)]
    budgets = policy.layer_budgets(n_tokens, N_LAYERS)
    if policy.allocates:
        budgets = policy.allocate([policy.preference(layer) for layer in layers], n_tokens, heads[1])
    for states, slots in zip(layers, budgets, strict=True):
        layer = policy.compress(states, slots)
        total += layer.n_slots
        assert layer.keys.isfinite().all()
        lengths = [layer.keys.shape[1]] * heads[1] if layer.lengths is None else layer.lengths.tolist()
        assert max(lengths) == layer.keys.shape[1]
        for head, length in enumerate(lengths if layer.positions is not None else ()):
            kept = layer.positions[head, :length].tolist()
            assert kept == sorted(set(kept))  # each token once, in order
            assert kept[0] >= 0
            assert kept[-1] < n_tokens
    assert total == N_LAYERS * heads[1] * policy.budget_tokens(n_tokens)


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_a_refused_budget_is_told_helps(name):
    options = {"whole_first_layers": 2} if name == "knorm" else {}
    for budget, n_tokens, n_layers in itertools.product((0.01, 0.2, 0.35, 0.5, 0.99), (1, 7, 32, 40, 97), (1, 3, 8)):
        policy = build_policy(name, {"budget": budget, **options})
        try:
            policy.layer_budgets(n_tokens, n_layers)
        except BudgetError as error:
            message = str(error)
            if larger := re.search(r"raise the budget to (0\.\d+)", message):
                assert float(larger[1]) > budget
                dataclasses.replace(policy, budget=float(larger[1])).layer_budgets(n_tokens, n_layers)
            else:
                assert "set budget=1, which keeps everything" in message
            if longer := re.search(r"use prompts of at least (\d+) tokens", message):
                policy.layer_budgets(int(longer[1]), n_layers)
            for option in re.findall(r"whole_\w+_layers", message):
                assert getattr(policy, option) > 0


MERGERS = [name for name in COMPRESSED if build_policy(name).without_merging() is not None]


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_a_base_keeps_the_same_slots_as_they_were_in_the_same_bytes_but_for_a_bias(name, heads):
    policy = build_policy(name, {"budget": 0.4, **SHORT_PROMPTS.get(name, {})})
    base = policy.without_merging()
    layer = make_layer(*heads, 97, seed=3, correlated=True)
    slots = policy.layer_budgets(97, layer.n_layers)
    assert base.layer_budgets(97, layer.n_layers) == slots
    merged, kept = (one.compress(layer, slots[layer.layer_index]) for one in (policy, base))
    assert torch.equal(merged.positions, kept.positions)
    assert (merged.lengths is None) == (kept.lengths is None)
    assert merged.lengths is None or torch.equal(merged.lengths, kept.lengths)
    for name, own in (("keys", layer.keys), ("values", layer.values)):
        ours = getattr(kept, name)
        assert torch.equal(ours, own.gather(1, kept.positions.unsqueeze(-1).expand_as(ours)))
        assert getattr(merged, name).nbytes == ours.nbytes
    assert kept.bias is None  # it has nothing to weigh; what one costs is in the records' bytes
    changed = policy.steps or not torch.equal(merged.values, kept.values)
    assert changed  # a method that steps merges while decoding
    assert base.without_merging() is None


def test_the_methods_that_merge_are_known():
    expected = {"cam", "d2o", "grkv", "keepkv", "kvmerger", "kvmerger_bias", "kvmerger_plus", "weightedkv", "zsmerge"}
    assert set(MERGERS) == expected
    arms = merging_arms()
    assert len(arms) == 1 + 2 * 3 * len(expected)
    for name in expected:
        on, off = (instantiate(arms[key]) for key in (f"{name}_35", f"{name}_off_35"))
        assert on.without_merging() == off


@pytest.mark.parametrize("name", ["kvmerger", "d2o"])
def test_whole_layers_on_top_keep_more_than_the_budget_says(name):
    policy = build_policy(name, {"budget": 0.35, "whole_layers": "on_top"})
    assert policy.layer_budgets(100, 8) == [100, 100, *[35] * 5, 100]
    assert not policy.exact_budget  # so no check asks for the budget, and no table lets it compete
    assert policy.options() == {"whole_layers": "on_top"}  # the arm's name says it
    layer = make_layer(4, 2, 100, correlated=True, layer_index=3, n_layers=8)
    assert policy.compress(layer, 35).n_slots == 2 * 35
    with pytest.raises(BudgetError, match="raise the budget"):
        build_policy(name, {"budget": 0.01, "whole_layers": "on_top"}).layer_budgets(50, 8)
    same = dataclasses.replace(policy, whole_layers="inside", budget=0.65)
    assert sum(policy.layer_budgets(100, 8)) < sum(same.layer_budgets(100, 8))
