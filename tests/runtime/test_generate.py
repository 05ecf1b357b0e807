"""Everything `generate` can do beside greedy decoding of one prompt: it must not notice a cache that keeps it all.

With the full cache every answer has to be transformers' own, token for token; with a compressed one, each row of a
batch has to answer as it does alone.
"""

import re
import threading
from pathlib import Path

import pytest
import torch
from small_decoders import FAMILIES, assert_same_answers, build, padded, prompt
from transformers import TextIteratorStreamer

import kvbench
from kvbench.errors import ModelError
from kvbench.methods.cam import CaM
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O
from kvbench.methods.kvmerger import KVMerger, KVMergerBias
from kvbench.models.load import byte_tokenizer

LONG = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "several samples": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3, "temperature": 1.5},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
TWO_FREQUENCIES = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    "original_max_position_embeddings": 32,
}
PROMPTS = [prompt(31, seed=1), prompt(50, seed=2), prompt(44, seed=3)]
WHOLE = {"whole_first_layers": 1, "whole_last_layers": 0}
POLICIES = [H2O(budget=0.4), CaM(budget=0.4), KVMerger(budget=0.5, **WHOLE), KVMergerBias(budget=0.5, **WHOLE)]


def generate(model, inputs, **options):
    torch.manual_seed(7)
    return model.generate(**inputs, **{**LONG, **options})


def compressed(model, policy, inputs, **options):
    with kvbench.compress(model, policy):
        return generate(model, inputs, **options)


def batch():
    return padded(PROMPTS)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_whole_cache_changes_no_token(mode):
    model = build("llama")
    for inputs in ({"input_ids": prompt(40)}, batch()):
        expected = generate(model, inputs, **MODES[mode])
        assert torch.equal(compressed(model, Full(), inputs, **MODES[mode]), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_cache_changes_no_token_of_any_family(family):
    model, inputs = build(family), batch()
    options = {**LONG, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**inputs, **options)
    with kvbench.compress(model, Full()):
        assert_same_answers(model, expected, inputs, **options)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_a_row_of_a_batch_answers_as_alone(policy):
    model = build("qwen3")
    together = compressed(model, policy, batch())[:, 50:]
    alone = [compressed(model, policy, {"input_ids": ids})[0, ids.shape[1] :] for ids in PROMPTS]
    assert together.tolist() == [answer.tolist() for answer in alone]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_beams_follow_their_caches(policy):
    """Each beam's log-probability must be what the model gives when it is forced along that beam's tokens."""
    model, ids = build("llama"), prompt(40)
    with kvbench.compress(model, policy) as cache:
        found = model.generate(
            ids, num_beams=4, num_return_sequences=4, length_penalty=0.0,
            return_dict_in_generate=True, output_scores=True, **LONG,
        )  # fmt: skip
        assert found.past_key_values is cache
        for sequence, score in zip(found.sequences, found.sequences_scores, strict=True):
            cache.reset()
            with torch.no_grad():
                fed = [ids, *sequence[40:-1].view(-1, 1, 1)]
                logits = [model(tokens, past_key_values=cache).logits[0, -1] for tokens in fed]
            log_probs = torch.log_softmax(torch.stack(logits), -1).index_fill(1, torch.tensor([2]), -torch.inf)
            total = log_probs.gather(1, sequence[40:, None]).sum()
            assert total.item() == pytest.approx(score.item(), abs=1e-4)


def test_an_answer_longer_than_the_room_that_rows_begin_with(monkeypatch):
    model, inputs = build("llama"), batch()
    options = {"max_new_tokens": 24, "min_new_tokens": 24}
    expected = {policy: compressed(model, policy, inputs, **options) for policy in [Full(), *POLICIES]}
    monkeypatch.setattr("kvbench.runtime.cache.ROOM_TOKENS", 7)
    for policy, tokens in expected.items():
        assert torch.equal(compressed(model, policy, inputs, **options), tokens), policy.name


def test_streaming_from_a_thread_of_its_own():
    model, ids, tokenizer, policy = build("llama"), prompt(40), byte_tokenizer(512), H2O(budget=0.4)
    expected = compressed(model, policy, {"input_ids": ids})
    with kvbench.compress(model, policy) as cache:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=600)
        options = {"input_ids": ids, "streamer": streamer, **LONG}
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert cache.report().new_tokens == 11
    assert text == tokenizer.decode(expected[0, 40:])


