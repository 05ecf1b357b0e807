"""`kvbench.compress` with greedy decoding: our engine's tokens on every family of decoders."""

import pytest
from small_decoders import FAMILIES, build, loaded, prompt

import kvbench
from kvbench.engine.base import Arm, Job
from kvbench.engine.fused import FusedEngine
from kvbench.engine.plain import PlainEngine
from kvbench.policies.cam import CaM
from kvbench.policies.h2o import H2O
from kvbench.policies.kvmerger import KVMerger, KVMergerBias

WHOLE = {"whole_first_layers": 1, "whole_last_layers": 0}
POLICIES = [H2O(budget=0.35), CaM(budget=0.35), KVMerger(budget=0.5, **WHOLE), KVMergerBias(budget=0.5, **WHOLE)]
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def engine_result(engine, model, ids, policy):
    arm = Arm.of(policy)
    job = Job(0, tuple(ids[0].tolist()), ids.shape[1], (), (arm,), arm, (2,), max_new_tokens=12, min_new_tokens=12)
    (result,) = engine.run(loaded(model), [job])
    return result.arms[0]


def compressed(model, policy, inputs, **options):
    with kvbench.compress(model, policy) as cache:
        output = model.generate(**inputs, **{**GREEDY, **options})
    return output, cache


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_greedy_answers_are_the_engine_s(family, policy):
    model = build(family)
    ids = prompt(60, seed=3)
    output, cache = compressed(model, policy, {"input_ids": ids})
    expected = engine_result(PlainEngine(), model, ids, policy)  # which shares no decoding code with the library
    assert output[0, 60:].tolist() == expected.token_ids
    assert [layer.slots for layer in cache.report().layers] == expected.slots_per_layer


def test_compression_changes_answers():  # otherwise the tests above would prove little
    model, ids = build("llama"), prompt(60, seed=3)
    plain = model.generate(ids, **GREEDY)
    for policy in POLICIES:
        assert compressed(model, policy, {"input_ids": ids})[0].tolist() != plain.tolist()


def test_bytes_are_the_fused_engine_s():
    model, ids = build("llama"), prompt(60, seed=3)
    for policy in POLICIES:
        _, cache = compressed(model, policy, {"input_ids": ids})
        assert cache.report().n_bytes == engine_result(FusedEngine(), model, ids, policy).cache_bytes
