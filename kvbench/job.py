"""One job of a call, in a form that survives the way to another process and back.

Hydra's launchers send the job to workers by pickling it and send back what it returns. So what a job did, refusals and
failed samples included, is its return value; a worker's job cannot reach the variables of the process that sent it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from kvbench.errors import KvbenchError
from kvbench.plan import build_plan
from kvbench.run import run_plan


@dataclass(frozen=True)
class JobOutcome:
    """What one job did.

    Attributes:
        error: one line if the job was refused, else empty; the fields below then mean nothing.
        folder: the run folder.
        model: name of the model.
        task: name of the task.
        compress: "after_question" or "before_question".
        shard: "2/8", or None without shards.
        table: whether a table is wanted.
        samples: (dataset, sample id) by position in the task.
        n_failed: samples that failed.
        mix_environments: whether answers of several environments may stand side by side.
        started_at: seconds since 1970.
        ended_at: seconds since 1970.
    """

    error: str = ""
    folder: Path = Path()
    model: str = ""
    task: str = ""
    compress: str = ""
    shard: str | None = None
    table: bool = True
    samples: dict[int, tuple[str, str]] = field(default_factory=dict)
    n_failed: int = 0
    mix_environments: bool = False
    started_at: float = 0.0
    ended_at: float = 0.0


class Job:
    """The function that Hydra runs for each job.

    Attributes:
        outcomes: what the jobs of this call did, in order. In the process that called Hydra this list is complete: its
            own jobs append to it, and `hydra_plugins.kvbench.sweeper` fills in what workers sent back.
        begun: whether any configuration was composed; an error before that is one of composition.
    """

    def __init__(self) -> None:
        self.outcomes: list[JobOutcome] = []
        self.begun = False

    def __call__(self, config: DictConfig) -> JobOutcome | None:
        """Run one composed configuration.

        Returns:
            What it did; None if a former job of this process was refused, for there a sweep ends.
        """
        self.begun = True
        if any(outcome.error for outcome in self.outcomes):
            return None
        try:
            outcome = run_config(config)
        except KvbenchError as error:  # kept from Hydra, which would add lines of its own
            outcome = JobOutcome(error=str(error))
        self.outcomes.append(outcome)
        return outcome


def run_config(config: DictConfig) -> JobOutcome:
    """Plan and run a composed configuration.

    Raises:
        KvbenchError: for anything the user can mend.
    """
    started_at = time.time()
    plan = build_plan(config)
    done = run_plan(plan, Console(stderr=True))
    return JobOutcome(
        folder=done.folder,
        model=plan.model.name,
        task=plan.task.name,
        compress=plan.compress,
        shard=None if plan.shard is None else str(plan.shard),
        table=config.output.table,
        samples=done.samples,
        n_failed=done.n_failed,
        mix_environments=plan.mix_environments,
        started_at=started_at,
        ended_at=time.time(),
    )
