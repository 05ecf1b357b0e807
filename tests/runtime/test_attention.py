"""The attention adapter: models of every family reach their context, and nothing that it cannot heed goes past it."""

import re
import subprocess
import sys

import pytest
import torch
from small_decoders import build, padded, prompt
from transformers import DynamicCache, GenerationMixin

import kvbench
from kvbench.errors import KvbenchError, ModelError
from kvbench.methods.h2o import H2O
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.observe import Observer

POLICY = H2O(budget=0.4)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3"]


def observer(on_layer=lambda states: None):
    return Observer(frozenset({"column_sums"}), 0, 3, 4, 0, on_layer)


@pytest.fixture(scope="module")
def model():
    return build("llama")


# ---- a context given with the call -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_the_plain_model(family, implementation):
    model, ids, states = build(family), prompt(77), []
    model.set_attn_implementation(implementation)
    expected = model(input_ids=ids, use_cache=False).logits
    with attention_implementation(model):
        got = model(input_ids=ids, use_cache=False, attention_context=observer(states.append)).logits
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    assert float((got - expected).norm() / expected.norm()) < 2e-6
    assert [layer.layer_index for layer in states] == [0, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_observer_would_ignore_is_refused(family):
    model, ids = build(family), prompt(77)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    packed = torch.cat([torch.arange(30), torch.arange(47)])[None]
    with attention_implementation(model):
        with pytest.raises(KvbenchError, match=r"layer 0 of \w+ ran without attention_context="):
            model(input_ids=ids, use_cache=False)
        for options, message in [
            ({"attention_mask": padding}, "attention_mask hides 3 tokens"),
            ({"attention_mask": torch.ones(1, 1, 77, 77, dtype=torch.bool)}, "attention_mask of shape"),
            ({"position_ids": packed}, "77 position_ids that describe several packed sequences"),
        ]:
            with pytest.raises(KvbenchError, match=re.escape(message)):
                model(input_ids=ids, use_cache=False, attention_context=observer(), **options)
        model(input_ids=ids, use_cache=False, attention_context=observer(), attention_mask=torch.ones_like(ids))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "message"),
    [("mistral", "77 tokens exceed the model's sliding window of 76"), ("phimoe", "attention_mask of shape .* window")],
)
def test_a_prompt_longer_than_a_sliding_window_is_refused(family, message):
    model, ids = build(family, sliding_window=76), prompt(77)  # Phimoe does not tell its layers their window
    with attention_implementation(model):
        model(input_ids=ids[:, :76], use_cache=False, attention_context=observer())
        with pytest.raises(KvbenchError, match=message):
            model(input_ids=ids, use_cache=False, attention_context=observer())


def test_the_former_implementation_returns_after_an_exception_and_nested_blocks():
    model, other = build("llama"), build("qwen2")
    block = attention_implementation(model)
    block.__enter__()
    assert model.config._attn_implementation == "kvbench"
    assert not block.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert model.config._attn_implementation == "sdpa"
    with attention_implementation(model):
        with attention_implementation(model), attention_implementation(other):
            pass
        assert (model.config._attn_implementation, other.config._attn_implementation) == ("kvbench", "sdpa")
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_keeps_its_implementation_is_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    message = "LlamaForCausalLM keeps its attention implementation 'sdpa'"
    with pytest.raises(ModelError, match=message), attention_implementation(model):
        pass


