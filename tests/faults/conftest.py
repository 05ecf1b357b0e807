"""One forking command-line server for all tests of a process."""

import pytest
from commands import serve


@pytest.fixture(scope="session")
def cli(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("output")) as server:
        yield server
