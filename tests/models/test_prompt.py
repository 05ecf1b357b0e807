import json
from dataclasses import replace

import pytest
from llama_like import llama_like_tokenizer

from kvbench.errors import ModelError
from kvbench.models.prompt import RETOKENIZE_MARGIN_TOKENS, encode_sample, frame, stop_token_ids, wrap
from kvbench.models.special_tokens import rewrite_spellings, spellings_in
from kvbench.tasks.base import Sample

PROMPT = (
    "Read the text. " + " ".join(f"Line {i} of the text, naïve 语言." for i in range(60)) + "\nQuestion: what is it?"
)
QUESTION = PROMPT.index("Question")


def sample(prompt=PROMPT, **fields):
    values = {"id": "s1", "dataset": "d", "answers": ("a",), "metric": "qa_f1", "max_new_tokens": 20}
    return Sample(prompt=prompt, **{**values, **fields})


@pytest.fixture
def llama2(tiny_gqa):
    """A model with a Llama-2-like tokenizer and LongBench's settings, scaled down."""
    return replace(tiny_gqa, tokenizer=llama_like_tokenizer(), chat_format="llama2", max_prompt_tokens=501)


def longbench_order(tokenizer, prompt, max_length, chat):
    """The official steps, written plainly."""
    ids = tokenizer(prompt)["input_ids"]
    if len(ids) > max_length:
        half = int(max_length / 2)
        prompt = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    if chat:
        prompt = "[INST]" + prompt + "[/INST]"
    return tokenizer(prompt)["input_ids"], prompt


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT + "语" * 200, "short", " leading </s> space"])
def test_longbench_order(llama2, prompt, chat):
    expected_ids, expected_text = longbench_order(llama2.tokenizer, prompt, 501, chat)
    loaded = replace(llama2, parse_special_tokens="</s>" in prompt)
    encoded = encode_sample(sample(prompt, chat=chat, truncation="middle"), loaded)
    assert list(encoded.input_ids) == expected_ids
    assert encoded.prompt_text == expected_text
    assert encoded.input_ids.count(llama2.tokenizer.bos_token_id) == 1
    full = len(llama2.tokenizer(prompt)["input_ids"])
    assert encoded.truncated_tokens == (full - 500 if full > 501 else 0)


