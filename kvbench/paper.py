"""Run what the paper's tables and figures still lack, then write them from the records: `make paper-tables`.

    python -m kvbench.paper --experiment longbench --model llama2-7b-chat --data DIR --official DIR2
    python -m kvbench.paper --model smollm2-135m --limit 10
    python -m kvbench.paper --rebuild --model smollm2-135m      # run nothing: tables and figures from the records alone

Experiments that ask the same model the same questions share one run: the arms of all of them ride on one prefill.
Tasks whose data or weights cannot be had are named and left out; their cells name the command that fills them. What
`--limit` cut short goes on later from where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kvbench.commands import command
from kvbench.errors import KvbenchError
from kvbench.experiments import ExperimentPart, experiment_names, experiment_parts, table_spec
from kvbench.plan import Plan
from kvbench.results.cells import build_table, read_published
from kvbench.results.figures import write_figures
from kvbench.results.tables import write_table
from kvbench.run import run_plan


def merged_plans(parts: Sequence[ExperimentPart]) -> list[Plan]:
    """One plan for all parts that ask one model the same questions, with the arms of all of them; by first question."""
    merged: dict[Path, Plan] = {}
    for part in parts:
        known = merged.setdefault(part.run, part.plan)
        arms = {arm.key: arm for arm in (*known.arms, *part.plan.arms)}
        merged[part.run] = dataclasses.replace(known, arms=tuple(arms.values()))
    return list(merged.values())


def run_missing(parts: Sequence[ExperimentPart], console: Console) -> int:
    """Run the parts; returns how many tasks could not be run (each is named on the console)."""
    n_left_out = 0
    plans = merged_plans(parts)
    for number, plan in enumerate(plans, 1):
        what = f"[{number}/{len(plans)}] {plan.task.name} · {plan.model.name} · {len(plan.arms)} arms"
        console.print(what, markup=False, highlight=False)
        try:
            run_plan(plan, console)
        except KvbenchError as error:
            n_left_out += 1
            console.print(f"left out: {error}", markup=False, highlight=False, soft_wrap=True)
    return n_left_out


def write_all(parts: Sequence[ExperimentPart], results: Path, options: Sequence[str]) -> list[Path]:
    """Write tables and figures of every experiment and model, from records alone; returns the files.

    The folder `results` has `reference/`, and gets `tables/` and `figures/`; `options` are `NAME=value` settings that
    belong into the commands shown beside empty cells.
    """
    published = read_published(results / "reference")
    groups: dict[tuple[str, str], list[ExperimentPart]] = {}
    for part in parts:
        groups.setdefault((part.experiment, part.model), []).append(part)
    written = []
    for (experiment, model), group in groups.items():
        command = " ".join(["make paper-tables", f"EXPERIMENT={experiment}", f"MODEL={model}", *options])
        table = build_table(table_spec(group, command), published)
        written += write_table(table, results / "tables") + write_figures(table, results / "figures")
    return written


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done (tasks left out included: they are named), 2 something to mend."""
    parser = argparse.ArgumentParser(prog="python -m kvbench.paper", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--experiment", nargs="*", default=[], help="names in configs/experiment; default: all")
    add("--model", nargs="*", default=[], help="models that replace the experiments' own")
    add("--limit", type=int, default=None, help="at most so many samples of each task")
    add("--data", default=None, help="folder with <dataset>.jsonl files (data.root)")
    add("--official", default=None, help="folder with the official LongBench files (data.official)")
    add("--prompt-tokens", type=int, default=None, help="cut LongBench and ZeroSCROLLS prompts to this")
    add("--override", nargs="*", default=[], help="further settings, e.g. model.max_prompt_tokens=2000")
    add("--results", type=Path, default=Path("results"), help="where reference/ is and tables/ go")
    add("--rebuild", action="store_true", help="run nothing, write tables and figures from the records")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console(stderr=True)
    given = {"data.root": options.data, "data.official": options.official}
    overrides = [*options.override, *(f"{name}={folder}" for name, folder in given.items() if folder)]
    settings = {"limit": options.limit, "more": overrides, "prompt_tokens": options.prompt_tokens}
    names = options.experiment or experiment_names()
    parts = [part for name in names for part in experiment_parts(name, options.model, **settings)]
    for name in ("tables", "figures"):
        (options.results / name).mkdir(parents=True, exist_ok=True)  # what cannot be written is told before it is run
    left_out = 0 if options.rebuild else run_missing(parts, console)
    which_runs = ["DATA=DIR", "OFFICIAL=DIR"]  # the settings that decide which runs are meant, as `make` takes them
    which_runs += [] if options.prompt_tokens is None else [f"PROMPT={options.prompt_tokens}"]
    which_runs += [f'SET="{" ".join(options.override)}"'] if options.override else []
    print(*write_all(parts, options.results, which_runs), sep="\n")
    if left_out:
        console.print(f"{left_out} tasks left out, see above")
    return 0


if __name__ == "__main__":
    sys.exit(main())
