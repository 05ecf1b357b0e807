"""Pass key retrieval: one number in a dull, repetitive text, asked for at the end.

After the pass-key test of Mohtashami and Jaggi, "Landmark Attention" (2023, arXiv:2305.16300), with our own filler and
wording. The assistant's turn is opened with "The pass key is the number", so the first token the model writes, which
the uncompressed prefill predicts, is a space or a digit; all others come from the compressed cache.

    python -m kvbench task=passkey task.lengths=[1024,4096] task.depths=[0.1,0.5,0.9] task.samples_per_cell=10
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.errors import ConfigError
from kvbench.tasks.base import Sample, Task
from kvbench.tasks.synthetic.filler import (
    DULL_CHARACTERS_PER_TOKEN,
    characters_for,
    dull_filler,
    generator_for,
    hide,
)

INSTRUCTION = (
    "There is a pass key hidden in the text below. Find it and remember it, you will be asked for it at the end."
)
NEEDLE = "The pass key is the number {key}. Remember it."
QUESTION = "What is the pass key?"
ANSWER_PREFIX = "The pass key is the number"


@dataclass(frozen=True, kw_only=True)
class PassKey(Task):
    """A grid of lengths and depths, `samples_per_cell` random keys each.

    Attributes:
        lengths: prompt lengths in tokens, at the fixed ratio of `filler.py`.
        depths: places of the key, 0 at the beginning of the text, 1 at its end.
        samples_per_cell: samples for each pair of length and depth.
        digits: digits of a key; the first is never 0.
        seed: seed of the keys.
    """

    name: str = "passkey"
    lengths: Sequence[int] = (1024,)
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples_per_cell: int = 4
    digits: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse parameters that make no prompt.

        Raises:
            ConfigError: if a number is out of range.
        """
        if self.digits < 2:
            raise ConfigError(
                f"digits={self.digits}: a key needs at least 2, as the first may come from the uncompressed prompt"
            )
        if self.samples_per_cell < 1:
            raise ConfigError(f"samples_per_cell={self.samples_per_cell}: ask for at least 1")

    def all_samples(self) -> list[Sample]:
        """All samples; the first ones cover the whole grid once, so that a `limit` thins it evenly."""
        return [
            self._sample(length_tokens, depth, repeat)
            for repeat in range(self.samples_per_cell)
            for length_tokens in self.lengths
            for depth in self.depths
        ]

    def _sample(self, length_tokens: int, depth: float, repeat: int) -> Sample:
        sample_id = f"{self.name}-{length_tokens}-{depth:g}-{self.seed}-{repeat}"
        generator = generator_for(sample_id, self.digits)
        key = str(generator.randrange(10 ** (self.digits - 1), 10**self.digits))
        needle = NEEDLE.format(key=key)
        target_characters = characters_for(length_tokens, DULL_CHARACTERS_PER_TOKEN)
        fixed_characters = len(INSTRUCTION) + len(needle) + len(QUESTION) + 5
        filler = dull_filler(target_characters - fixed_characters, start=generator.randrange(7))
        context = f"{INSTRUCTION}\n\n{hide(filler, [(depth, needle)])}\n\n"
        return Sample(
            id=sample_id,
            dataset=self.name,
            prompt=context + QUESTION,
            answers=(key,),
            metric="needle",
            max_new_tokens=self.digits + 4,
            answer_prefix=ANSWER_PREFIX,
            question_start=len(context),
            meta={"length_tokens": length_tokens, "depth": depth},
        )