def test_a_prompt_at_the_limit_is_not_cut(llama2):
    n_tokens = len(llama2.tokenizer(PROMPT)["input_ids"])
    assert encode_sample(sample(truncation="middle"), replace(llama2, max_prompt_tokens=n_tokens)).truncated_tokens == 0
    cut = encode_sample(sample(truncation="middle"), replace(llama2, max_prompt_tokens=n_tokens - 1))
    assert cut.truncated_tokens == n_tokens - 2 * ((n_tokens - 1) // 2)


@pytest.mark.model
def test_official_rows_get_the_ids_of_the_official_code(smollm2, shared_data):
    """The default differs from the official tokenization in rows that spell special tokens only: here in none."""
    templates = json.loads((shared_data / "longbench_official" / "dataset2prompt.json").read_text(encoding="utf-8"))
    n_rows = n_cut = 0
    for name, template in templates.items():
        for line in (shared_data / "longbench_samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            prompt = template.format(**json.loads(line))
            assert spellings_in(prompt, smollm2.tokenizer) == [], name
            prompt = prompt if len(prompt) < 3000 else prompt[:1500] + prompt[-1500:]
            chat_format = ("llama2", "template", "none")[n_rows % 3]
            plain = replace(smollm2, chat_format=chat_format, max_prompt_tokens=500)
            encoded = encode_sample(sample(prompt, truncation="middle"), plain)
            official = replace(plain, parse_special_tokens=True)
            assert encode_sample(sample(prompt, truncation="middle"), official) == encoded, name
            if chat_format != "template":
                expected, text = longbench_order(smollm2.tokenizer, prompt, 500, chat_format == "llama2")
                assert (list(encoded.input_ids), encoded.prompt_text) == (expected, text), name
            n_rows, n_cut = n_rows + 1, n_cut + (encoded.truncated_tokens > 0)
    assert n_rows >= 100
    assert n_cut >= 50


def text_from(loaded, encoded):
    """The decoded tokens from the question on."""
    return loaded.tokenizer.decode(list(encoded.input_ids[encoded.question_start_token :]))


@pytest.mark.parametrize("truncation", ["refuse", "middle"])
def test_question_start_is_a_token_index(llama2, tiny_gqa, truncation):
    for loaded, end in ((llama2, "[/INST]"), (tiny_gqa, "\n[assistant]\n")):
        loaded = replace(loaded, max_prompt_tokens=501 if truncation == "middle" else None)
        encoded = encode_sample(sample(question_start=QUESTION, truncation=truncation), loaded)
        assert (encoded.truncated_tokens > 0) == (truncation == "middle")
        assert text_from(loaded, encoded) == PROMPT[QUESTION:] + end
        before = loaded.tokenizer.decode(list(encoded.input_ids[: encoded.question_start_token]))
        assert before.endswith("\n")


@pytest.mark.model
def test_question_start_with_merged_spaces(smollm2):
    prompt = "The capital of France is Paris. What is the capital?"
    encoded = encode_sample(sample(prompt, question_start=prompt.index("What")), smollm2)
    assert text_from(smollm2, encoded).startswith(" What is the capital?<|im_end|>\n<|im_start|>assistant\n")
    assert encoded.stop_token_ids == (2,)
    assert encoded.input_ids[0] == 1  # the template's own start, no BOS before it
    assert encoded.input_ids[1] != 1


def test_question_start_is_none_where_it_cannot_be_told(llama2):
    whole, short = replace(llama2, max_prompt_tokens=None), replace(llama2, max_prompt_tokens=20)
    for loaded, fields in (
        (short, {"question_start": QUESTION, "truncation": "middle"}),
        (whole, {"question_start": None}),
        (replace(whole, chat_format="none"), {"question_start": len(PROMPT)}),  # nothing follows
    ):
        assert encode_sample(sample(**fields), loaded).question_start_token is None


def test_answer_prefix_opens_the_answer_after_the_wrapper(tiny_gqa, llama2):
    encoded = encode_sample(sample("Hi", answer_prefix="It is"), tiny_gqa)
    assert encoded.prompt_text == "<|bos|>[user]\nHi\n[assistant]\nIt is"
    encoded = encode_sample(sample("Hi", answer_prefix=" It is"), llama2)
    assert encoded.prompt_text == "[INST]Hi[/INST] It is"
    assert list(encoded.input_ids) == llama2.tokenizer("[INST]Hi[/INST] It is")["input_ids"]


DOCUMENT = "Summarize.\n\n" + "word " * 300
QUERY = "\n\nQuery: what of it?\n\nAnswer:\n"
ZERO = {"query_start": len(DOCUMENT), "truncation_separator": "... [cut]"}


def test_zeroscrolls_cut_keeps_the_query(llama2):
    tokenizer = llama2.tokenizer
    bare = replace(llama2, chat_format="none")
    encoded = encode_sample(sample(DOCUMENT + QUERY, truncation="document_end", meta=ZERO), bare)
    suffix = tokenizer("... [cut]" + QUERY, add_special_tokens=False)["input_ids"]
    expected = tokenizer(DOCUMENT)["input_ids"][: 501 - len(suffix)] + suffix
    assert list(encoded.input_ids) == expected
    assert len(expected) == 501
    assert encoded.truncated_tokens == len(tokenizer(DOCUMENT)["input_ids"]) + len(suffix) - 501
    assert encoded.prompt_text.endswith("... [cut]" + QUERY)
    assert DOCUMENT.startswith(encoded.prompt_text.removesuffix("... [cut]" + QUERY))
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_zeroscrolls_cut_inside_a_wrapper(tiny_gqa):
    loaded = replace(tiny_gqa, max_prompt_tokens=400)
    fields = {"truncation": "document_end", "meta": ZERO, "question_start": len(DOCUMENT) + 2, "answer_prefix": "It"}
    encoded = encode_sample(sample(DOCUMENT + QUERY, **fields), loaded)
    kept = 400 - 1 - len("... [cut]" + QUERY)  # one token is the BOS
    text = "<|bos|>[user]\n" + DOCUMENT[:kept] + "... [cut]" + QUERY + "\n[assistant]\nIt"
    assert encoded.prompt_text == text
    assert loaded.tokenizer.decode(list(encoded.input_ids)) == text
    assert text_from(loaded, encoded) == QUERY[2:] + "\n[assistant]\nIt"


def test_zeroscrolls_prompt_that_fits_is_left_alone(tiny_gqa):
    encoded = encode_sample(sample(DOCUMENT + QUERY, truncation="document_end", meta=ZERO), tiny_gqa)
    assert encoded.truncated_tokens == 0
    assert "[cut]" not in encoded.prompt_text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"truncation": "document_end", "meta": {"query_start": 5}}, "s1 has no 'truncation_separator' in its meta"),
        ({"truncation": "document_end", "meta": ZERO}, "query of 39 tokens alone fills the limit of 30.*raise model"),
        ({}, r"sample s1: its prompt of 1543 tokens exceeds the limit of 30.*raise model"),
    ],
)
def test_refusals_name_tokens_limit_and_remedy(tiny_gqa, fields, words):
    with pytest.raises(ModelError, match=words):
        encode_sample(sample(DOCUMENT + QUERY, **fields), replace(tiny_gqa, max_prompt_tokens=30))


def test_context_must_hold_prompt_and_new_tokens(tiny_model):
    loaded = tiny_model(n_layers=1, max_context_tokens=100)
    wrapper = len("[user]\n") + len("\n[assistant]\n") + 1
    assert len(encode_sample(sample("x" * (80 - wrapper)), loaded).input_ids) == 80
    with pytest.raises(ModelError, match="81 prompt tokens and 20 new tokens exceed the context of 100"):
        encode_sample(sample("x" * (81 - wrapper)), loaded)
    with pytest.raises(ModelError, match="90 new tokens leave no room"):
        encode_sample(sample("x" * 200, truncation="middle", max_new_tokens=90), loaded)


