"""What policies may ask for beyond one prefill: a second pass, the output projection, budgets over all layers."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from engine_cases import answers, assert_same, request
from small_decoders import build, loaded, prompt
from wrong_policies import Newest, Shares

import kvbench
from kvbench.errors import ConfigError, ModelError
from kvbench.methods.base import CompressedLayer, LayerStates
from kvbench.methods.cake import CAKE
from kvbench.methods.criticalkv import CriticalAdaKV
from kvbench.methods.defensivekv import LayerDefensiveKV
from kvbench.methods.kvzip import KVzip
from kvbench.methods.snapkv import SnapKV
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.runtime import reconstruct as second_pass
from kvbench.runtime import requests
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.model_check import output_weights
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Arm

DEMANDS = ((5, 6, 7), (8, 9), (10,))


@dataclass(frozen=True, kw_only=True)
class Repeated(Newest):
    """Keep what is repeated; the sum of all scores is added to a value, so that every score shows."""

    name: ClassVar[str] = "repeated"
    needs: ClassVar[frozenset[str]] = frozenset({"reconstruction"})

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        scores = layer.observed("reconstruction")
        kept = scores.topk(budget_tokens).indices.sort(1).values
        rows = kept[..., None].expand(-1, -1, layer.keys.shape[-1])
        return CompressedLayer(layer.keys.gather(1, rows), layer.values.gather(1, rows) + scores.mean(), kept)


@pytest.fixture(scope="module")
def tiny():
    return load_model(named_config("tiny-random", n_layers=6, device="cpu"))


def arms(*policies):
    return [Arm.of(policy) for policy in policies]


def attention_of(model, ids, positions, mask):
    """Attention probabilities `(H, n, n)` of each layer, by transformers' own eager attention."""
    keep = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        found = model(
            input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), attention_mask=mask[None, None],
            output_attentions=True, use_cache=False,
        )  # fmt: skip
    finally:
        model.set_attn_implementation(keep)
    return [layer[0] for layer in found.attentions]


@torch.no_grad()
def test_scores_are_the_highest_attention_to_a_chunk_while_it_is_repeated(tiny, monkeypatch):
    monkeypatch.setattr(requests, "CHUNK_TOKENS", 17)
    monkeypatch.setattr(second_pass, "BLOCK_LOGITS", 16)  # several blocks of queries
    job = replace(request(arms(Repeated()), n_tokens=44, question=3), demand_ids=DEMANDS)
    scores, cost = second_pass.reconstruct(tiny, job, job.arms)
    assert len(scores) == 6
    assert len(job.repetitions()) == 3
    repeated = [ids for *_, ids in job.repetitions()]
    assert repeated[1][:11] == (8, 9, *job.input_ids[13:21], 10)
    assert cost["second_pass_tokens"] == 41 + sum(map(len, repeated))
    n = 41
    for first, last, ids in job.repetitions():
        whole, positions = [*job.input_ids[:n], *ids], [*range(n + len(ids))]
        hidden = torch.ones(len(whole), len(whole), dtype=torch.bool).triu(1)
        layers = attention_of(tiny.model, whole, positions, torch.zeros(hidden.shape).masked_fill(hidden, -1e30))
        seen = [*range(4), *range(first, last), *range(n, len(whole))]
        for layer, found in zip(layers, scores, strict=True):
            rows = layer[:, n:, seen]
            rows = rows / rows.sum(-1, keepdim=True)  # the softmax over a part is the whole one's, made to sum to 1
            best = rows[:, :, 4 : 4 + last - first].amax(1).unflatten(0, (found.shape[0], -1)).amax(1)
            torch.testing.assert_close(found[:, first:last], best, rtol=1e-4, atol=1e-6)
            assert bool((found[:, :4] == 1).all())


def test_both_engines_run_the_second_pass_and_record_what_it_costs(tiny):
    asked = [replace(request(arms(Repeated(budget=0.5), Newest()), index=i, question=4, gold=3), demand_ids=DEMANDS)
             for i in range(2)]  # fmt: skip
    fused, plain = (answers(engine, tiny, asked) for engine in (FusedEngine(), PlainEngine()))
    assert_same(fused, plain, 2e-4)
    for answer in (*fused, *plain):
        assert ("second_pass_seconds" in answer.settings) == (answer.arm.policy.name == "repeated")


