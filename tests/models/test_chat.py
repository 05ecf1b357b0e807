from dataclasses import replace

import pytest
from llama_like import llama_like_tokenizer

from kvbench.errors import ModelError
from kvbench.models.chat import frame, protect, stop_token_ids, wrap


@pytest.fixture
def loaded(tiny_gqa, tiny_model):
    """The tiny model with a tokenizer of its own, so that tests may change its template."""
    return tiny_model(n_layers=1)


def with_template(loaded, template):
    loaded.tokenizer.chat_template = template
    return loaded


def test_llama2_frame_has_no_spaces_and_no_system_prompt(loaded):
    wrapped = wrap("A prompt", replace(loaded, chat_format="llama2"), chat=True)
    assert wrapped.text == "[INST]A prompt[/INST]"
    assert (wrapped.prompt_start, wrapped.add_special_tokens) == (6, True)


@pytest.mark.parametrize(("chat_format", "chat"), [("none", True), ("llama2", False), ("template", False)])
def test_bare_prompts(loaded, chat_format, chat):
    loaded = replace(loaded, chat_format=chat_format)
    wrapped = wrap("A prompt", loaded, chat=chat)
    assert (wrapped.text, wrapped.prompt_start, wrapped.add_special_tokens) == ("A prompt", 0, True)
    assert frame(loaded, chat=chat) == ("", "")


def test_templates_write_their_own_bos(loaded):
    wrapped = wrap("user", loaded, chat=True)
    assert wrapped.text == "<|bos|>[user]\nuser\n[assistant]\n"
    assert wrapped.text[wrapped.prompt_start :].startswith("user\n[assistant]")
    assert wrapped.add_special_tokens is False


def test_templates_may_trim_the_message(loaded):
    trimming = with_template(loaded, "A text. user: {{ messages[0]['content'] | trim }}\nbot: ")
    wrapped = wrap("  text ", trimming, chat=True)
    assert wrapped.text == "A text. user: text\nbot: "
    assert wrapped.text[wrapped.prompt_start + 2 :].startswith("text\nbot")  # two trimmed characters come before


def test_a_message_that_the_template_rewrites_has_no_position(loaded):
    assert (
        wrap("text", with_template(loaded, "{{ messages[0]['content'] | upper }}⟦prompt⟧"), chat=True).prompt_start
        is None
    )


def test_templates_that_fail_or_forget_are_errors(loaded):
    with pytest.raises(ModelError, match=r"needs a system prompt.*model\.chat_format=none"):
        wrap("x", with_template(loaded, "{{ raise_exception('needs a system prompt') }}"), chat=True)
    with pytest.raises(ModelError, match="leaves out the user's message"):
        frame(with_template(loaded, "hello"), chat=True)


def test_stops_are_all_ends_once(loaded):
    assert stop_token_ids(loaded, stop_newline=False) == (2,)
    newline = loaded.tokenizer.encode("\n", add_special_tokens=False)[-1]
    assert stop_token_ids(loaded, stop_newline=True) == (2, newline)
    assert stop_token_ids(replace(loaded, stop_token_ids=(7, 2)), stop_newline=False) == (2, 7)


def test_end_of_turn_tokens_stop_where_they_exist(loaded):
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end_of_turn = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(loaded, stop_newline=False) == (2, end_of_turn)
    assert stop_token_ids(replace(loaded, chat_format="none"), stop_newline=False) == (2,)


def test_newline_stop_of_a_llama_like_tokenizer_is_the_last_id(tiny_gqa):
    tokenizer = llama_like_tokenizer()
    assert tokenizer.encode("\n", add_special_tokens=False)[-1] == tokenizer.convert_tokens_to_ids("<0x0A>")
    stops = stop_token_ids(replace(tiny_gqa, tokenizer=tokenizer, chat_format="llama2"), stop_newline=True)
    assert stops == (2, tokenizer.convert_tokens_to_ids("<0x0A>"))


def test_protection_keeps_lengths_and_leaves_no_special_token(loaded):
    text = "a <|eos|> b <|bos|><|pad|> [INST]"
    protected = protect(text, loaded)
    assert protected == "a ＜|eos|> b ＜|bos|>＜|pad|> [INST]"
    assert not set(loaded.tokenizer(protected, add_special_tokens=False)["input_ids"]) & {0, 1, 2}
    assert set(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) >= {0, 1, 2}
    assert protect("x[/INST][INST]", replace(loaded, chat_format="llama2")) == "x［/INST]［INST]"
