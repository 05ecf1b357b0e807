"""Every method against its loop twin on keys of the default model: what random keys may hide."""

import dataclasses

import pytest
import torch
from policy_inputs import relative_rms

from kvbench.methods.base import LayerStates
from kvbench.methods.cam import CaM
from kvbench.methods.d2o import D2O
from kvbench.methods.expected_attention import ExpectedAttention
from kvbench.methods.h2o import H2O
from kvbench.methods.keepkv import KeepKV
from kvbench.methods.knorm import Knorm
from kvbench.methods.kvmerger import KVMerger, KVMergerBias
from kvbench.methods.snapkv import SnapKV
from kvbench.methods.tova import TOVA
from kvbench.methods.weightedkv import WeightedKV
from kvbench.ops.segments import cosines_at, unit_keys
from kvbench.reference.expected_attention import reference_scores
from kvbench.reference.kvmerger import reference_kvmerger
from kvbench.reference.merged import reference_d2o, reference_keepkv, reference_weightedkv
from kvbench.reference.scored import reference_knorm, reference_snapkv
from kvbench.reference.stepped import ReferenceCaM, ReferenceH2O, ReferenceTOVA
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.observe import Observer

pytestmark = pytest.mark.model

TEXT = " ".join(
    f"On day {day} the harbour master wrote down {day * 37 % 101} ships, a {wind} wind and nothing else of note."
    for day, wind in enumerate(["north", "warm", "steady", "cold", "western", "rising"] * 3)
)
LAYERS = (1, 8, 20)


@pytest.fixture(scope="module")
def layers(smollm2) -> dict[int, LayerStates]:
    input_ids = smollm2.tokenizer(TEXT, return_tensors="pt").input_ids[:, :201]  # odd length
    states: list[LayerStates] = []
    observer = Observer(
        needs=frozenset({"column_sums", "window_attention", "queries", "rotary_frequencies"}),
        window_tokens=32,
        n_layers=30,
        n_query_heads=9,
        seed=1,
        on_layer=states.append,
        kernels="torch",
        config=smollm2.model.config,
    )
    with torch.no_grad(), attention_implementation(smollm2.model):
        smollm2.model(input_ids=input_ids, use_cache=False, logits_to_keep=1, attention_context=observer)
    assert len(states) == 30
    return {index: states[index] for index in LAYERS}


def test_the_keys_are_as_similar_as_reported(layers):
    cosines = torch.cat([cosines_at(unit_keys(states.keys), 1, False).flatten() for states in layers.values()])
    assert 0.7 < float(cosines.mean()) < 0.95


@pytest.mark.parametrize("index", LAYERS)
@pytest.mark.parametrize(
    "policy",
    [
        KVMerger(budget=0.5),
        KVMerger(budget=0.35),
        KVMergerBias(budget=0.35),
        KVMerger(budget=0.35, linkage="anchor"),
        KVMerger(budget=0.35, scope="layer", sigma_mode="mean_distance"),
        KVMerger(budget=0.5, budget_mode="threshold"),
        KVMerger(budget=0.5, budget_mode="threshold", linkage="anchor"),
    ],
    ids=lambda policy: f"{policy.name} {policy.budget} {policy.options()}",
)
def test_kvmerger(layers, index, policy):
    states = layers[index]
    policy = dataclasses.replace(policy, whole_first_layers=0) if index < 2 else policy
    slots = policy.layer_budgets(states.n_tokens, states.n_layers)[index]
    exact = slots if policy.exact_budget else None
    compressed = policy.compress(states, slots)
    reference = reference_kvmerger(
        states.keys, states.values, states.column_sums.unflatten(0, (3, 3)).mean(1),
        *policy.protected_counts(states.n_tokens, exact), n_slots=exact, epsilon=policy.threshold,
        linkage=policy.linkage, scope=policy.scope, sigma=policy.sigma if policy.sigma_mode == "fixed" else None,
        value_scale=policy.value_scale,
    )  # fmt: skip
    lengths = [slots] * 3 if compressed.lengths is None else compressed.lengths.tolist()
    for head, head_slots in enumerate(reference):
        n = lengths[head]
        assert compressed.positions[head, :n].tolist() == [slot.p for slot in head_slots]
        assert relative_rms(compressed.keys[head, :n], torch.stack([slot.key for slot in head_slots])) < 1e-5
        assert relative_rms(compressed.values[head, :n], torch.stack([slot.value for slot in head_slots])) < 1e-5


@pytest.mark.parametrize("index", LAYERS)
def test_h2o_and_cam(layers, index):
    states = layers[index]
    for policy, twin in ((H2O(budget=0.35), ReferenceH2O), (CaM(budget=0.35), ReferenceCaM)):
        slots = policy.layer_budgets(states.n_tokens, states.n_layers)[index]
        compressed = policy.compress(states, slots)
        keys, values, positions = twin(states.keys, states.values, states.column_sums, slots).stacked()
        assert torch.equal(compressed.positions, positions)
        assert relative_rms(compressed.keys, keys) == 0.0
        assert relative_rms(compressed.values, values) == 0.0


@pytest.mark.parametrize("index", LAYERS)
def test_selections(layers, index):
    states = layers[index]
    m = 70
    assert SnapKV().compress(states, m).positions.tolist() == reference_snapkv(states.window_attention, 3, m)
    assert Knorm().compress(states, m).positions.tolist() == reference_knorm(states.keys, m)
    tova = ReferenceTOVA(states.keys, states.values, states.window_attention[:, -1], m)
    assert TOVA().compress(states, m).positions.tolist() == [tova.stacked()[2]] * 3


@pytest.mark.parametrize("index", LAYERS)
def test_expected_attention(layers, index):
    states, policy = layers[index], ExpectedAttention(future_tokens=16)
    extras = states.extras
    scaling = float(extras["scaling"])
    expected = reference_scores(
        extras["queries"], states.keys, states.values, extras["rotary_frequencies"], scaling, n_future=16
    )
    assert relative_rms(policy.scores(states)[:, 4:], expected) < 1e-5


@pytest.mark.parametrize("index", LAYERS)
def test_merges_into_kept_tokens(layers, index):
    states, m = layers[index], 70
    sums = states.column_sums.unflatten(0, (3, 3)).mean(1)
    positions, keys, values = reference_d2o(states.keys, states.values, sums, m)
    d2o = D2O().compress(states, m)
    assert d2o.positions.tolist() == positions
    assert relative_rms(d2o.keys, keys) < 1e-5
    assert relative_rms(d2o.values, values) < 1e-5
    positions, values = reference_weightedkv(states.values, sums, m)
    weightedkv = WeightedKV().compress(states, m)
    assert weightedkv.positions.tolist() == positions
    assert relative_rms(weightedkv.values, values) < 1e-5
    keepkv = KeepKV().compress(states, m)
    keys, values, kept, bias = reference_keepkv(states.keys, states.values, KeepKV().window(states), m)
    assert torch.equal(keepkv.positions, kept)
    assert relative_rms(keepkv.keys, keys) < 1e-5
    assert relative_rms(keepkv.values, values) < 1e-5
    assert relative_rms(keepkv.bias, bias) < 1e-6
