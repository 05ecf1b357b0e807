import pytest
import torch

from kvbench.errors import ConfigError
from kvbench.models.config import SOURCES, named_config
from kvbench.models.load import LOCATORS, load_model, resolve_device, resolve_dtype


def test_every_source_has_its_code():
    assert sorted(["random", *LOCATORS]) == sorted(SOURCES)


def test_auto_dtype_depends_on_the_device():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


def test_auto_device_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="cuda:2 asks for a CUDA device, this machine has 2"):
        resolve_device("cuda:2")


def test_unknown_device_is_named():
    with pytest.raises(ConfigError, match="'gpu'"):
        resolve_device("gpu")


def test_the_argument_overrides_the_configured_device():
    assert load_model(named_config("tiny-random", device="cuda:77"), device="cpu").device.type == "cpu"


def test_loaded_models_are_frozen_in_evaluation_mode(tiny_gqa):
    assert not tiny_gqa.model.training
    assert not any(parameter.requires_grad for parameter in tiny_gqa.model.parameters())
    assert tiny_gqa.source == "random weights, seed 0"
