"""The command line: compose, plan, run, table. See `python -m kvbench --help`.

Exit codes: 0 done, 2 something to mend (one line on standard error), 3 some samples failed, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from kvbench.config import config_folder, register
from kvbench.errors import KvbenchError
from kvbench.plan import Plan, build_plan
from kvbench.records.read import read_records
from kvbench.report.summary import summarise
from kvbench.report.terminal import print_tables
from kvbench.run import RunOutcome, run_plan

EXIT_MEND, EXIT_FAILED_SAMPLES, EXIT_INTERRUPTED = 2, 3, 130


def run(config: DictConfig) -> int:
    """One job: run the composed configuration; returns the number of failed samples."""
    plan = build_plan(config)
    outcome = run_plan(plan, Console(stderr=True))
    report(plan, outcome, table=config.output.table)
    return outcome.n_failed


def report(plan: Plan, outcome: RunOutcome, table: bool) -> None:
    """Print the table and, as the last line, one JSON document."""
    wanted = set(outcome.samples)
    records = [r for r in read_records(outcome.folder) if (r["dataset"], r["sample"]) in wanted]
    if table:
        print_tables(
            records, f"{plan.model.name} · {plan.compress}", Console(width=None if sys.stdout.isatty() else 120)
        )
    document: dict[str, Any] = {
        "run": str(outcome.folder),
        "model": plan.model.name,
        "task": plan.task.name,
        "n_samples": len(outcome.samples),
        "wall_s": round(outcome.wall_s, 2),
        "arms": [summary.to_dict() for summary in summarise(records)],
    }
    print(json.dumps(document, ensure_ascii=False), flush=True)


def main() -> int:
    """Entry point; returns the exit code."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach us whole: we print one line
    n_failed = 0
    refused: KvbenchError | None = None

    def job(config: DictConfig) -> None:
        nonlocal n_failed, refused
        if refused is not None:  # a sweep ends at its first impossible job
            return
        try:
            n_failed += run(config)
        except KvbenchError as error:  # kept from Hydra, which would add lines of its own
            refused = error

    try:
        register()
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(job)()
        if refused is not None:
            raise refused
    except KvbenchError as error:
        print(f"kvbench: {error}", file=sys.stderr)
        return EXIT_MEND
    except (HydraException, OmegaConfBaseException) as error:
        print(f"kvbench: {_one_line(error)}", file=sys.stderr)
        return EXIT_MEND
    except KeyboardInterrupt as error:
        progress = f" ({error})" if str(error) else ""
        print(f"kvbench: interrupted{progress}; what was recorded stays, the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_FAILED_SAMPLES if n_failed else 0


def _one_line(error: BaseException) -> str:
    """Hydra's message in one line, with what it knows of the cause."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        parts.append(" ".join(str(current).split()))
        current = current.__cause__
    unique = [part for i, part in enumerate(parts) if part and part not in parts[:i]]
    return " <- ".join(unique)
