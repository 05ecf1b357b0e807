"""GGUF files: converted once into the cache, and refused where transformers would read other tokens or positions."""

import numpy as np
import pytest
from gguf import GGUFWriter

from kvbench.errors import ModelError
from kvbench.models import fetch, gguf
from kvbench.models.config import named_config
from kvbench.models.load import prepare_model


@pytest.fixture
def write(tmp_path):
    """Write a GGUF file that names a tokenizer and holds some tensors, no more."""

    def make(model="gpt2", pre="qwen2", tensors=("token_embd.weight",), **more):
        file = tmp_path / "some.gguf"
        writer = GGUFWriter(str(file), "llama")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        for name, value in more.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        for name in tensors:
            writer.add_tensor(name, np.zeros((2, 2), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    return make


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"pre": "tekken"}, "has a tokenizer gpt2/tekken, known are gpt2/smollm, gpt2/llama-bpe, gpt2/qwen2"),
        ({"model": "llama", "pre": "default"}, "has a tokenizer llama/default"),
        ({"pre": "llama-bpe", "tensors": ("rope_freqs.weight",)}, "RoPE factors .* that transformers does not read"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(write, tmp_path, content, words):
    with pytest.raises(ModelError, match=f"{words}.*: use the model's folder"):
        gguf.convert_gguf(write(**content), tmp_path)


def test_other_files_and_none_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    (file := tmp_path / "text.gguf").write_text("no weights")
    with pytest.raises(ModelError, match=r"text\.gguf is no GGUF file"):
        prepare_model(named_config(str(file)))
    with pytest.raises(ModelError, match=r"gone\.gguf is no file"):
        prepare_model(named_config(str(tmp_path / "gone.gguf")))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["In", "Ġ", "195", "8", ",", "Ġwe", "'ll", "ĠGO", "!!", "ĊĊ"]),
        ("qwen2", ["In", "Ġ", "1", "9", "5", "8", ",", "Ġwe", "'ll", "ĠGO", "!!", "ĊĊ"]),
        ("smollm", ["In", "Ġ", "1", "9", "5", "8", ",", "Ġwe", "'ll", "ĠGO", "!!", "ĊĊ"]),
    ],
)
def test_words_are_split_as_the_models_were_trained(pre, pieces):
    found = [piece for piece, _ in gguf.PRE_TOKENIZERS[pre]().pre_tokenize_str("In 1958, we'll GO!!\n\n")]
    assert "".join(found) == "".join(pieces)
    assert [piece for piece in found if "!" not in piece and "Ċ" not in piece] == pieces[:-2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [({"pre": "llama-bpe"}, True), ({"pre": "qwen2"}, False), ({"pre": "qwen2", "add_bos_token": True}, True)],
)
def test_a_bos_is_what_the_file_says_or_the_model_s_own_rule(write, content, expected):
    assert gguf._tokenizer_facts(write(**content))[1] is expected


def test_a_file_is_converted_once_and_known_by_its_content(write, tmp_path, monkeypatch):
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    seen = []
    monkeypatch.setattr(fetch, "convert_gguf", lambda file, folder: seen.append(file))
    config = named_config(str(write()))
    first, again = (fetch.LOCATORS[config.effective_source](config, print) for _ in range(2))
    assert (len(seen), first) == (1, again)
    assert first.source.startswith("some.gguf (GGUF sha256 ")
    write(pre="smollm")
    assert fetch.LOCATORS["gguf"](config, print).folder != first.folder
