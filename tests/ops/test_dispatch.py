"""Which version of an operation runs where, and what is said if it is not the one hoped for."""

import pytest
import torch

from kvbench.errors import ConfigError
from kvbench.ops import dispatch
from kvbench.ops.dispatch import choose_kernels


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: True)


@pytest.mark.usefixtures("installed")
def test_auto_is_triton_on_cuda_and_torch_elsewhere_even_under_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_kernels("auto", "cuda:1") == "triton"
    assert choose_kernels("auto", "cpu") == choose_kernels("torch", torch.device("cuda")) == "torch"
    assert choose_kernels("triton", "cpu") == "triton"


def test_auto_without_triton_on_cuda_says_why_it_is_slow(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: False)
    dispatch._warn_once.cache_clear()
    assert [choose_kernels("auto", "cuda") for _ in range(2)] == ["torch", "torch"]
    assert [record.getMessage() for record in caplog.records] == [
        "kernels=auto takes the slower torch version on cuda: the package triton is not installed"
    ]


@pytest.mark.parametrize(
    ("device", "installed", "reason"), [("cpu", True, "need a CUDA device"), ("cuda", False, "not installed")]
)
def test_triton_where_it_cannot_run_is_refused(monkeypatch, device, installed, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: installed)
    with pytest.raises(ConfigError, match=rf"kernels='triton' on device '{device}': .*{reason}; use kernels=torch"):
        choose_kernels("triton", device)


def test_an_unknown_choice_names_the_choices():
    with pytest.raises(ConfigError, match="kernels='cuda' is not one of auto, torch, triton"):
        choose_kernels("cuda", "cpu")
