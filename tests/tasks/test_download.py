"""A small file from the web is small, whatever the server sends."""

import pytest

from kvbench.errors import DataError
from kvbench.tasks import download


def test_a_small_file_that_does_not_end_is_refused(monkeypatch):
    def endless(url, file, **options):
        for _ in range(10**6):
            file.write(b"x" * 2**20)

    monkeypatch.setattr(download, "http_get", endless)
    with pytest.raises(DataError, match="more than 16777216 bytes arrived"):
        download.web_file("https://example.org/small.json", "0" * 64)
