"""Every method against its loop twin: on random keys, on keys like a model's, and on those of the default model."""

import dataclasses

import pytest
import torch
from policy_inputs import make_layer, relative_rms
from twins import assert_as_twin

from kvbench.methods.adakv import AdaKV
from kvbench.methods.base import LayerStates
from kvbench.methods.cake import CAKE
from kvbench.methods.cam import CaM
from kvbench.methods.chunkkv import ChunkKV
from kvbench.methods.compactor import Compactor
from kvbench.methods.criticalkv import CriticalAdaKV, CriticalKV
from kvbench.methods.d2o import D2O
from kvbench.methods.defensivekv import DefensiveKV, LayerDefensiveKV
from kvbench.methods.expected_attention import ExpectedAttention
from kvbench.methods.grkv import GRKV
from kvbench.methods.h2o import H2O
from kvbench.methods.keepkv import KeepKV
from kvbench.methods.knorm import Knorm
from kvbench.methods.kvmerger import KVMerger, KVMergerBias
from kvbench.methods.kvmerger_plus import KVMergerPlus
from kvbench.methods.kvzip import KVzip
from kvbench.methods.lagkv import LagKV
from kvbench.methods.pyramidkv import PyramidKV
from kvbench.methods.registry import build_policy, load_policies
from kvbench.methods.scored import EvictAndMerge
from kvbench.methods.snapkv import SnapKV
from kvbench.methods.streaming_llm import StreamingLLM
from kvbench.methods.tova import TOVA
from kvbench.methods.weightedkv import WeightedKV
from kvbench.methods.zsmerge import ZSMerge
from kvbench.ops.segments import cosines_at, unit_keys
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.model_check import output_weights
from kvbench.runtime.observe import Observer