def test_importing_registers_nothing():
    code = (
        "import kvbench.runtime.attention, kvbench.runtime.observe; "
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS; "
        "assert 'kvbench' not in ALL_ATTENTION_FUNCTIONS.valid_keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the cache of a compress() block ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"past_key_values": DynamicCache()}], ids=["no cache", "another cache"])
def test_a_call_without_the_cache_is_refused(model, options):
    message = r"layer 0 of LlamaAttention ran without .* and without the compressed cache: .* past_key_values=cache"
    with kvbench.compress(model, POLICY), torch.no_grad(), pytest.raises(ModelError, match=message):
        model(prompt(40), **options)
    with kvbench.compress(model, POLICY), pytest.raises(ModelError, match="without the compressed cache"):
        GenerationMixin.generate(model, prompt(40), max_new_tokens=3)


@torch.no_grad()
def test_a_second_prompt_needs_a_reset_and_nothing_works_after_the_block(model):
    def read():
        return model(prompt(40), past_key_values=cache).logits

    with kvbench.compress(model, POLICY) as cache:
        first = read()
        with pytest.raises(ModelError, match="40 tokens at once on a compressed cache, at most 1 is supported"):
            read()
        cache.reset()
        torch.testing.assert_close(read(), first)
    with pytest.raises(ModelError, match=r"this cache's compress\(\) block has ended"):
        read()


def test_an_implementation_set_inside_the_block_is_refused_at_the_next_forward(model):
    expected = model.generate(prompt(40), max_new_tokens=3)
    message = r"attention implementation 'sdpa' was set inside the compress\(\) block.* set it before the block"
    with kvbench.compress(model, POLICY):
        model.set_attn_implementation("sdpa")
        with pytest.raises(ModelError, match=message):
            model.generate(prompt(40), max_new_tokens=3)
    assert torch.equal(model.generate(prompt(40), max_new_tokens=3), expected)


def test_speculative_decoding_is_refused_by_the_cache_too(model):
    options = {"max_new_tokens": 4, "prompt_lookup_num_tokens": 2, "do_sample": False}
    with kvbench.compress(model, POLICY) as cache, pytest.raises(ModelError, match="generate without assistant_model"):
        GenerationMixin.generate(model, prompt(40), past_key_values=cache, **options)


@torch.no_grad()
def test_only_left_padding_is_taken(model):
    inputs = padded([prompt(40), prompt(30)])
    right = {name: tensor.flip(1) for name, tensor in inputs.items()}
    holes = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    holes["attention_mask"][0, 20] = 0
    with kvbench.compress(model, POLICY) as cache:
        for refused, message in (
            (right, "1 rows of attention_mask hide their last token, at most 0 may"),
            (holes, "hides tokens after a prompt has begun in 1 places, 0 are supported"),
            ({**inputs, "attention_mask": inputs["attention_mask"][:, 1:]}, "(2, 39) does not fit 2 prompts of 40"),
            ({**inputs, "attention_mask": torch.ones(2, 1, 40, 40).tril().bool()}, "(2, 1, 40, 40)"),
        ):
            cache.reset()
            with pytest.raises(ModelError, match=re.escape(message)):
                model(**refused, past_key_values=cache)


@torch.no_grad()
def test_new_tokens_must_come_with_the_prompt_s_mask(model):
    inputs, token, ones = padded([prompt(40), prompt(30)]), torch.full((2, 1), 5), torch.ones(2, 1, dtype=torch.int64)
    grown = torch.cat([inputs["attention_mask"], ones], 1)
    other = torch.cat([grown, ones], 1)
    other[0, 3] = 0
    with kvbench.compress(model, POLICY) as cache:
        for mask, hidden in ((None, [0, 0]), (other, [1, 10])):
            cache.reset()
            model(**inputs, past_key_values=cache)
            model(token, attention_mask=grown, past_key_values=cache)
            with pytest.raises(ModelError, match=re.escape(f"hides {hidden} tokens of the rows, their prompts began")):
                model(token, attention_mask=mask, past_key_values=cache)


def test_dropout_and_gradients_are_refused():
    model, ids = build("llama", attention_dropout=0.1), prompt(40)
    message = r"attention dropout 0\.1 is not supported, only 0 is: call model\.eval\(\)"
    with attention_implementation(model), pytest.raises(KvbenchError, match=message):
        model.train()(input_ids=ids, use_cache=False, attention_context=observer())
    with kvbench.compress(model.eval(), POLICY) as cache:
        with pytest.raises(ModelError, match=r"gradients .* under torch\.no_grad\(\)"):
            model(ids, past_key_values=cache)
        cache.reset()
        model.train()
        with pytest.raises(ModelError, match=message):
            model.generate(ids, max_new_tokens=3)
