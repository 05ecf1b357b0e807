"""A budget of 1 keeps everything, whatever the method: in both engines and in `compress()`, while decoding, too."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from engine_cases import answers, arm, request

import kvbench
from kvbench.methods.base import CompressedLayer, Policy
from kvbench.methods.registry import build_policy, load_policies
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Arm

N_TOKENS, NEW_TOKENS = 32, 16  # a prompt as long as the window of SnapKV, which leaves it nothing to choose


@dataclass(frozen=True, kw_only=True)
class LossyAtAnyBudget(Policy):
    """Keeps the last two tokens and, while decoding, one new one."""

    name: ClassVar[str] = "lossy"
    steps: ClassVar[bool] = True

    def compress(self, layer, budget_tokens):
        positions = torch.arange(layer.n_tokens - 2, layer.n_tokens).expand(layer.n_kv_heads, -1)
        return CompressedLayer(layer.keys[:, -2:], layer.values[:, -2:], positions)

    def step(self, slots, attention):
        for tensor in (slots.keys, slots.values):
            tensor[:, 0] = tensor[:, -1]


METHODS = [*(build_policy(name, {"budget": 1.0}) for name in load_policies()), LossyAtAnyBudget(budget=1.0)]


@pytest.fixture(scope="module")
def whole(tiny_gqa):
    """A prompt, and transformers' own answer to it."""
    ids = torch.randint(3, 250, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return ids, options, tiny_gqa.model.generate(ids, **options)[0, N_TOKENS:].tolist()


@pytest.mark.parametrize("policy", METHODS, ids=lambda policy: policy.name)
def test_every_method_answers_as_the_model_itself(tiny_gqa, whole, policy):
    ids, options, expected = whole
    prompt = tuple(ids[0].tolist())
    arms, changes = (Arm.of(policy), arm("h2o")), {"stop_ids": (), "gold_ids": prompt[:3]}
    asked = replace(request(arms, new_tokens=NEW_TOKENS), input_ids=prompt, compress_at=N_TOKENS, **changes)
    for engine in (PlainEngine(), FusedEngine()):
        first, second = answers(engine, tiny_gqa, [asked])
        assert first.token_ids == expected
        assert first.kl == pytest.approx([0.0] * 3, abs=1e-6)
        assert (sum(first.slots_per_layer), first.cache_bytes) == (first.full_slots, first.full_bytes)
        assert first.arm is arms[0]
        assert max(second.kl) > 1e-4
    with kvbench.compress(tiny_gqa.model, policy) as cache:
        answer = tiny_gqa.model.generate(ids, **options)
    assert answer[0, N_TOKENS:].tolist() == expected
    report = cache.report()
    assert (report.method, report.measured_budget, report.measured_bytes_ratio) == (policy.name, 1.0, 1.0)