def test_a_prompt_with_its_question_is_not_repeated(tiny):
    with pytest.raises(ConfigError, match=r"set protocol\.compress=before_question"):
        answers(FusedEngine(), tiny, [request(arms(Repeated()))])
    with pytest.raises(ConfigError, match="run it by the harness with"), kvbench.compress(tiny.model, Repeated()):
        pass
    long = replace(request(arms(Repeated()), n_tokens=1020), demand_ids=DEMANDS)
    with pytest.raises(ModelError, match="tokens of a prompt and what is repeated of it exceed the context of"):
        answers(FusedEngine(), replace(tiny, max_context_tokens=1500), [long])


def test_budgets_over_all_layers_are_the_same_in_engines_and_in_generate(tiny):
    asked = [request(arms(Shares(budget=0.41), Newest(budget=0.41)), index=i, gold=3) for i in range(2)]
    fused, plain = (answers(engine, tiny, asked) for engine in (FusedEngine(), PlainEngine()))
    assert_same(fused, plain, 2e-4)
    for answer in fused:
        assert sum(answer.slots_per_layer) == 6 * 2 * 16
        assert (len(set(answer.slots_per_layer)) > 1) == (answer.arm.policy.name == "shares")
    with kvbench.compress(tiny.model, Shares(budget=0.41), seed=0) as cache:
        ids = torch.tensor([asked[0].input_ids])
        output = tiny.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert [layer.slots for layer in cache.report().layers] == fused[0].slots_per_layer
    assert output[0, 40:].tolist()[: len(fused[0].token_ids)] == fused[0].token_ids


class Miser(Shares):
    def allocate(self, preferences, n_tokens, n_kv_heads):
        return [n_kv_heads] * len(preferences)


def test_a_wrong_total_is_the_sample_s_failure(tiny):
    outcomes = list(FusedEngine().run(tiny, [request(arms(Miser()))]))
    assert "shares allocates 12 slots to 6 layers, the budget is 240" in outcomes[0].reason


@torch.no_grad()
def test_the_output_weight_maps_heads_to_hidden_states(tiny):
    weights, layer = output_weights(tiny.model), tiny.model.model.layers[2].self_attn
    heads = torch.randn(5, *weights[2].shape[:2])
    expected = torch.nn.functional.linear(heads.flatten(1), layer.o_proj.weight)
    torch.testing.assert_close(torch.einsum("thd,hde->te", heads, weights[2]), expected, rtol=1e-4, atol=1e-5)
    assert weights[2].data_ptr() == layer.o_proj.weight.data_ptr()
    projection, layer.o_proj = layer.o_proj, torch.nn.Identity()
    try:
        with pytest.raises(ModelError, match=r"o_proj of layer 2 of .* is a Identity and no plain matrix"):
            output_weights(tiny.model)
    finally:
        layer.o_proj = projection


@pytest.mark.parametrize(("family", "options"), [("gemma2", {"attn_logit_softcapping": 2.0}), ("qwen2", {})])
def test_methods_that_ask_for_more_are_the_same_in_both_engines(family, options):
    window = {"budget": 0.5, "observation_tokens": 6}
    critical = CriticalAdaKV(budget=0.5, base=SnapKV(observation_tokens=6))
    policies = KVzip(budget=0.5), KVzip(budget=0.5, selection="uniform"), critical, CAKE(**window)
    asked = request(arms(*policies, LayerDefensiveKV(**window)), question=4, gold=3)
    ids = tuple(prompt(40)[0].tolist())
    asked = [replace(asked, input_ids=ids, gold_ids=ids[:3], demand_ids=DEMANDS)]
    model = loaded(build(family, **options))
    assert_same(*(answers(engine, model, asked) for engine in (FusedEngine(), PlainEngine())), 3e-4)