def test_two_models_at_a_time_and_several_prompts_a_block():
    first, second, policy = build("llama"), build("qwen3"), H2O(budget=0.4)
    asked = [(model, {"input_ids": ids}) for model in (first, second) for ids in PROMPTS[:2]]
    alone = [compressed(model, policy, inputs) for model, inputs in asked]
    with kvbench.compress(first, policy), kvbench.compress(second, policy):
        mixed = [generate(model, inputs) for model, inputs in asked]
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))


def test_the_long_form_passes_the_cache():
    model, ids = build("llama"), prompt(40)
    policy = H2O(budget=0.4)
    expected = compressed(model, policy, {"input_ids": ids})
    with kvbench.compress(model, policy) as cache:
        assert torch.equal(generate(model, {"input_ids": ids, "past_key_values": cache}), expected)
        cache.reset()
        unbound = type(model).generate(model, input_ids=ids, past_key_values=cache, **LONG)
        assert torch.equal(unbound, expected)


def test_a_second_turn_on_a_used_cache_is_refused_and_leaves_it_as_it_is():
    model, first, second = build("llama"), prompt(40), prompt(10, seed=5)
    with kvbench.compress(model, Full()) as cache:
        answer = generate(model, {"input_ids": first})
        for ids in (second, torch.cat([answer, second], 1)):
            with pytest.raises(ModelError, match=r"past_key_values holds 51 tokens of an earlier turn, 0 are"):
                generate(model, {"input_ids": ids, "past_key_values": cache})
        assert cache.report().prompt_tokens == (40,)
        cache.reset()
        again = generate(model, {"input_ids": first, "past_key_values": cache})
    assert torch.equal(again, answer)


@pytest.mark.parametrize("n_tokens", [20, 40], ids=["short factors", "long factors"])
def test_phi3_with_two_sets_of_frequencies(n_tokens):
    model = build("phi3", **TWO_FREQUENCIES)
    inputs = {"input_ids": prompt(n_tokens)}
    assert torch.equal(compressed(model, Full(), inputs), generate(model, inputs))


def test_phi3_refuses_an_answer_that_crosses_from_one_to_the_other():
    model = build("phi3", **TWO_FREQUENCIES)  # transformers would compute the prompt anew, with a cache of its own
    with pytest.raises(ModelError, match="Phi-3 itself drops it where prompt and answer cross"):
        compressed(model, Full(), {"input_ids": prompt(28)})


def test_prompts_given_as_embeddings():
    model, ids = build("llama"), prompt(40)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
    expected = compressed(model, H2O(budget=0.4), {"input_ids": ids})
    assert torch.equal(compressed(model, H2O(budget=0.4), inputs), expected[:, 40:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_whole_cache_changes_no_token_in_half_precision(dtype):
    model, inputs = build("llama").to(dtype), {"input_ids": prompt(40)}
    assert torch.equal(compressed(model, Full(), inputs), generate(model, inputs))


# ---- the README's and the how-to's snippets, run as they stand -------------------------------------------------------

DEEP = {"num_hidden_layers": 12}  # KVMerger leaves three layers whole by default


def blocks(page):
    text = (Path(__file__).resolve().parents[2] / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_readme_s_snippet(capsys):
    (code,) = [block for block in blocks("README.md") if "kvbench.compress" in block]
    model, inputs = build("llama", **DEEP), {"input_ids": prompt(60)}
    names = {"model": model, "inputs": inputs}
    exec(code, names)
    with kvbench.compress(model, kvbench.KVMerger(budget=0.35)):
        assert torch.equal(names["output"], model.generate(**inputs, max_new_tokens=64))
    assert "kvmerger, budget 0.35 requested, 0.3500 measured in 12 of 12 layers" in capsys.readouterr().out


@pytest.mark.parametrize("code", blocks("docs/api.md"), ids=lambda code: code.splitlines()[0].lstrip("# "))
def test_the_how_to_s_snippets(code):
    names = {"kvbench": kvbench, "model": build("llama", **DEEP), "inputs": {"input_ids": prompt(60)}}
    exec(code, {**names, "batch": batch(), "tokenizer": byte_tokenizer(512)})
