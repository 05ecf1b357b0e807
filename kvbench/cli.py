"""The command line: compose, plan, run, table. See `python -m kvbench --help`.

Exit codes: 0 done, 3 some samples failed, others as in `kvbench.commands`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from kvbench.commands import EXIT_FAILED_SAMPLES, EXIT_MEND, command, one_line, strict_json
from kvbench.config import check_arguments, register
from kvbench.errors import ConfigError, KvbenchError
from kvbench.paths import config_folder
from kvbench.plan import build_plan, defer_task_settings, spell_out_shards
from kvbench.records.environment import doubts, environments, refuse_mixture
from kvbench.records.read import read_answers, read_calls
from kvbench.results.summary import summarise
from kvbench.results.terminal import limits_of, next_commands, print_tables, print_verdict
from kvbench.run import Outcome, run_plan

JSON_FLAG = "--json"


class Job:
    """The function that Hydra runs for each job, in this process or pickled to a worker.

    In the process that called Hydra, `outcomes` is complete: its own jobs append to it, and
    `hydra_plugins.kvbench.sweeper` fills in what workers sent back.
    """

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.begun = False  # whether any configuration was composed; an error before that is one of composition

    def __call__(self, config: DictConfig) -> Outcome | None:
        """Run one composed configuration; None if a former job of this process was refused, for there a sweep ends."""
        self.begun = True
        if any(outcome.error for outcome in self.outcomes):
            return None
        try:
            limits = limits_of(OmegaConf.to_container(config.task))
            outcome = replace(
                run_plan(build_plan(config), Console(stderr=True)),
                table=config.output.table,
                gate=config.output.gate,
                limits=limits,
            )
        except KvbenchError as error:  # kept from Hydra, which would add lines of its own
            outcome = Outcome(error=str(error))
        self.outcomes.append(outcome)
        return outcome


@command
def main() -> int:
    """Entry point; returns the exit code."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach us whole: we print one line
    with_json = JSON_FLAG in sys.argv or not sys.stdout.isatty()
    sys.argv[1:] = arguments = [word for word in sys.argv[1:] if word != JSON_FLAG]
    job = Job()
    register()
    check_arguments(sys.argv[1:])
    sys.argv[1:] = defer_task_settings(spell_out_shards(sys.argv[1:]))
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(job)()
    except Exception as error:
        if job.begun or isinstance(error, KvbenchError):
            raise
        raise ConfigError(one_line(error)) from error  # Hydra refuses some overrides with a plain ValueError
    runs: dict[Path, list[Outcome]] = {}
    for outcome in job.outcomes:
        if not outcome.error:
            runs.setdefault(outcome.folder, []).append(outcome)
    for outcomes in runs.values():
        report(outcomes, arguments, with_json)
    refusals = dict.fromkeys(outcome.error for outcome in job.outcomes if outcome.error)
    for refusal in refusals:
        print(f"kvbench: {refusal}", file=sys.stderr)
    if refusals:
        return EXIT_MEND
    return EXIT_FAILED_SAMPLES if any(outcome.n_failed for outcome in job.outcomes) else 0


def report(outcomes: Sequence[Outcome], arguments: Sequence[str], with_json: bool) -> None:
    """Print tables and verdict of one run, of whose shards or arms these are, and, as the last line, one JSON document.

    In a terminal the document comes only where `--json` asks for it; `arguments` are the words of the command line.
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
    wall_s = round(max(o.ended_at for o in outcomes) - min(o.started_at for o in outcomes), 2)
    if any(outcome.table for outcome in outcomes):
        console = Console(width=None if sys.stdout.isatty() else 124)
        table = print_tables(records, first.model, first.compress, console, first.gate)
        print_verdict(table, next_commands(arguments, first.folder, first.limits), console)
        print(f"The batches took {table.batch_s:.1f} s, this call {wall_s:.1f} s.")
        for note in notes:
            print(note)
    if not with_json:
        return
    shards = sorted({outcome.shard for outcome in outcomes if outcome.shard is not None})
    document: dict[str, Any] = {
        "run": str(first.folder), "model": first.model, "task": first.task,
        **({"shards": shards} if shards else {}), "n_samples": len(samples),
        "wall_s": wall_s,
        **({"notes": notes} if notes else {}), "arms": [summary.to_dict() for summary in summarise(records)],
    }  # fmt: skip
    print(strict_json(document, ensure_ascii=False), flush=True)
