"""The command line: compose, plan, run, table. See `python -m kvbench --help`.

Exit codes: 0 done, 3 some samples failed, others as in `kvbench.commands`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console

from kvbench import strict_json
from kvbench.commands import EXIT_FAILED_SAMPLES, EXIT_MEND, command, one_line
from kvbench.config import check_arguments, config_folder, register
from kvbench.errors import ConfigError, KvbenchError
from kvbench.plan import build_plan
from kvbench.records.environment import doubts, environments, refuse_mixture
from kvbench.records.read import read_answers, read_calls
from kvbench.results.summary import summarise
from kvbench.results.terminal import print_tables
from kvbench.run import run_plan
from kvbench.shards import spell_out_shards


@dataclass(frozen=True)
class JobOutcome:
    """What one job did: a return value, since a worker's job cannot reach the process that sent it.

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
        started_at: seconds since 1970, as `ended_at`.
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
    """The function that Hydra runs for each job, in this process or pickled to a worker.

    Attributes:
        outcomes: what the jobs of this call did, in order. In the process that called Hydra this list is complete: its
            own jobs append to it, and `hydra_plugins.kvbench.sweeper` fills in what workers sent back.
        begun: whether any configuration was composed; an error before that is one of composition.
    """

    def __init__(self) -> None:
        self.outcomes: list[JobOutcome] = []
        self.begun = False

    def __call__(self, config: DictConfig) -> JobOutcome | None:
        """Run one composed configuration; None if a former job of this process was refused, for there a sweep ends."""
        self.begun = True
        if any(outcome.error for outcome in self.outcomes):
            return None
        try:
            outcome = _run(config)
        except KvbenchError as error:  # kept from Hydra, which would add lines of its own
            outcome = JobOutcome(error=str(error))
        self.outcomes.append(outcome)
        return outcome


def _run(config: DictConfig) -> JobOutcome:
    started_at = time.time()
    plan = build_plan(config)
    done = run_plan(plan, Console(stderr=True))
    return JobOutcome(
        folder=done.folder, model=plan.model.name, task=plan.task.name, compress=plan.compress,
        shard=None if plan.shard is None else str(plan.shard), table=config.output.table, samples=done.samples,
        n_failed=done.n_failed, mix_environments=plan.mix_environments, started_at=started_at, ended_at=time.time(),
    )  # fmt: skip


@command
def main() -> int:
    """Entry point; returns the exit code."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach us whole: we print one line
    job = Job()
    register()
    check_arguments(sys.argv[1:])
    sys.argv[1:] = spell_out_shards(sys.argv[1:])
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(job)()
    except Exception as error:
        if job.begun or isinstance(error, KvbenchError):
            raise
        raise ConfigError(one_line(error)) from error  # Hydra refuses some overrides with a plain ValueError
    runs: dict[Path, list[JobOutcome]] = {}
    for outcome in job.outcomes:
        if not outcome.error:
            runs.setdefault(outcome.folder, []).append(outcome)
    for outcomes in runs.values():
        report(outcomes)
    refusals = dict.fromkeys(outcome.error for outcome in job.outcomes if outcome.error)
    for refusal in refusals:
        print(f"kvbench: {refusal}", file=sys.stderr)
    if refusals:
        return EXIT_MEND
    return EXIT_FAILED_SAMPLES if any(outcome.n_failed for outcome in job.outcomes) else 0


def report(outcomes: Sequence[JobOutcome]) -> None:
    """Print the table of one run and, as the last line, one JSON document.

    Args:
        outcomes: of one or more jobs, all of one run: its shards, or a sweep over its arms.
    """
    first = outcomes[0]
    samples = {position: key for outcome in outcomes for position, key in outcome.samples.items()}
    order = {key: rank for rank, (_, key) in enumerate(sorted(samples.items()))}
    found, n_left_out = read_answers(first.folder)
    records = [r for r in found if (r["dataset"], r["sample"]) in order]
    calls = read_calls(first.folder)
    if not first.mix_environments:
        refuse_mixture(environments(records, calls), first.folder, "mix_environments=true shows them side by side")
    notes = doubts(records, calls, n_left_out)
    records.sort(key=lambda r: order[r["dataset"], r["sample"]])  # sums then do not hang on who finished first
    if any(outcome.table for outcome in outcomes):
        print_tables(records, f"{first.model} · {first.compress}", Console(width=None if sys.stdout.isatty() else 120))
        for note in notes:
            print(note)
    shards = sorted({outcome.shard for outcome in outcomes if outcome.shard is not None})
    document: dict[str, Any] = {
        "run": str(first.folder),
        "model": first.model,
        "task": first.task,
        **({"shards": shards} if shards else {}),
        "n_samples": len(samples),
        "wall_s": round(max(o.ended_at for o in outcomes) - min(o.started_at for o in outcomes), 2),
        **({"notes": notes} if notes else {}),
        "arms": [summary.to_dict() for summary in summarise(records)],
    }
    print(strict_json.dumps(document, ensure_ascii=False), flush=True)
