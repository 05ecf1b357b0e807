"""Hydra's own sweeper, which also hands what the jobs returned to the process that called Hydra.

A launcher may run jobs in other processes, and `hydra.main` drops what they return; without it neither the exit code
nor the table could say what happened there.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OutcomeSweeper(BasicSweeper):
    """Sweeps over all combinations and puts the jobs' return values into `outcomes` of the job function, if it has any.

    Takes the same settings as Hydra's "basic" sweeper: `max_batch_size` and `params`.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra calls this before `sweep`."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self._job: Any = task_function

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the jobs and collect what they returned.

        Args:
            arguments: the overrides of the command line.

        Returns:
            What Hydra's sweeper returns: per batch the jobs' returns.
        """
        batches = super().sweep(arguments)
        if hasattr(self._job, "outcomes"):
            returned = [job.return_value for batch in batches for job in batch]
            self._job.outcomes = [outcome for outcome in returned if outcome is not None]
        return batches
