"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

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
