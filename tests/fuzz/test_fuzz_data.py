"""Damaged archives and rows of the wrong kind, read as a task reads them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from verdicts import CASES, NASTY, QASPER, QUALITY, Tally, damaged, shown

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
    from kvbench.models.config import ModelConfig
    from kvbench.models.load import load_model

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
