"""`kvbench.compress` with greedy decoding: our engine's tokens on every family of decoders; a block leaves no trace."""

import contextlib
import functools
import gc
import weakref

import pytest
import torch
from small_decoders import FAMILIES, SIZES, ask, build, padded, prompt
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import kvbench
from kvbench.errors import BudgetError, ConfigError, KvbenchError, ModelError
from kvbench.methods.cam import CaM
from kvbench.methods.h2o import H2O
from kvbench.methods.kvmerger import KVMerger, KVMergerBias
from kvbench.methods.registry import build_policy, load_policies
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import RECONSTRUCTION

WHOLE = {"whole_first_layers": 1, "whole_last_layers": 0}
POLICIES = [H2O(budget=0.35), CaM(budget=0.35), KVMerger(budget=0.5, **WHOLE), KVMergerBias(budget=0.5, **WHOLE)]
POLICY = POLICIES[0]
NEW_TOKENS = 12
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}


def compressed(model, policy, ids):
    with kvbench.compress(model, policy) as cache:
        output = model.generate(ids, **GREEDY)
    return output, cache


def assert_as_in_the_engine(model, policy, ids):
    output, cache = compressed(model, policy, ids)
    expected = ask(PlainEngine(), model, ids, policy, NEW_TOKENS)  # which shares no decoding code with compress()
    assert output[0, ids.shape[1] :].tolist() == expected.token_ids
    assert [layer.slots for layer in cache.report().layers] == expected.slots_per_layer


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[3]], ids=["a step", "a bias"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_engine_s(family, policy):
    assert_as_in_the_engine(build(family), policy, prompt(60, seed=3))


@pytest.mark.parametrize(
    "name", [name for name, kind in load_policies().items() if name != "full" and RECONSTRUCTION not in kind().needs]
)
def test_every_method_answers_as_in_the_engine(name):
    """At its defaults, on a prompt and a model that leave it something to choose."""
    model, ids = build("llama", num_hidden_layers=8), prompt(150, seed=3)
    assert_as_in_the_engine(model, build_policy(name, {"budget": 0.5}), ids)


def test_compression_changes_answers_and_bytes_are_the_fused_engine_s():  # else the tests above would prove little
    model, ids = build("llama"), prompt(60, seed=3)
    plain = model.generate(ids, **GREEDY)
    for policy in POLICIES:
        output, cache = compressed(model, policy, ids)
        assert output.tolist() != plain.tolist()
        assert cache.report().n_bytes == ask(FusedEngine(), model, ids, policy, NEW_TOKENS).cache_bytes


def live_bytes():
    """Bytes of all tensors' storages that the interpreter can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and type(thing) is not FakeTensor:  # left by tests that compile
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def traces(model):
    """All that a block might leave behind on a model and in transformers' registers."""
    return {
        "config": model.config.to_dict(),
        "attention": [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        "generation": model.generation_config.to_dict(),
        "attributes": sorted(vars(model)),
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "functions": {name: function for name, function in AttentionInterface().items() if "kvbench" not in name},
        "masks": {name: function for name, function in AttentionMaskInterface().items() if "kvbench" not in name},
        "generate": getattr(model.generate, "__func__", None),
    }


class Stop(Exception):
    """What a user's own code raises in the middle of an answer."""


class RaisingStreamer:
    """Raises when the fifth token comes; the prompt is the first call."""

    calls = 0

    def put(self, value):
        self.calls += 1
        if self.calls == 6:
            raise Stop

    def end(self):
        """Never reached."""


@pytest.mark.parametrize("fails", [False, True], ids=["after an answer", "after an exception"])
def test_a_block_leaves_no_trace(fails):
    model, ids = build("qwen3"), prompt(60)
    plain = model.generate(ids, **GREEDY)
    before, bytes_before = traces(model), live_bytes()
    ended = pytest.raises(Stop) if fails else contextlib.nullcontext()
    with ended, kvbench.compress(model, POLICY) as cache:
        assert traces(model)["attention"] != before["attention"]
        model.generate(ids, **GREEDY)
        assert cache.allocated_bytes >= cache.report().n_bytes
        assert live_bytes() < bytes_before + cache.allocated_bytes + 4096  # small tables, and nothing of the full cache
        if fails:
            model.generate(ids, streamer=RaisingStreamer(), **GREEDY)
    assert traces(model) == before
    assert cache.allocated_bytes == 0
    reference = weakref.ref(cache)
    del cache, ended
    assert live_bytes() == bytes_before
    assert reference() is None  # the registered functions hold nothing
    assert torch.equal(model.generate(ids, **GREEDY), plain)


def test_a_model_that_brings_its_own_generate_gets_it_back():
    model = build("llama")
    model.generate = own = functools.partial(type(model).generate, model)
    assert compressed(model, POLICY, prompt(60))[1].report().new_tokens == NEW_TOKENS - 1
    assert model.generate is own


def test_an_exception_frees_the_cache_and_the_next_prompt_starts_anew():
    model, ids = build("llama"), prompt(60)
    expected, done = compressed(model, POLICY, ids)
    report = done.report()  # outlives the block
    assert (report.method, report.requested_budget, report.prompt_tokens) == ("h2o", 0.35, (60,))
    assert (report.measured_budget, report.allocated_bytes, report.layers_left_alone) == (21 / 60, 0, ())
    with kvbench.compress(model, POLICY) as cache:
        with pytest.raises(Stop):
            model.generate(ids, streamer=RaisingStreamer(), **GREEDY)
        assert cache.allocated_bytes == 0
        with pytest.raises(KvbenchError, match="0 prompts were read"):
            cache.report()
        assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": build("llama")}, r"\(assistant_model=LlamaForCausalLM\) .* use assistant_model=None"),
        ({"prompt_lookup_num_tokens": 3}, r"\(prompt_lookup_num_tokens=3\) .* use prompt_lookup_num_tokens=None"),
        ({"prefill_chunk_size": 16}, r"generate\(prefill_chunk_size=16\) .* use prefill_chunk_size=None"),
        ({"cache_implementation": "static"}, r"generate\(cache_implementation=static\)"),
        ({"output_attentions": True}, r"generate\(output_attentions=True\) .* use output_attentions=False"),
        ({"use_cache": False}, r"generate\(use_cache=False\) .* use use_cache=True"),
        ({"generation_config": GenerationConfig(prefill_chunk_size=16)}, r"prefill_chunk_size=16"),
        ({"past_key_values": DynamicCache()}, r"past_key_values is a DynamicCache, only the block's own"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    model = build("llama")
    with kvbench.compress(model, POLICY), pytest.raises(KvbenchError, match=message):
        model.generate(prompt(60), max_new_tokens=4, **options)


def test_options_of_the_model_itself_are_refused_too():
    model = build("llama")
    model.generation_config.prefill_chunk_size = 16
    with kvbench.compress(model, POLICY), pytest.raises(ConfigError, match="prefill_chunk_size=16"):
        model.generate(prompt(60), max_new_tokens=4)
    model.generation_config = GenerationConfig(cache_implementation="hybrid", pad_token_id=0)  # older Gemma checkpoints
    with kvbench.compress(model, POLICY):
        model.generate(prompt(60), max_new_tokens=4)


def test_a_method_may_be_given_by_its_name_with_its_options():
    model, ids = build("llama", num_hidden_layers=8), prompt(60, seed=3)
    expected, _ = compressed(model, KVMerger(budget=0.5, **WHOLE), ids)
    with kvbench.compress(model, "kvmerger", budget=0.5, **WHOLE) as cache:
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert cache.policy == KVMerger(budget=0.5, **WHOLE)
    for policy, options, message in (
        ("kvmergr", {"budget": 0.5}, "unknown method 'kvmergr'"),
        ("h2o", {"budgett": 0.5}, "unknown option budgett for method h2o"),
        (POLICY, {"budget": 0.5}, "budget=0.5: options go with a method's name"),
    ):
        with pytest.raises(ConfigError, match=message), kvbench.compress(model, policy, **options):
            pass


def test_the_report_folds_equal_layers_and_says_what_a_slot_is():
    model = build("llama", num_hidden_layers=8)
    folded = str(compressed(model, H2O(budget=0.5), prompt(60))[1].report()).splitlines()
    assert len(folded) == 4  # a heading, the columns, one row, what a slot is
    assert folded[2].split()[0] == "0-7"
    assert folded[2].endswith("each of 8 alike")
    report = compressed(model, KVMerger(budget=0.5, **WHOLE), prompt(60))[1].report()
    header, columns, *rows, legend = str(report).splitlines()
    assert header.startswith("kvmerger, budget 0.5 requested, ")
    assert columns.split() == ["layers", "slots", "of", "full", "bytes", "of", "full"]
    assert legend.startswith("slots: ")
    told = {}
    for name, slots, *_ in map(str.split, rows):
        first, _, last = name.partition("-")
        told |= dict.fromkeys(range(int(first), int(last or first) + 1), int(slots.replace(",", "")))
    assert told == {layer.index: layer.slots for layer in report.layers}
    assert len(rows) < 8


def test_nested_blocks_are_refused():
    model = build("llama")
    before = traces(model)
    message = r"LlamaForCausalLM is inside a compress\(\) block already, at most 1"
    with kvbench.compress(model, POLICY) as cache:
        with pytest.raises(ModelError, match=message), kvbench.compress(model, H2O(budget=0.5)):
            pass
        model.generate(prompt(60), **GREEDY)  # the outer block goes on
        assert cache.report().requested_budget == 0.35
    assert traces(model) == before


def image_model():
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    text = {**SIZES, "layer_types": ["full_attention"] * 3}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("make", "policy", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), POLICY, "Linear is no PreTrainedModel"),
        (lambda: build("llama"), 0.35, r"policy=0.35 is no Policy: .* KVMerger\(budget=0.35\)"),
        (lambda: build("llama"), H2O, "is no Policy"),
        (image_model, POLICY, "not a decoder of text alone: .* Gemma3ForCausalLM"),
        (t5, POLICY, "not a decoder of text alone"),
    ],
    ids=["no model", "a number", "a class", "images", "an encoder"],
)
def test_models_and_policies_that_cannot_be_used_are_refused(make, policy, message):
    with pytest.raises(KvbenchError, match=message), kvbench.compress(make(), policy):
        pass


def test_a_budget_too_small_for_a_row_is_refused_in_one_line():
    model, message = build("llama"), r"budget 0\.35 of 9 tokens = 3 slots"
    with kvbench.compress(model, POLICY), pytest.raises(BudgetError, match=message):
        model.generate(**padded([prompt(60), prompt(9)]), max_new_tokens=4)
