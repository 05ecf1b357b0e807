"""A grid of prompt lengths and needle depths, what pass keys and needles in a haystack have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.errors import ConfigError
from kvbench.tasks.base import Sample, Task


@dataclass(frozen=True, kw_only=True)
class NeedleGrid(Task):
    """Every pair of length and depth, `samples_per_cell` times.

    Attributes:
        lengths: prompt lengths in tokens, at the fixed ratio of `filler.py`.
        depths: places of what is asked for, 0 at the beginning of the text, 1 at its end.
        samples_per_cell: samples for each pair of length and depth.
        digits: digits of a number; the first is never 0.
        seed: seed of everything drawn.
    """

    lengths: Sequence[int] = (1024,)
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples_per_cell: int = 4
    digits: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse parameters that make no prompt.

        Raises:
            ConfigError: if a number is out of range.
        """
        if self.digits < 2:
            raise ConfigError(
                f"digits={self.digits}: a number needs at least 2, as the first may come from the uncompressed prompt"
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

    @abstractmethod
    def _sample(self, length_tokens: int, depth: float, repeat: int) -> Sample:
        """One sample of a cell."""
