"""Hybrid models: layers with a sliding window are left alone, the others compressed, and the report tells which."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from small_decoders import FULL, SLIDING, assert_same_answers, build, padded, prompt

import kvbench
from kvbench.errors import ModelError
from kvbench.methods.base import CompressedLayer, LayerStates, Policy
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O

WINDOW = 16
HYBRIDS = {
    "qwen2": {"layer_types": [FULL, SLIDING, FULL], "use_sliding_window": True, "sliding_window": WINDOW},
    "gemma2": {"layer_types": [SLIDING, FULL, FULL], "attn_logit_softcapping": 2.0, "sliding_window": WINDOW},
    "gemma3_text": {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": WINDOW},
}
GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}


@dataclass(frozen=True, kw_only=True)
class Newest(Policy):
    """Keeps the newest tokens: what a mask in an ordinary forward pass can imitate."""

    name: ClassVar[str] = "newest"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = torch.arange(layer.n_tokens - budget_tokens, layer.n_tokens)
        return CompressedLayer(layer.keys[:, kept], layer.values[:, kept], kept.expand(layer.n_kv_heads, -1))


def masked_greedy(model, ids, kept, new_tokens):
    """Greedy tokens of a model without any cache, whose full layers hide the evicted tokens from later queries."""
    n_tokens = ids.shape[1]
    for _ in range(new_tokens):
        length = ids.shape[1]
        query, key = torch.arange(length)[:, None], torch.arange(length)
        causal = key <= query
        visible = causal & ((query < n_tokens) | (key >= n_tokens - kept))
        window = causal & (query - key < WINDOW)
        masks = {
            name: torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]
            for name, mask in ((FULL, visible), (SLIDING, window))
        }
        with torch.no_grad():
            logits = model(ids, attention_mask=masks, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.index_fill(1, torch.tensor([2]), -torch.inf).argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("family", HYBRIDS)
def test_evicted_tokens_are_hidden_from_full_layers_only(family):
    model, ids = build(family, **HYBRIDS[family]), prompt(40)
    model.set_attn_implementation("eager")
    expected = masked_greedy(model, ids, kept=12, new_tokens=10)
    assert expected.tolist() != masked_greedy(model, ids, kept=40, new_tokens=10).tolist()
    with kvbench.compress(model, Newest(budget=0.3)):
        assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("options", [{"output_logits": True}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_whole_cache_changes_no_token(family, options):
    model = build(family, **HYBRIDS[family])
    model.set_attn_implementation("eager")  # older transformers pass over soft caps in their SDPA
    inputs = padded([prompt(31, seed=1), prompt(9, seed=2)])
    options = {**GREEDY, **options, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    with kvbench.compress(model, Full()):
        assert_same_answers(model, expected, inputs, **options)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_row_of_a_batch_answers_as_alone(family):
    model, prompts = build(family, **HYBRIDS[family]), [prompt(31, seed=1), prompt(40, seed=2)]
    with kvbench.compress(model, H2O(budget=0.4)):
        together = model.generate(**padded(prompts), **GREEDY)[:, 40:]
        alone = [model.generate(ids, **GREEDY)[0, ids.shape[1] :] for ids in prompts]
    assert together.tolist() == [answer.tolist() for answer in alone]


@torch.no_grad()
def test_a_mask_that_is_too_short_is_refused_in_a_window_too():
    model, inputs = build("gemma3_text", **HYBRIDS["gemma3_text"]), padded([prompt(15), prompt(9)])
    inputs["attention_mask"] = inputs["attention_mask"][:, 1:]
    with kvbench.compress(model, Full()) as cache, pytest.raises(ModelError, match=r"\(2, 14\) does not fit 15 tokens"):
        model(**inputs, past_key_values=cache)


def test_the_report_tells_layers_left_alone():
    model, ids = build("gemma3_text", **HYBRIDS["gemma3_text"]), prompt(40)
    with kvbench.compress(model, Newest(budget=0.3)) as cache:
        model.generate(ids, **GREEDY)
        report = cache.report()
    assert report.layers_left_alone == (0, 2)
    assert [layer.slots for layer in report.layers] == [2 * 15, 2 * 12, 2 * 15]
    assert [layer.full_slots for layer in report.layers] == [2 * 15, 2 * 40, 2 * 15]
    assert report.measured_budget == 12 / 40
    assert report.measured_bytes_ratio == (15 + 12 + 15) / (15 + 40 + 15)
    assert str(report).count("left alone") == 2
    assert "in 1 of 3 layers" in str(report)


def test_a_model_of_sliding_layers_alone_is_compressed_up_to_its_window():
    model, ids = build("mistral", sliding_window=WINDOW), prompt(40)
    with kvbench.compress(model, H2O(budget=0.5)) as cache:
        model.generate(prompt(10), max_new_tokens=7, min_new_tokens=7, do_sample=False)
        assert (cache.report().measured_budget, cache.report().layers_left_alone) == (0.5, ())
        for n_tokens, new_tokens, seen in ((17, 1, 17), (10, 8, 17)):
            with pytest.raises(ModelError, match=rf"{seen} tokens exceed the sliding window of 16, which every layer"):
                model.generate(prompt(n_tokens), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    model.config.sliding_window = None
    with kvbench.compress(model, H2O(budget=0.4)) as cache:
        model.generate(ids, **GREEDY)
    assert cache.report().measured_budget == 0.4


def test_a_window_as_wide_as_the_context_counts_as_full():  # Phi-3 of 128k tokens says 262,144
    ids = padded([prompt(40), prompt(31)])
    with kvbench.compress(full := build("phi3"), H2O(budget=0.4)):
        expected = full.generate(**ids, **GREEDY)
    with kvbench.compress(wide := build("phi3", sliding_window=512), H2O(budget=0.4)) as cache:
        assert torch.equal(wide.generate(**ids, **GREEDY), expected)
    assert cache.report().layers_left_alone == ()
    short, message = build("phi3", sliding_window=45, max_position_embeddings=45), "46 tokens exceed the sliding window"
    with kvbench.compress(short, H2O(budget=0.4)), pytest.raises(ModelError, match=message):
        short.generate(prompt(40), **GREEDY)


@dataclass(frozen=True, kw_only=True)
class Unequal(Newest):
    """Gives the first of two full layers two slots a head less than the other, and notes the output projections."""

    name: ClassVar[str] = "unequal"
    needs: ClassVar[frozenset[str]] = frozenset({"output_weight"})
    allocates: ClassVar[bool] = True
    seen: ClassVar[list[torch.Tensor]] = []

    def preference(self, layer: LayerStates) -> torch.Tensor:
        self.seen.append(layer.observed("output_weight"))
        return torch.zeros(1)

    def allocate(self, preferences, n_tokens, n_kv_heads):
        each = n_kv_heads * self.budget_tokens(n_tokens)
        return [each - n_kv_heads, each + n_kv_heads]

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        return super().compress(layer, budget_tokens // layer.n_kv_heads)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_full_layers_get_their_own_projection_and_share_the_slots_row_by_row(family):
    model = build(family, **HYBRIDS[family])
    Unequal.seen.clear()
    with kvbench.compress(model, Unequal(budget=0.5)) as cache:
        model.generate(**padded([prompt(40), prompt(31)]), **GREEDY)
    full = [index for index, kind in enumerate(HYBRIDS[family]["layer_types"]) if kind == FULL]
    for rank, weight in enumerate(Unequal.seen):
        projection = model.model.layers[full[rank // 2]].self_attn.o_proj.weight
        assert weight.data_ptr() == projection.data_ptr()
    slots = {layer.index: layer.slots for layer in cache.report().layers if layer.compressed}
    n_kv_heads = model.config.num_key_value_heads
    assert slots == {full[0]: n_kv_heads * (19 + 14), full[1]: n_kv_heads * (21 + 16)}