EXPECTED = [
    {}, {"use_covariance": False}, {"use_value_norm": False}, {"epsilon": 0.05}, {"start_tokens": 9},
    {"start_tokens": 0, "future_tokens": 1},
]  # fmt: skip
MERGING = [
    {}, {"linkage": "anchor"}, {"scope": "layer"}, {"scope": "layer", "linkage": "anchor"}, {"pivot": "last"},
    {"pivot": "random"}, {"sigma": 1.5}, {"sigma_mode": "mean_distance"}, {"value_scale": "mean"},
    {"value_scale": "log_bias"}, {"merge": False}, {"recent_fraction": 0.05, "topk_fraction": 0.0},
    {"group_reduce": "max"},
]  # fmt: skip
EVICTING = [{}, {"start_tokens": 0}, {"recent_share": 0.1}, {"group_reduce": "max"}, {"merge": False}]
KEEPING = [
    {}, {"threshold": 0.5}, {"threshold": -1.0}, {"threshold": 1.0}, {"merge_keys": False}, {"group_reduce": "max"},
    {"distance_weight": 3.0, "observation_tokens": 5}, {"start_tokens": 0, "recent_share": 0.2},
    {"row_scale": "softmax"}, {"row_scale": "raw_per_head"}, {"row_scale": "raw_per_head", "group_reduce": "max"},
]  # fmt: skip
VOTING = [
    {}, {"pooling": "avg", "kernel_tokens": 5}, {"kernel_tokens": 1}, {"group_reduce": "max"},
    {"group_reduce": "first", "pooling": "avg"}, {"observation_tokens": 1},
]  # fmt: skip
BASES = [
    SnapKV(observation_tokens=12), SnapKV(observation_tokens=5, pooling="avg"), PyramidKV(), Knorm(),
    Knorm(recent_tokens=6), ExpectedAttention(future_tokens=20),
]  # fmt: skip
REFITTED = [
    {}, {"refit": "values"}, {"refit": "none"}, {"place": "own"}, {"sample": "window"},
    {"sample": "window", "place": "own"},
    {"guard_share": 0.0, "value_cap_ratio": 10.0, "key_cap_ratio": 10.0, "ridge": 0.1}, {"fit_queries": 100},
    {"base": SnapKV(observation_tokens=8)}, {"base": Knorm(), "guard_share": 0.5}, {"tolerance": 0.3},
    {"base": AdaKV(base=ExpectedAttention(future_tokens=20))},
    {"base": CriticalAdaKV(base=SnapKV(observation_tokens=6))},
]  # fmt: skip
DENSE = [
    {}, {"dense_slots": 3, "tail_share": 0.4, "bias_scale": 0.6}, {"dense_slots": 100}, {"merge": False},
    {"observation_tokens": 5, "decay": 0.5}, {"group_reduce": "max"}, {"tail_share": 1.0, "decay": 1.0},
]  # fmt: skip
COMPACT = [
    {"tile_tokens": 16, "sketch_dimensions": 10}, {"terms": "leverage", "sketch_dimensions": 7}, {"terms": "attention"},
    {"blending": 0.0, "tile_tokens": 1}, {"blending": 3.0, "start_tokens": 0, "end_tokens": 0},
]  # fmt: skip
SHORT = {
    "reach_queries": 10,
    "recent_tokens": 5,
    "question_queries": 4,
    "kernel_tokens": 5,
    "text_queries": 20,
    "refit_queries": 8,
}
POLICIES = [
    *(H2O(budget=0.35, recent_share=0.4, group_reduce=reduce, normalise_by_count=by_count)
      for reduce in ("mean", "max", "first") for by_count in (False, True)),
    H2O(budget=0.35), CaM(budget=0.35), CaM(budget=0.35, start_share=0.1),
    *(StreamingLLM(budget=0.35, start_tokens=start) for start in (0, 4, 9)),
    *(TOVA(budget=0.35, keep_newest=keep) for keep in (False, True)),
    *(SnapKV(budget=0.5, **{"observation_tokens": 16, **options}) for options in VOTING),
    PyramidKV(budget=0.4), Knorm(budget=0.4), Knorm(budget=0.4, recent_tokens=7),
    *(ExpectedAttention(budget=0.4, **{"future_tokens": 20, **options}) for options in EXPECTED),
    *(AdaKV(budget=0.4, base=base, floor_share=share) for base in BASES for share in (0.0, 0.2, 1.0)),
    *(KVMerger(budget=0.5, **options) for options in MERGING),
    *(KVMerger(budget=0.35, budget_mode="threshold", threshold=0.8, **options) for options in MERGING),
    KVMergerBias(budget=0.35),
    *(GRKV(budget=0.4, **{"base": AdaKV(base=SnapKV(observation_tokens=8)), "fit_queries": 12, **options})
      for options in REFITTED),
    *(KVMergerPlus(budget=0.4, refit=refit, **SHORT) for refit in ("both", "values", "none")),
    *(D2O(budget=0.6, **options) for options in EVICTING),
    *(WeightedKV(budget=budget, **options) for options in EVICTING for budget in (0.15, 0.5)),
    *(KeepKV(budget=0.4, **options) for options in KEEPING),
    *(LagKV(budget=0.4, lag_tokens=lag, cross_scoring=raw) for lag in (2, 9, 16) for raw in (False, True)),
    *(ChunkKV(budget=0.4, base=base, chunk_tokens=size) for base in BASES[1:] for size in (1, 7, 20)),
    *(Compactor(budget=0.4, **options) for options in COMPACT),
    *(ZSMerge(budget=0.4, **options) for options in DENSE),
]  # fmt: skip
SMALL = SnapKV(observation_tokens=8)
CRITICAL = [{}, {"first_stage_share": 0.0}, {"first_stage_share": 1.0}, {"epsilon": 0.1}, {"base": ExpectedAttention()}]
DEFENSIVE = [{}, {"window_mass": "own"}, {"first_stage_mass": 0.3}, {"first_stage_mass": 1.0}, {"kernel_tokens": 1}]
POLICIES += [
    *(kind(budget=0.4, **{"base": SMALL, **options}) for kind in (CriticalKV, CriticalAdaKV) for options in CRITICAL),
    *(CriticalAdaKV(budget=0.4, base=SMALL, floor_share=share) for share in (0.0, 0.6, 1.0)),
    *(kind(budget=0.4, **{"observation_tokens": 8, **options})
      for kind in (DefensiveKV, LayerDefensiveKV) for options in DEFENSIVE),
    *(KVzip(budget=0.4, selection=kind) for kind in ("global", "layerwise", "uniform")),
    KVzip(budget=0.4, start_tokens=1), CAKE(budget=0.4, observation_tokens=8),
    CAKE(budget=0.4, observation_tokens=5, gamma=0.0, kernel_tokens=3),
]  # fmt: skip
NEW = load_policies().keys() - {policy.name for policy in POLICIES} - {"full"}
POLICIES += [build_policy(name, {"budget": 0.4}) for name in sorted(NEW)]  # a method needs a twin, and no line here
LAYERS = [(4, 4, 61, False), (4, 4, 61, True), (6, 2, 97, False), (6, 2, 97, True), (3, 1, 41, True)]


def named(policy) -> str:
    return f"{policy.name} {policy.budget} {' '.join(f'{name}={value}' for name, value in policy.options().items())}"


