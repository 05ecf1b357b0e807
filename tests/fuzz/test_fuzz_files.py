"""Damaged archives, rows, models and run folders, read by whatever reads them."""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console
from verdicts import CASES, NASTY, QASPER, QUALITY, Tally, damaged

from kvbench.config import composed
from kvbench.fields import shown
from kvbench.models.config import ModelConfig
from kvbench.models.load import load_model
from kvbench.plan import build_plan
from kvbench.progress import RunWatch, draw
from kvbench.records.read import read_calls, read_prompts, read_records
from kvbench.results.exports import export_longbench, export_model_index
from kvbench.results.page import render_report
from kvbench.results.summary import summarise
from kvbench.results.terminal import print_tables
from kvbench.run import run_plan
from kvbench.tasks.data import unpack
from kvbench.tasks.longbench import LongBench
from kvbench.tasks.zeroscrolls import ZeroScrolls

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def lines(row: dict[str, Any], name: str) -> bytes:
    return b"".join(json.dumps({**row, name: f"r{i}"}).encode() + b"\n" for i in range(4))


def zeroscrolls(folder: Path) -> ZeroScrolls:
    return ZeroScrolls(name="q", task="quality", metric="rouge_l", max_new_tokens=3, root=str(folder))


def test_no_damaged_archive_ends_in_a_traceback(tmp_path: Path, record_property) -> None:
    tally = Tally("archives")
    whole = []
    for method in METHODS:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("quality/validation.jsonl", lines(QUALITY, "id"))
            archive.writestr("quality/test.jsonl", lines(QUALITY, "id") + b"\n")
        whole.append(buffer.getvalue())
    path = tmp_path / "quality.zip"
    for number in range(CASES):
        path.write_bytes(damaged(whole[number % len(whole)], tally.random))
        tally.attempt(f"case {number}", zeroscrolls(tmp_path).samples)
        (target := tmp_path / f"unpacked{number}").mkdir()
        tally.attempt(f"case {number}, unpacked", lambda folder=target: unpack(path, folder, ".jsonl"))
    tally.check(record_property)


def test_no_row_ends_in_a_traceback(tmp_path: Path, shared_data: Path, record_property) -> None:
    tally = Tally("rows")
    random = tally.random
    official = str(shared_data / "longbench_official")
    longbench = LongBench(name="q", dataset="qasper", language="en", category="single-document QA", metric="qa_f1",
                          root=str(tmp_path), official=official)  # fmt: skip
    (tmp_path / "quality").mkdir()
    for number in range(CASES):
        task, row, key, path = random.choice((
            (longbench, QASPER, "_id", tmp_path / "qasper.jsonl"),
            (zeroscrolls(tmp_path), QUALITY, "id", tmp_path / "quality" / "validation.jsonl"),
        ))  # fmt: skip
        if random.random() < 0.5:
            content, case = damaged(lines(row, key), random), f"case {number}"
        else:
            field, value = random.choice(list(row)), random.choice(NASTY)
            changed = {**row, field: value} if random.random() < 0.9 else {k: v for k, v in row.items() if k != field}
            content = lines(row, key).splitlines(keepends=True)[1] + json.dumps(changed).encode() + b"\n"
            case = f"{field}={shown(value)}"
        path.write_bytes(content)
        tally.attempt(case, task.samples)
    tally.check(record_property)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_no_file_beside_the_weights_ends_in_a_traceback(name, tiny_gqa, tmp_path, record_property) -> None:
    tiny_gqa.model.save_pretrained(tmp_path)
    tiny_gqa.tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(name="m", source="local", path=str(tmp_path), dtype="float32", device="cpu")
    load_model(config)
    path = tmp_path / name
    whole = json.loads(path.read_text())
    tally = Tally(f"{name} of a model")
    random = tally.random
    for _ in range(CASES // 10):
        field, value = random.choice(list(whole)), random.choice([v for v in NASTY if v != 10**12])
        content = {**whole, field: value} if random.random() < 0.9 else value
        path.write_text(json.dumps(content))
        tally.attempt(f"{field}={shown(value)}", lambda: load_model(config))
    tally.check(record_property)


# ---- run folders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A run of four samples."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "qasper.jsonl").write_bytes(lines(QASPER, "_id"))
    plan = build_plan(composed([
        "model=tiny-random", "model.n_layers=1", "model.max_prompt_tokens=100", "task=qasper", f"data.root={folder}",
        f"data.official={shared_data / 'longbench_official'}", "method=h2o", "budget=0.5",
        "protocol.max_new_tokens=2", "protocol.gold_tokens=2", f"output.root={folder / 'runs'}",
    ]))  # fmt: skip
    return run_plan(plan, Console(file=io.StringIO())).folder


def readers(run: Path, out: Path) -> dict[str, Callable[[], Any]]:
    console = Console(file=io.StringIO(), width=100)

    def table() -> None:
        records = read_records(run)
        json.dumps([summary.to_dict() for summary in summarise(records)], allow_nan=False)
        print_tables(records, "model", "title", console)

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
