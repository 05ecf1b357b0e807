"""Several tasks asked as one: their samples in turn, each scored by its own metric under its own data set name.

python -m kvbench task=demo task.tasks.passkey.limit=2 task.tasks.fewshot.limit=2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from kvbench.errors import ConfigError
from kvbench.tasks.base import Sample, Task


@dataclass(frozen=True, kw_only=True)
class Mix(Task):
    """The samples of several tasks, one of each in turn, so that a `limit` keeps the mixture.

    Attributes:
        tasks: the parts by any key (the key makes them addressable on the command line); a part's own `limit` holds.
    """

    name: str = "mix"
    tasks: Mapping[str, Task] = field(default_factory=dict)

    def all_samples(self) -> list[Sample]:
        """The parts' samples in turn.

        Raises:
            ConfigError: if there are no parts.
        """
        if not self.tasks:
            raise ConfigError(f"task {self.name} mixes 0 tasks: name at least 1 in task.tasks")
        rounds = zip_longest(*(task.samples() for task in self.tasks.values()))
        return [sample for turn in rounds for sample in turn if sample is not None]
