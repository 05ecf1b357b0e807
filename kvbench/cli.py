"""The command line: compose, plan, run, table. See `python -m kvbench --help`.

Exit codes: 0 done, 3 some samples failed, others as in `kvbench.commands`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from kvbench.commands import EXIT_FAILED_SAMPLES, EXIT_MEND, command, one_line, strict_json
from kvbench.config import check_arguments, defer_task_settings, register, spelled_out
from kvbench.errors import ConfigError, KvbenchError
from kvbench.paths import config_folder
from kvbench.results.trackers import RunFigures, check_tracker, track, write_csv

if TYPE_CHECKING:  # torch is imported when names and settings have been checked
    from kvbench.run import Outcome


HELP = """\
kvbench compares KV-cache compression methods: one prefill, exact budgets, official metrics.

  kvbench run [group=option ...] [key=value ...]      the same as python -m kvbench; without words, the demo

  method=h2o budget=0.35                 one method beside the full cache
  methods=[h2o,kvmerger,my.mine:Mine] budgets=[0.5,0.35]     several, in one batch (quote the brackets in zsh)
  arms=paper                             or a set of methods and budgets: what runs if no method is named
  task=passkey task.limit=8              what is asked, and how much of it
  model=Qwen/Qwen2.5-0.5B-Instruct       a named model, a hub id, FOLDER or FILE.gguf
  engine=plain                           one arm and one sample at a time: the slow oracle
  protocol.compress=before_question      compress the context only
  output.root=runs                       where runs are kept; the same command goes on where it stopped
  experiment=longbench -m                a table or figure of the paper
  -m method=h2o,cam shard=range(8)       a sweep, one job for each combination
  --json                                 end with one JSON document in a terminal too, as elsewhere
  --cfg job                              show everything that can be set, and stop

Names: kvbench ls methods | tasks | models | arms | experiments. What the settings mean: configs/config.yaml, docs/.
Exit codes: 0 done, 2 something to mend (one line says what), 3 some samples failed, 130 interrupted.
"""

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
        from kvbench.plan import build_plan
        from kvbench.results.terminal import limits_of
        from kvbench.run import Outcome, run_plan

        if any(outcome.error for outcome in self.outcomes):
            return None
        try:
            plan = build_plan(config)
            outcome = replace(
                run_plan(plan, Console(stderr=True)),
                table=config.output.table,
                gate=config.output.gate,
                limits=limits_of(OmegaConf.to_container(config.task)),
                settings=plan.config,
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
    arguments = [word for word in sys.argv[1:] if word != JSON_FLAG]
    spelled, overrides = checked_arguments(arguments)
    sys.argv[1:] = defer_task_settings(spelled)
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    job = Job()
    register(overrides)
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
    logged = [report(outcomes, arguments, with_json) for outcomes in runs.values()]
    refusals = dict.fromkeys(outcome.error for outcome in job.outcomes if outcome.error)
    for refusal in refusals:
        print(f"kvbench: {refusal}", file=sys.stderr)
    for run in logged:
        if run.settings["output"]["csv"]:
            write_csv(run)
        if tracker := run.settings["log"]:
            track(tracker, run)
    if refusals:
        return EXIT_MEND
    return EXIT_FAILED_SAMPLES if any(outcome.n_failed for outcome in job.outcomes) else 0


def checked_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments as Hydra takes them, and the overrides among them, after a check of names that needs no torch."""
    spelled = spelled_out(arguments)
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign,assignment]  # one line in place of argparse's usage
    words = parser.parse_args(spelled)
    if not (words.help or words.config_dir or words.config_path or words.config_name):  # then the names are the user's
        check_tracker(check_arguments(words.overrides, words.multirun).log)
    return spelled, words.overrides


def _refuse(problem: str) -> NoReturn:
    raise ConfigError(f"{problem}: see kvbench run --help")


def report(outcomes: Sequence[Outcome], arguments: Sequence[str], with_json: bool) -> RunFigures:
    """Print tables and verdict of one run, of whose shards or arms these are, and, as the last line, one JSON document.

    In a terminal the document comes only where `--json` asks for it; `arguments` are the words of the command line.
    Returned is the same for a tracker.
    """
    from kvbench.records.environment import doubts, environments, refuse_mixture
    from kvbench.records.read import read_answers, read_calls
    from kvbench.results.summary import summarise
    from kvbench.results.terminal import next_commands, print_tables, print_verdict

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
    counts = {name: sum(getattr(o, f"n_{name}") for o in outcomes) for name in ("new", "reused")}
    print(f"{counts['new']} new, {counts['reused']} reused answers")
    shards = sorted({outcome.shard for outcome in outcomes if outcome.shard is not None})
    document: dict[str, Any] = {
        "run": str(first.folder), "model": first.model, "task": first.task,
        **({"shards": shards} if shards else {}), "n_samples": len(samples), "answers": counts,
        "wall_s": wall_s,
        **({"notes": notes} if notes else {}), "arms": [summary.to_dict() for summary in summarise(records)],
    }  # fmt: skip
    if with_json:
        print(strict_json(document, ensure_ascii=False), flush=True)
    facts = {name: document[name] for name in ("model", "task", "n_samples", "wall_s")}
    facts |= {"compress": first.compress, **{f"{name}_answers": n for name, n in counts.items()}}
    facts["ended_at"] = datetime.fromtimestamp(max(o.ended_at for o in outcomes), UTC).isoformat(timespec="seconds")
    return RunFigures.of(first.folder, facts, first.settings, document["arms"])
