"""Hydra's own sweeper, which also hands what the jobs returned to the process that called Hydra.

A launcher may run jobs in other processes, and `hydra.main` drops what they return; without it neither the exit code
nor the table could say what happened there. Sweeps over nothing (a glob without a match) or over far too much, which
Hydra's would work at for hours before the first job, are refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

MAX_JOBS = 10_000


class OutcomeSweeper(BasicSweeper):
    """Sweeps over all combinations and puts the jobs' return values into `outcomes` of the job function, if it has any.

    Takes the same settings as Hydra's "basic" sweeper: `max_batch_size` and `params`.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra calls this before `sweep`."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self._job: Any = task_function

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """The jobs of the sweep, as Hydra's; `ConfigError` if there are none, or more than `MAX_JOBS`."""
        from kvbench.errors import ConfigError  # late: Hydra imports its plug-ins at every start

        counts = {override.input_line: _count(override) for override in overrides if override.is_discrete_sweep()}
        for line, count in counts.items():
            if count == 0:
                raise ConfigError(f"{line} matches nothing: name options that exist (--help lists those of each group)")
        if (n_jobs := math.prod(counts.values())) > MAX_JOBS:
            raise ConfigError(
                f"{' '.join(map(str, counts))} makes at least {n_jobs:,} jobs, the limit is {MAX_JOBS:,}: sweep over "
                "fewer values"
            )
        return BasicSweeper.split_arguments(overrides, max_batch_size)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose the jobs of a batch, as Hydra's does; then they begin."""
        super().validate_batch_is_legal(batch)
        self._job.begun = True

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the jobs and collect what they returned."""
        batches = super().sweep(arguments)
        if hasattr(self._job, "outcomes"):
            returned = [job.return_value for batch in batches for job in batch]
            self._job.outcomes = [outcome for outcome in returned if outcome is not None]
        return batches


def _count(override: Override) -> int:
    """Values of an override, as far as they need counting."""
    values = override.value()
    found = values.range() if isinstance(values, RangeSweep) else override.sweep_string_iterator()
    return sum(1 for _ in itertools.islice(found, MAX_JOBS + 1))
