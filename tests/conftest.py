"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # imported late, so that tests without a model start at once
    from kvbench.models.load import LoadedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub: a slow failure would hide a missing fixture
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of local third-party data (real LongBench rows, official configs, golden scores), or a reasoned skip."""
    named = os.environ.get("KVBENCH_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no local third-party data at {folder}: set KVBENCH_SHARED_DATA to run this test")
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., LoadedModel]:
    """Factory of random models without a download: `tiny_model("tiny-random", n_layers=2)`, float32 on the CPU."""

    from kvbench.models.config import named_config
    from kvbench.models.load import load_model

    def build(name: str = "tiny-random", **overrides: Any) -> LoadedModel:
        return load_model(named_config(name, **overrides), device="cpu")

    return build


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
    from kvbench.models.config import named_config
    from kvbench.models.load import load_model

    return load_model(named_config("smollm2-135m"), device="cpu")