@pytest.mark.parametrize("fields", [{"truncation": "middle"}, {"truncation": "document_end", "meta": ZERO}])
@pytest.mark.parametrize("chat", [True, False])
def test_a_limit_derived_from_the_context_leaves_room_for_everything(tiny_model, fields, chat):
    loaded = tiny_model(n_layers=1, max_context_tokens=300)
    encoded = encode_sample(sample(DOCUMENT + QUERY, answer_prefix="It is", chat=chat, **fields), loaded)
    assert 300 - 20 - RETOKENIZE_MARGIN_TOKENS - 2 <= len(encoded.input_ids) <= 300 - 20
    assert encoded.prompt_text.endswith("It is")


def test_special_tokens_in_the_data_stay_text_unless_asked_for(tiny_gqa):
    prompt = "one <|eos|> two? "
    eos = tiny_gqa.tokenizer.eos_token_id
    for loaded, text in ((tiny_gqa, prompt), (replace(tiny_gqa, protect_special_tokens=True), "one ＜|eos|> two? ")):
        encoded = encode_sample(sample(prompt, question_start=12), loaded)
        assert eos not in encoded.input_ids
        assert encoded.input_ids[0] == tiny_gqa.tokenizer.bos_token_id  # the wrapper's own tokens still count
        assert tiny_gqa.tokenizer.decode(list(encoded.input_ids)) == encoded.prompt_text
        assert text in encoded.prompt_text
        assert text_from(tiny_gqa, encoded).startswith("two?")
    assert eos in encode_sample(sample(prompt), replace(tiny_gqa, parse_special_tokens=True)).input_ids


def test_stops_and_minimum_come_from_the_sample(tiny_gqa):
    newline = tiny_gqa.tokenizer.encode("\n", add_special_tokens=False)[-1]
    encoded = encode_sample(sample(stop_newline=True, min_new_tokens=1), tiny_gqa)
    assert encoded.stop_token_ids == (2, newline)
    assert encoded.min_new_tokens == 1


# The chat wrapper, and what ends a turn.


@pytest.fixture
def own(tiny_model):
    """A tiny model with a tokenizer of its own, so that tests may change its template."""
    return tiny_model(n_layers=1)


def with_template(loaded, template):
    loaded.tokenizer.chat_template = template
    return loaded


@pytest.mark.parametrize(
    ("chat_format", "chat", "expected"),
    [
        ("llama2", True, ("[INST]A prompt[/INST]", 6, True)),
        ("none", True, ("A prompt", 0, True)),
        ("llama2", False, ("A prompt", 0, True)),
        ("template", False, ("A prompt", 0, True)),
        ("template", True, ("<|bos|>[user]\nA prompt\n[assistant]\n", 14, False)),  # a template writes its own BOS
    ],
)
def test_what_stands_around_a_prompt(tiny_gqa, chat_format, chat, expected):
    assert wrap("A prompt", replace(tiny_gqa, chat_format=chat_format), chat=chat) == expected


def test_templates_may_trim_the_message_but_one_that_they_rewrite_has_no_position(own):
    trimming = with_template(own, "A text. user: {{ messages[0]['content'] | trim }}\nbot: ")
    text, start, _ = wrap("  text ", trimming, chat=True)
    assert text == "A text. user: text\nbot: "
    assert text[start + 2 :].startswith("text\nbot")  # two trimmed characters come before
    rewriting = with_template(own, "{{ messages[0]['content'] | upper }}\u27e6prompt\u27e7")
    assert wrap("text", rewriting, chat=True)[1] is None


def test_templates_that_fail_or_forget_are_errors(own):
    with pytest.raises(ModelError, match=r"needs a system prompt.*model\.chat_format=none"):
        wrap("x", with_template(own, "{{ raise_exception('needs a system prompt') }}"), chat=True)
    with pytest.raises(ModelError, match="leaves out the user's message"):
        frame(with_template(own, "hello"), chat=True)


def test_stops_are_all_ends_once(own):
    assert stop_token_ids(replace(own, stop_token_ids=(7, 2)), stop_newline=False) == (2, 7)
    llama = replace(own, tokenizer=llama_like_tokenizer(), chat_format="llama2")  # a newline is "▁" and a byte
    assert stop_token_ids(llama, stop_newline=True) == (2, llama.tokenizer.convert_tokens_to_ids("<0x0A>"))
    own.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end_of_turn = own.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(own, stop_newline=False) == (2, end_of_turn)
    assert stop_token_ids(replace(own, chat_format="none"), stop_newline=False) == (2,)


def test_rewriting_keeps_lengths_and_leaves_no_special_token(tiny_gqa):
    tokenizer = tiny_gqa.tokenizer
    text = "a <|eos|> b <|bos|><|pad|> [INST]"
    protected = rewrite_spellings(text, tokenizer)
    assert protected == "a ＜|eos|> b ＜|bos|>＜|pad|> [INST]"
    assert not set(tokenizer(protected, add_special_tokens=False)["input_ids"]) & {0, 1, 2}
    assert rewrite_spellings("x[/INST][INST]", tokenizer, ("[INST]", "[/INST]")) == "x［/INST]［INST]"
