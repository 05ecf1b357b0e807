"""The fused engine against the plain one, and both against transformers' own greedy decoding."""

import sys

import pytest
import torch

from kvbench.methods.knorm import Knorm
from kvbench.methods.pyramidkv import PyramidKV
from kvbench.methods.registry import build_policy
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Answer, Arm, Request

SMALL_MODEL_OPTIONS = {
    "kvmerger": {"whole_first_layers": 1, "whole_last_layers": 0},
    "snapkv": {"observation_tokens": 4, "kernel_tokens": 3},
}
ARMS = [
    ("full", 1.0, {}),
    ("h2o", 0.5, {}),
    ("h2o", 0.35, {"normalise_by_count": True, "group_reduce": "max"}),
    ("cam", 0.5, {}),
    ("cam", 0.35, {"merge": False}),
    ("kvmerger", 0.5, {}),
    ("kvmerger", 0.5, {"budget_mode": "threshold", "threshold": 0.2}),
    ("kvmerger", 0.35, {"whole_first_layers": 0, "value_scale": "log_bias"}),
    ("kvmerger_bias", 0.35, {}),
    ("kvmerger_plus", 0.35, {}),
    ("kvmerger_plus", 0.5, {"refit": "both"}),
    ("snapkv", 0.35, {}),
    ("streaming_llm", 0.35, {}),
    ("knorm", 0.35, {"whole_first_layers": 1, "recent_tokens": 2}),
    ("pyramidkv", 0.35, {"observation_tokens": 3}),
    ("adakv", 0.35, {"base": PyramidKV(observation_tokens=3)}),
    ("adakv", 0.35, {"base": Knorm()}),
    ("tova", 0.35, {}),
    ("keepkv", 0.35, {"threshold": 0.2, "start_tokens": 2}),
    ("weightedkv", 0.35, {"start_tokens": 2}),
    ("d2o", 0.5, {"whole_first_layers": 1, "whole_last_layers": 0}),
    ("expected_attention", 0.35, {"future_tokens": 16, "start_tokens": 2}),
]


def arms() -> tuple[Arm, ...]:
    return tuple(
        Arm.of(build_policy(name, {"budget": budget, **SMALL_MODEL_OPTIONS.get(name, {}), **options}))
        for name, budget, options in ARMS
    )


@pytest.fixture(scope="module", params=["tiny-random", "tiny-random-mha"])
def loaded(request):
    return load_model(named_config(request.param, device="cpu"))


def jobs(count: int, *, question: int = 0, gold: int = 5, new_tokens: int = 8, seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        n_tokens = 37 + 11 * index
        ids = tuple(torch.randint(3, 250, (n_tokens,), generator=generator).tolist())
        golden = tuple(torch.randint(3, 250, (gold,), generator=generator).tolist())
        made.append(
            Request(
                index=index, input_ids=ids, compress_at=n_tokens - question, gold_ids=golden, arms=arms(),
                reference=arms()[0], stop_ids=(2,), max_new_tokens=new_tokens + index, seed=index,
            )
        )  # fmt: skip
    return made


def answers(engine, loaded, requests) -> list[Answer]:
    """In the order of requests and arms, whatever order they came in."""
    found = list(engine.run(loaded, requests))
    assert all(isinstance(answer, Answer) for answer in found), found
    return sorted(found, key=lambda answer: answer.index)


@pytest.mark.parametrize("question", [0, 6], ids=["after_question", "before_question"])
def test_fused_and_plain_give_the_same_tokens_and_numbers(loaded, question):
    todo = jobs(3, question=question)
    plain = answers(PlainEngine(), loaded, todo)
    fused = answers(FusedEngine(max_rows=4 * len(ARMS)), loaded, todo)
    assert fused[0].settings["batch_samples"] == 2  # two rows an arm: the batch really mixes samples
    for expected, got in zip(plain, fused, strict=True):
        assert got.token_ids == expected.token_ids, got.arm.key
        for name in ("index", "arm", "finish", "slots_per_layer", "compressed_tokens", "full_slots", "full_bytes"):
            assert getattr(got, name) == getattr(expected, name), name
        assert got.gold_nll == pytest.approx(expected.gold_nll, abs=2e-4)
        assert got.kl == pytest.approx(expected.kl, abs=2e-4)
        assert len(got.kl) == len(todo[got.index].gold_ids)


def test_the_arms_differ_so_that_agreement_is_not_trivial(loaded):
    found = answers(FusedEngine(), loaded, jobs(1))
    kls = {round(sum(answer.kl), 7) for answer in found}
    assert len(kls) >= len(ARMS) - 2
    assert sum(found[0].kl) == pytest.approx(0.0, abs=1e-5)


def test_full_arm_equals_transformers_generate(loaded):
    todo = jobs(2, gold=0, new_tokens=20)
    full = [answer for answer in answers(FusedEngine(), loaded, todo) if answer.arm.key == "full"]
    for job, answer in zip(todo, full, strict=True):
        output = loaded.model.generate(
            torch.tensor([job.input_ids]), max_new_tokens=job.max_new_tokens, do_sample=False, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        expected = output[0, len(job.input_ids) :].tolist()
        expected = expected[: expected.index(2)] if 2 in expected else expected
        assert answer.token_ids == expected


def test_stop_tokens_end_an_answer_but_not_before_the_minimum(loaded):
    free = answers(FusedEngine(), loaded, jobs(1, gold=0))[0].token_ids
    stop = free[2]
    first = free.index(stop)
    stopped = [Request(**{**vars(jobs(1, gold=0)[0]), "stop_ids": (stop,)})]
    for engine in (FusedEngine(), PlainEngine()):
        answer = answers(engine, loaded, stopped)[0]
        assert (answer.token_ids, answer.finish) == (free[:first], "stop")
    held = [Request(**{**vars(stopped[0]), "min_new_tokens": first + 1})]
    longer = [answers(engine, loaded, held)[0].token_ids for engine in (FusedEngine(), PlainEngine())]
    assert longer[0] == longer[1]
    assert len(longer[0]) > first
    assert stop not in longer[0][: first + 1]


def test_a_cpu_without_triton_runs_every_method(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("kvbench.") and name.endswith("_triton")]:
        monkeypatch.delitem(sys.modules, name)
    assert len(answers(FusedEngine(), loaded, jobs(1))) == len(ARMS)


def test_one_new_token_needs_no_decoding(loaded):
    job = Request(**{**vars(jobs(1, gold=1)[0]), "max_new_tokens": 1})
    assert {(len(answer.token_ids), len(answer.kl)) for answer in answers(FusedEngine(), loaded, [job])} == {(1, 1)}


def test_out_of_memory_halves_the_batch_and_says_so(loaded, monkeypatch):
    from kvbench.runtime import fused

    todo = jobs(2)
    expected = answers(FusedEngine(), loaded, todo)
    original = fused._Session._attempt

    def limited(self, jobs_, notes):
        if sum(len(job.arms) for job in jobs_) > 5:
            raise torch.OutOfMemoryError("pretended")
        return original(self, jobs_, notes)

    monkeypatch.setattr(fused._Session, "_attempt", limited)
    for got, wanted in zip(answers(FusedEngine(max_rows=64), loaded, todo), expected, strict=True):
        assert (got.index, got.arm, got.token_ids) == (wanted.index, wanted.arm, wanted.token_ids)
        assert got.kl == pytest.approx(wanted.kl, abs=1e-5)
        assert any("halved" in note for note in got.settings["notes"])
