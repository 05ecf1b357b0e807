"""A grid of prompt lengths and needle depths, what pass keys and needles in a haystack have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from kvbench.fields import Seed, Within
from kvbench.tasks.base import Sample, Task
from kvbench.tasks.synthetic.filler import LengthTokens, check_total

Digits = Annotated[int, Within(2, 100)]


@dataclass(frozen=True, kw_only=True)
class NeedleGrid(Task):
    """Every pair of length and depth, `samples_per_cell` times.

    Attributes:
        lengths: prompt lengths in tokens, at the fixed ratio of `filler.py`.
        depths: places of what is asked for, 0 at the beginning of the text, 1 at its end.
        samples_per_cell: samples for each pair of length and depth.
        digits: digits of a number, at least 2, as the first token may come from the uncompressed prompt; the first
            digit is never 0.
        seed: seed of everything drawn.
    """

    lengths: Sequence[LengthTokens] = (1024,)
    depths: Sequence[Annotated[float, Within(0, 1)]] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples_per_cell: Annotated[int, Within(1, 1_000_000)] = 4
    digits: Digits = 5
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Refuse parameters that make no prompt, or more text than anybody reads.

        Raises:
            ConfigError: if a value is of the wrong type or out of range.
        """
        super().__post_init__()
        check_total(self.lengths, len(self.depths) * self.samples_per_cell)

    def all_samples(self) -> list[Sample]:
        """All samples; the first ones cover the whole grid once, so that a `limit` thins it evenly."""
        return [
            self._sample(length_tokens, depth, repeat)
            for repeat in range(self.samples_per_cell)
            for length_tokens in self.lengths
            for depth in self.depths
        ]

    @abstractmethod
    def _sample(self, length_tokens: int, depth: float, repeat: int) -> Sample:
        """One sample of a cell."""
