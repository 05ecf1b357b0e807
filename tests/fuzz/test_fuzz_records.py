"""Run folders whose files are damaged or hold values of the wrong kind, read by every command that reads them."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console
from test_fuzz_data import lines
from verdicts import CASES, NASTY, QASPER, Tally, damaged, shown

from kvbench.experiments import composed
from kvbench.plan import build_plan
from kvbench.progress import RunWatch, draw
from kvbench.records.read import read_calls, read_prompts, read_records
from kvbench.results.exports import export_longbench, export_model_index
from kvbench.results.page import render_report
from kvbench.results.summary import print_tables, summarise
from kvbench.run import run_plan


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A run of four samples."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "qasper.jsonl").write_bytes(lines(QASPER, "_id"))
    plan = build_plan(composed([
        "model=tiny-random", "model.n_layers=1", "task=qasper", f"data.root={folder}",
        f"data.official={shared_data / 'longbench_official'}", "method=h2o", "budget=0.5",
        "model.max_prompt_tokens=100",
        "protocol.max_new_tokens=2", "protocol.gold_tokens=2", f"output.root={folder / 'runs'}",
    ]))  # fmt: skip
    return run_plan(plan, Console(file=io.StringIO())).folder


def readers(run: Path, out: Path) -> dict[str, Callable[[], Any]]:
    console = Console(file=io.StringIO(), width=100)

    def table() -> None:
        records = read_records(run)
        json.dumps([summary.to_dict() for summary in summarise(records)], allow_nan=False)
        print_tables(records, "title", console)

    return {
        "table": table,
        "report": lambda: render_report([run]),
        "progress": lambda: console.print(draw([RunWatch(run).look(time.time())])),
        "export": lambda: export_longbench([run], out),
        "model-index": lambda: export_model_index([run], out),
        "calls and prompts": lambda: (read_calls(run), read_prompts(run)),
    }


def spoil(path: Path, random: Random) -> str:
    """Damage a file, or put a value that nobody expects into one of its objects; returns what was done."""
    content = path.read_bytes()
    if random.random() < 0.3:
        path.write_bytes(damaged(content, random))
        return f"{path.name} damaged"
    rows = [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else [json.loads(content)]
    place, value = random.randrange(len(rows)), random.choice(NASTY)
    field = random.choice(list(rows[place]))
    if random.random() < 0.1:
        rows[place], field = value, "everything"
    elif random.random() < 0.1:
        del rows[place][field]
        value = "(left out)"
    else:
        rows[place][field] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{path.name}: {field}={shown(value)}"


def test_no_file_of_a_run_ends_in_a_traceback(whole, tmp_path, record_property) -> None:
    tally = Tally("files of a run")
    random = tally.random
    names = ["config.json", "calls.jsonl", "prompts.jsonl", *["records"] * 6]
    for number in range(CASES):
        run = tmp_path / str(number)
        shutil.copytree(whole, run)
        name = random.choice(names)
        path = random.choice(sorted((run / "records").iterdir())) if name == "records" else run / name
        case = spoil(path, random)
        chosen = readers(run, tmp_path / "out")
        for reader in chosen if number % 10 == 0 else set(chosen) - {"report"}:  # a report takes half a second
            tally.attempt(f"{reader}: {case}", chosen[reader])
        shutil.rmtree(run)
    tally.check(record_property)