@pytest.mark.parametrize("policy", POLICIES, ids=named)
@pytest.mark.parametrize(("n_query_heads", "n_kv_heads", "n_tokens", "correlated"), LAYERS)
def test_a_method_is_its_twin(n_query_heads, n_kv_heads, n_tokens, correlated, policy):
    layer = make_layer(n_query_heads, n_kv_heads, n_tokens, seed=11, correlated=correlated)
    layer.keys *= torch.linspace(0.5, 2.0, n_kv_heads).reshape(-1, 1, 1)  # heads of different norm
    layer.extras["queries"] += 1.5  # a mean, so that the rotation of the mean matters
    layer.extras["rotary_frequencies"] = layer.extras["rotary_frequencies"][: 8 if n_kv_heads == 4 else 6]
    per_head = policy.layer_budgets(n_tokens, layer.n_layers)[layer.layer_index]
    m = per_head * n_kv_heads if policy.allocates else per_head
    expected = assert_as_twin(policy, layer, m)
    slots = sum(len(positions) for positions, *_ in expected)
    if policy.exact_budget:
        assert slots == n_kv_heads * per_head
    elif correlated:
        assert slots < 0.9 * n_kv_heads * per_head  # something merged
    if isinstance(policy, KVMerger | EvictAndMerge) and policy.merge and correlated:
        change = relative_rms(
            torch.cat([values for _, _, values, _ in expected]),
            torch.cat([layer.values[h, positions] for h, (positions, *_) in enumerate(expected)]),
        )
        assert change == 0.0 if getattr(policy, "threshold", 0.0) == 1.0 else change > 0.1
    if isinstance(policy, AdaKV) and policy.floor_share == 1.0:
        alone = policy.base.compress(layer, per_head).positions.tolist()
        assert [positions for positions, *_ in expected] == alone


TEXT = " ".join(
    f"On day {day} the harbour master wrote down {day * 37 % 101} ships, a {wind} wind and nothing else of note."
    for day, wind in enumerate(["north", "warm", "steady", "cold", "western", "rising"] * 3)
)
REAL = [
    H2O(budget=0.35), CaM(budget=0.35), SnapKV(budget=0.35), Knorm(budget=0.35), TOVA(budget=0.35),
    CriticalKV(budget=0.35), CriticalAdaKV(budget=0.35), DefensiveKV(budget=0.35), LayerDefensiveKV(budget=0.35),
    CAKE(budget=0.35), ExpectedAttention(budget=0.35, future_tokens=16), D2O(budget=0.4), WeightedKV(budget=0.35),
    KeepKV(budget=0.35),
    KVMerger(budget=0.5), KVMerger(budget=0.35), KVMergerBias(budget=0.35), KVMerger(budget=0.35, linkage="anchor"),
    KVMerger(budget=0.35, scope="layer", sigma_mode="mean_distance"), KVMerger(budget=0.5, budget_mode="threshold"),
    KVMerger(budget=0.5, budget_mode="threshold", linkage="anchor"),
]  # fmt: skip


@pytest.fixture(scope="module")
def layers(smollm2) -> dict[int, LayerStates]:
    input_ids = smollm2.tokenizer(TEXT, return_tensors="pt").input_ids[:, :201]  # odd length
    states: list[LayerStates] = []
    observer = Observer(
        needs=frozenset({"column_sums", "window_attention", "window_logsumexp", "queries", "rotary_frequencies"}
        | {"output_weight"}),
        window_tokens=32, given={"output_weight": output_weights(smollm2.model)},
        n_layers=30, n_query_heads=9, seed=1, on_layer=states.append, kernels="torch", config=smollm2.model.config,
    )  # fmt: skip
    with torch.no_grad(), attention_implementation(smollm2.model):
        smollm2.model(input_ids=input_ids, use_cache=False, logits_to_keep=1, attention_context=observer)
    assert len(states) == 30
    return {index: states[index] for index in (1, 8, 20)}


@pytest.mark.model
@pytest.mark.parametrize("index", [1, 8, 20])
@pytest.mark.parametrize("policy", REAL, ids=named)
def test_a_method_is_its_twin_on_real_keys(layers, index, policy):
    layer = layers[index]
    if index < getattr(policy, "whole_first_layers", 0):
        policy = dataclasses.replace(policy, whole_first_layers=0)
    m = policy.layer_budgets(layer.n_tokens, layer.n_layers)[index]
    assert_as_twin(policy, layer, m * layer.n_kv_heads if policy.allocates else m)


@pytest.mark.model
def test_the_keys_are_as_similar_as_reported(layers):
    cosines = torch.cat([cosines_at(unit_keys(states.keys), 1, False).flatten() for states in layers.values()])
    assert 0.7 < float(cosines.mean()) < 0.95
