import pytest
import torch

from kvbench.errors import ConfigError
from kvbench.ops import dispatch as backend
from kvbench.ops.dispatch import choose_backend


def test_auto_is_torch_on_the_cpu() -> None:
    assert choose_backend("auto", "cpu") == "torch"
    assert choose_backend("torch", torch.device("cuda")) == "torch"


def test_auto_is_triton_on_cuda_where_it_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_triton_installed", lambda: True)
    assert choose_backend("auto", "cuda:1") == "triton"


def test_auto_without_triton_on_cuda_says_why_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "_triton_installed", lambda: False)
    backend._warn_once.cache_clear()
    assert choose_backend("auto", "cuda") == "torch"
    assert choose_backend("auto", "cuda") == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "kernels=auto takes the slower torch version on cuda: the package triton is not installed"
    ]


@pytest.mark.parametrize(
    ("device", "installed", "reason"), [("cpu", True, "need a CUDA device"), ("cuda", False, "not installed")]
)
def test_triton_where_it_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, installed: bool, reason: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_triton_installed", lambda: installed)
    with pytest.raises(ConfigError, match=rf"kernels='triton' on device '{device}': .*{reason}; use kernels=torch"):
        choose_backend("triton", device)


def test_the_interpreter_serves_any_device_but_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "_triton_installed", lambda: True)
    assert choose_backend("triton", "cpu") == "triton"
    assert choose_backend("auto", "cpu") == "torch"


def test_an_unknown_backend_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="kernels='cuda' is not one of auto, torch, triton"):
        choose_backend("cuda", "cpu")
