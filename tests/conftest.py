"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:  # imported late, so that tests without a model start at once
    from kvbench.models.load import LoadedModel


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the fault tests counted: kills survived, rows lost, and so on."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "faults" and report.when == "call":
                terminalreporter.write_line(f"faults: {report.nodeid.rpartition('::')[2]}: {value}")


INTEGRATIONS = {
    "lm_eval": lambda: importlib.util.find_spec("lm_eval") is not None and importlib.util.find_spec("lm_eval.api"),
    "kvpress": lambda: importlib.util.find_spec("kvpress"),
    "chromium": lambda: any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose integration is not here, and say so; in `make test-integrations` fail where CI is set."""
    for marker in item.iter_markers("integration"):
        (name,) = marker.args
        if not INTEGRATIONS[name]():
            reason = f"{name} is not here: run `make test-integrations`, which has a place for it"
            if os.environ.get("KVBENCH_INTEGRATION") == name and os.environ.get("CI"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub: a slow failure would hide a missing fixture
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Without a GPU, kernel tests run in Triton's interpreter. It is chosen when triton is first imported, hence here.
    # Nothing but explicit "triton" takes that path: on the CPU, kernels="auto" stays torch.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of local third-party data (real LongBench rows, official configs, golden scores), or a reasoned skip."""
    named = os.environ.get("KVBENCH_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no local third-party data at {folder}: set KVBENCH_SHARED_DATA to run this test")
    return folder


def loaded(name: str = "tiny-random", **overrides: Any) -> LoadedModel:
    from kvbench.models.config import named_config
    from kvbench.models.load import load_model

    shallow = {"n_layers": 4} if name.startswith("tiny-random") else {}  # what the tests need, in half the time
    return load_model(named_config(name, **{**shallow, **overrides}), device="cpu")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., LoadedModel]:
    """Factory of random models without a download: `tiny_model("tiny-random", n_layers=2)`, float32 on the CPU."""
    return loaded


@pytest.fixture(scope="session")
def tiny_gqa(tiny_model: Callable[..., LoadedModel]) -> LoadedModel:
    """A random 4-layer Llama with 4 query and 2 KV heads; shared, so leave it as you found it."""
    return tiny_model("tiny-random")


@pytest.fixture(scope="session")
def tiny_mha(tiny_model: Callable[..., LoadedModel]) -> LoadedModel:
    """The same with 4 KV heads; shared, so leave it as you found it."""
    return tiny_model("tiny-random-mha")


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The default model in float32 on the CPU (mark such tests `model`); shared, so leave it as you found it."""
    return loaded("smollm2-135m")


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels run in tests: the GPU, or the CPU under Triton's interpreter (keep shapes tiny there)."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed: its kernels cannot be tested")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device, and TRITON_INTERPRET is set to something else than 1")
    return torch.device("cpu")
