"""Shards: fixed, balanced parts of a task's samples, so that several processes or machines can share one run.

    python -m kvbench task=qasper shard=2/8             the second of eight parts
    python -m kvbench -m task=qasper 'shard=range(8)'     all eight, one job each

Shards are counted from 1, as in "page 2 of 8". Which samples a shard holds depends on the task's samples and the number
of shards alone, never on what is recorded already, so that a shard that was cut off goes on wherever it is started
again. All arms of a sample stay in one shard: they share a prefill.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.errors import ConfigError
from kvbench.tasks.base import Sample

MAX_SHARDS = 1000
REMEDY = "give shard=I/N with I from 1 to N, e.g. shard=2/8, or with -m shard=range(8) for all eight"


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "2/8"; refuses another form, and a part that there is not."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if match is None:
            raise ConfigError(f"shard={text!r} does not say which part of how many: {REMEDY}")
        number, count = int(match[1]), int(match[2])
        if not 1 <= number <= count:
            raise ConfigError(f"shard={text} is none of the parts 1 to {count}: {REMEDY}")
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def folder_name(self) -> str:
        """Name of the shard's folder in the run folder."""
        return f"{self.number}-of-{self.count}"

    def positions(self, samples: Sequence[Sample]) -> list[int]:
        """Positions in `samples` (all of the task, in its order) of those that are this shard's, ascending.

        Sorted by falling prompt length, samples are dealt out like cards in turns of alternating direction (1 to N, N
        to 1, ...). So shards differ by one sample at most, and what they have to read is balanced too, also where long
        prompts are cut: only the order of the lengths counts.
        """
        longest_first = sorted(range(len(samples)), key=lambda position: (-len(samples[position].prompt), position))
        turns = [(rank // self.count, rank % self.count) for rank in range(len(samples))]
        dealt_to = [place if turn % 2 == 0 else self.count - 1 - place for turn, place in turns]
        return sorted(longest_first[rank] for rank, shard in enumerate(dealt_to) if shard == self.number - 1)


def spell_out_shards(arguments: Sequence[str]) -> list[str]:
    """Replace `shard=range(3)` among a command's arguments by `shard=1/3,2/3,3/3`, which Hydra sweeps over."""
    spelled = list(arguments)
    for place, argument in enumerate(arguments):
        if match := re.fullmatch(r"shard=range\((.*)\)", argument.replace(" ", "")):
            count = int(match[1]) if re.fullmatch(r"\d{1,6}", match[1], re.ASCII) else 0
            if not 1 <= count <= MAX_SHARDS:
                raise ConfigError(f"{argument} does not name a number of shards from 1 to {MAX_SHARDS}: {REMEDY}")
            spelled[place] = "shard=" + ",".join(str(Shard(number, count)) for number in range(1, count + 1))
    return spelled
