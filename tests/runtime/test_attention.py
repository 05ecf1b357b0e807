"""What the attention layers refuse inside a block: nothing that goes past the cache or the mask is computed wrongly."""

import re

import pytest
import torch
from small_decoders import build, padded, prompt
from transformers import DynamicCache, GenerationMixin

import kvbench
from kvbench.errors import KvbenchError, ModelError
from kvbench.methods.h2o import H2O

POLICY = H2O(budget=0.4)


@pytest.fixture(scope="module")
def model():
    return build("llama")


def answers(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("options", [{}, {"past_key_values": DynamicCache()}], ids=["no cache", "another cache"])
def test_a_call_without_the_cache_is_refused(model, options):
    message = r"layer 0 of LlamaAttention ran without .* and without the compressed cache: .* past_key_values=cache"
    with kvbench.compress(model, POLICY), torch.no_grad(), pytest.raises(ModelError, match=message):
        model(prompt(40), **options)


def test_generate_of_the_class_is_refused_without_the_cache(model):
    with (
        kvbench.compress(model, POLICY),
        pytest.raises(ModelError, match="and without the compressed cache"),
    ):
        GenerationMixin.generate(model, prompt(40), max_new_tokens=3)


def test_a_second_prompt_needs_a_reset(model):
    with kvbench.compress(model, POLICY) as cache:
        first = answers(model, prompt(40), cache)
        with pytest.raises(ModelError, match="40 tokens at once on a compressed cache, at most 1 is supported"):
            answers(model, prompt(40), cache)
        cache.reset()
        torch.testing.assert_close(answers(model, prompt(40), cache), first)


def test_an_implementation_set_inside_the_block_is_refused_at_the_next_forward(model):
    expected = model.generate(prompt(40), max_new_tokens=3)
    message = r"attention implementation 'sdpa' was set inside the compress\(\) block.* set it before the block"
    with kvbench.compress(model, POLICY):
        model.set_attn_implementation("sdpa")
        with pytest.raises(ModelError, match=message):
            model.generate(prompt(40), max_new_tokens=3)
    assert torch.equal(model.generate(prompt(40), max_new_tokens=3), expected)


def test_speculative_decoding_is_refused_on_every_way_in(model):
    with kvbench.compress(model, POLICY) as cache, pytest.raises(ModelError, match="generate without assistant_model"):
        GenerationMixin.generate(
            model, prompt(40), past_key_values=cache, max_new_tokens=4, prompt_lookup_num_tokens=2, do_sample=False
        )


def test_nothing_works_after_the_block(model):
    with kvbench.compress(model, POLICY) as cache:
        answers(model, prompt(40), cache)
    with pytest.raises(ModelError, match=r"this cache's compress\(\) block has ended"):
        answers(model, prompt(40), cache)


def test_only_left_padding_is_taken(model):
    inputs = padded([prompt(40), prompt(30)])
    right = {name: tensor.flip(1) for name, tensor in inputs.items()}
    holes = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    holes["attention_mask"][0, 20] = 0
    short = {**inputs, "attention_mask": inputs["attention_mask"][:, 1:]}
    with kvbench.compress(model, POLICY) as cache, torch.no_grad():
        with pytest.raises(ModelError, match="1 rows of attention_mask hide their last token, at most 0 may"):
            model.generate(**right, max_new_tokens=3)
        with pytest.raises(ModelError, match="hides tokens after a prompt has begun in 1 places, 0 are supported"):
            model.generate(**holes, max_new_tokens=3)
        with pytest.raises(ModelError, match=r"attention_mask of shape \(2, 39\) does not fit 2 prompts of 40 tokens"):
            model(**short, past_key_values=cache)


def test_new_tokens_must_come_with_the_prompt_s_mask(model):
    inputs, token = padded([prompt(40), prompt(30)]), torch.full((2, 1), 5)
    grown = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    other = grown.clone()
    other[0, 3] = 0
    with kvbench.compress(model, POLICY) as cache, torch.no_grad():
        for mask, hidden in ((None, [0, 0]), (other, [1, 10])):
            cache.reset()
            model(**inputs, past_key_values=cache)
            model(token, attention_mask=grown, past_key_values=cache)
            if mask is not None:
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            with pytest.raises(ModelError, match=re.escape(f"hides {hidden} tokens of the rows, their prompts began")):
                model(token, attention_mask=mask, past_key_values=cache)


def test_a_mask_of_the_caller_s_own_is_refused(model):
    mask = torch.ones(40, 40).tril().bool()[None, None]
    with (
        kvbench.compress(model, POLICY) as cache,
        torch.no_grad(),
        pytest.raises(ModelError, match=r"\(1, 1, 40, 40\)"),
    ):
        model(prompt(40), attention_mask=mask, past_key_values=cache)


def test_dropout_and_gradients_are_refused():
    model = build("llama", attention_dropout=0.1)
    with kvbench.compress(model, POLICY) as cache:
        with pytest.raises(ModelError, match=r"call the model under torch\.no_grad\(\)"):
            model(prompt(40), past_key_values=cache)
        cache.reset()
        model.train()
        with pytest.raises(
            ModelError, match=r"attention dropout 0\.1 is not supported, only 0 is: call model\.eval\(\)"
        ):
            model.generate(prompt(40), max_new_tokens=3)


def test_every_message_is_one_line(model):
    with kvbench.compress(model, POLICY), pytest.raises(KvbenchError) as caught:
        model.generate(prompt(40), max_new_tokens=3, prompt_lookup_num_tokens=2)
    assert "\n" not in str(caught.value)
