"""One forking command-line server for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from commands import Server, serve


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("output")) as server:
        yield server
