from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kvbench.models.byte_tokenizer import BOS, EOS, MIN_VOCAB_SIZE, PAD, byte_tokenizer

TOKENIZER = byte_tokenizer(8192)


@given(st.text())
def test_decoding_undoes_encoding(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


@given(st.text())
def test_skipping_special_tokens_drops_the_bos_alone(text):
    assume(not any(token in text for token in (PAD, BOS, EOS)))
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text


def test_one_token_per_byte_after_one_bos():
    text = "né 语\n 12"
    input_ids = TOKENIZER(text)["input_ids"]
    assert input_ids[0] == TOKENIZER.bos_token_id == 1
    assert len(input_ids) == 1 + len(text.encode())
    assert len(TOKENIZER) == MIN_VOCAB_SIZE


def test_the_template_writes_its_own_bos_once():
    message = [{"role": "user", "content": "hi"}]
    text = TOKENIZER.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|>[user]\nhi\n[assistant]\n"
    assert TOKENIZER(text, add_special_tokens=False)["input_ids"].count(TOKENIZER.bos_token_id) == 1


def test_saved_tokenizer_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("né <|eos|>")["input_ids"] == TOKENIZER("né <|eos|>")["input_ids"]
    assert again.chat_template == TOKENIZER.chat_template
