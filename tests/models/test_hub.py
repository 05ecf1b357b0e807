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
from kvbench.models import hub
from kvbench.models.config import named_config
from kvbench.models.load import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def locate(**overrides):
    return hub.locate(named_config("llama2-7b-chat", **overrides), lambda message: None)


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
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ModelError, match=rf"model meta-llama/Llama-2-7b-chat-hf .*{words}.*model\.path=FOLDER"):
        locate()


def test_only_safetensors_weights_are_asked_for(monkeypatch, tmp_path):
    asked = {}

    def download(hub_id, **keywords):
        asked.update(keywords, hub_id=hub_id)
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert locate().source == f"meta-llama/Llama-2-7b-chat-hf@{COMMIT}"
    assert asked["hub_id"] == "meta-llama/Llama-2-7b-chat-hf"
    assert asked["revision"] == "f5db02db724555f92da89c216ac04704f23d4590"
    assert not any(pattern.endswith((".bin", ".pth", ".pt", "*", ".py")) for pattern in asked["allow_patterns"])
