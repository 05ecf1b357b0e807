"""The fused engine against the plain one, and both against transformers' own greedy decoding."""

import dataclasses
import sys

import pytest
import torch
from engine_cases import answers, arm, assert_same, request

from kvbench.methods.knorm import Knorm
from kvbench.methods.pyramidkv import PyramidKV
from kvbench.methods.registry import load_policies
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.runtime import fused
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine

TWO_WHOLE = {"whole_first_layers": 1, "whole_last_layers": 0}
ARMS = (
    arm("full", 1.0), arm("h2o"), arm("h2o", 0.35, normalise_by_count=True, group_reduce="max"),
    arm("cam"), arm("cam", 0.35, merge=False),
    arm("kvmerger", **TWO_WHOLE), arm("kvmerger", **TWO_WHOLE, budget_mode="threshold", threshold=0.2),
    arm("kvmerger", 0.35, whole_first_layers=0, whole_last_layers=0, value_scale="log_bias"),
    arm("kvmerger_bias", 0.35), arm("kvmerger_plus", 0.35), arm("kvmerger_plus", refit="both"),
    arm("snapkv", 0.35, observation_tokens=4, kernel_tokens=3), arm("streaming_llm", 0.35),
    arm("knorm", 0.35, whole_first_layers=1, recent_tokens=2), arm("pyramidkv", 0.35, observation_tokens=3),
    arm("adakv", 0.35, base=PyramidKV(observation_tokens=3)), arm("adakv", 0.35, base=Knorm()), arm("tova", 0.35),
    arm("keepkv", 0.35, threshold=0.2, start_tokens=2), arm("weightedkv", 0.35, start_tokens=2),
    arm("d2o", **TWO_WHOLE), arm("expected_attention", 0.35, future_tokens=16, start_tokens=2),
)  # fmt: skip
ENGINES = (FusedEngine(), PlainEngine())


@pytest.fixture(scope="module", params=["tiny-random", "tiny-random-mha"])
def loaded(request, tiny_model):
    return tiny_model(request.param)


def requests(count, *, gold=5, new_tokens=8, **options):
    return [
        request(ARMS, index, 37 + 11 * index, gold=gold, new_tokens=new_tokens + index, **options)
        for index in range(count)
    ]


@pytest.mark.parametrize("question", [0, 6], ids=["after_question", "before_question"])
def test_fused_and_plain_give_the_same_tokens_and_numbers(loaded, question):
    todo = requests(3, question=question)
    plain = answers(PlainEngine(), loaded, todo)
    found = answers(FusedEngine(max_rows=4 * len(ARMS)), loaded, todo)
    assert found[0].settings["batch_samples"] == 2  # two rows an arm: the batch really mixes samples
    assert_same(found, plain, 2e-4)
    assert {len(answer.kl) for answer in found} == {5}
    first = found[: len(ARMS)]  # the arms differ, so that agreement is not trivial
    assert len({round(sum(answer.kl), 7) for answer in first}) >= len(ARMS) - 2
    assert sum(first[0].kl) == pytest.approx(0.0, abs=1e-5)


def test_full_arm_equals_transformers_generate(loaded):
    todo = requests(2, gold=0, new_tokens=20)
    full = [answer for answer in answers(FusedEngine(), loaded, todo) if answer.arm.key == "full"]
    for asked, answer in zip(todo, full, strict=True):
        output = loaded.model.generate(
            torch.tensor([asked.input_ids]), max_new_tokens=asked.max_new_tokens, do_sample=False, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        expected = output[0, len(asked.input_ids) :].tolist()
        assert answer.token_ids == (expected[: expected.index(2)] if 2 in expected else expected)


def test_stop_tokens_end_an_answer_but_not_before_the_minimum(loaded):
    (asked,) = requests(1, gold=0)
    free = answers(FusedEngine(), loaded, [asked])[0].token_ids
    stop, first = free[2], free.index(free[2])
    held = []
    for engine in ENGINES:
        answer = answers(engine, loaded, [dataclasses.replace(asked, stop_ids=(stop,))])[0]
        assert (answer.token_ids, answer.finish) == (free[:first], "stop")
        later = dataclasses.replace(asked, stop_ids=(stop,), min_new_tokens=first + 1)
        held.append(answers(engine, loaded, [later])[0].token_ids)
    assert held[0] == held[1]
    assert len(held[0]) > first
    assert stop not in held[0][: first + 1]


def test_a_cpu_without_triton_runs_every_method(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("kvbench.") and name.endswith("_triton")]:
        monkeypatch.delitem(sys.modules, name)
    assert len(answers(FusedEngine(), loaded, requests(1))) == len(ARMS)


def test_one_new_token_needs_no_decoding(loaded):
    found = answers(FusedEngine(), loaded, requests(1, gold=1, new_tokens=1))
    assert {(len(answer.token_ids), len(answer.kl)) for answer in found} == {(1, 1)}


def test_out_of_memory_halves_the_batch_and_says_so(loaded, monkeypatch):
    expected = answers(FusedEngine(), loaded, requests(2))
    original = fused._Session._attempt

    def limited(self, batch, notes):
        if sum(len(asked.arms) for asked in batch) > 5:
            raise torch.OutOfMemoryError("pretended")
        return original(self, batch, notes)

    monkeypatch.setattr(fused._Session, "_attempt", limited)
    found = answers(FusedEngine(max_rows=64), loaded, requests(2))
    assert_same(found, expected, 1e-5)
    assert all(any("halved" in note for note in answer.settings["notes"]) for answer in found)


# ---- Triton kernels, captured and compiled steps ---------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("shape", ["tiny-random", "tiny-random-mha"])
@pytest.mark.parametrize("question", [0, 5])
def test_triton_and_graphs_give_the_plain_engine_s_tokens(shape, question):
    arms = [arm(name, 1.0 if name == "full" else 0.5) for name in load_policies()]
    arms += [arm("h2o", 0.35, group_reduce="max"), arm("cam", 0.35), arm("kvmerger_bias", 0.35)]
    arms += [arm("kvmerger", **TWO_WHOLE), arm("kvmerger", **TWO_WHOLE, budget_mode="threshold", threshold=0.2)]
    loaded = load_model(named_config(shape, n_layers=8, dtype="float32", device="cuda"))
    options = {"question": question, "gold": 6, "demand_ids": ((5, 6, 7), (8, 9), (10,))}
    todo = [request(arms, i, 75 + 23 * i, new_tokens=12 + i, **options) for i in range(3)]
    found = answers(FusedEngine(max_rows=4 * len(arms)), loaded, todo)
    assert all(answer.settings["kernels"] == ["triton"] and answer.settings["cuda_graphs"] for answer in found)
    assert_same(found, answers(PlainEngine(), loaded, todo), 1e-3)


@pytest.mark.gpu
@on_gpu
def test_compiled_and_captured_steps_give_the_plain_engine_s_tokens():
    arms = [arm("full", 1.0), arm("h2o"), arm("cam"), arm("h2o", 0.35), arm("cam", 0.35)]
    loaded = load_model(named_config("tiny-random", dtype="float32", device="cuda"))
    for sizes in ([(60, 5)], [(83, 5), (106, 5)], [(129, 3)]):  # 10, 20 and 6 rows
        todo = [request(arms[:n], i, n_tokens, gold=5, new_tokens=16) for i, (n_tokens, n) in enumerate(sizes)]
        found = answers(FusedEngine(compile=True), loaded, todo)
        assert all(answer.settings["compiled"] and answer.settings["cuda_graphs"] for answer in found)
        assert_same(found, answers(PlainEngine(), loaded, todo), 1e-3)
