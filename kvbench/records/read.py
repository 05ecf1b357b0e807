"""Reading records: whatever was written completely counts, whatever was not is reported and skipped.

Lines can be broken only by a crash in the middle of a write; they are counted in `RecordFile.broken_lines`, and the
sample is computed again by the next run. If two processes recorded the same sample and arm, the first success counts;
between the files of several shards, that of the file first by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.errors import RecordError
from kvbench.records.schema import SCHEMA_VERSION

REQUIRED_TEXTS = ("sample", "dataset", "arm", "status")


@dataclass
class RecordFile:
    """What one record file holds.

    Attributes:
        records: one dictionary per (dataset, sample, arm), in file order; a success replaces an earlier failure.
        broken_lines: line numbers that are no complete record.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    broken_lines: list[int] = field(default_factory=list)


def read_record_file(path: Path) -> RecordFile:
    """Read one `.jsonl` file; a missing file is empty.

    Raises:
        RecordError: for records of a newer schema version.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    result = RecordFile()
    if not path.exists():
        return result
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            result.broken_lines.append(number)
            continue
        if not (isinstance(record, dict) and "schema" in record and _has_texts(record)):
            result.broken_lines.append(number)
            continue
        if not isinstance(record["schema"], int) or record["schema"] > SCHEMA_VERSION:
            raise RecordError(
                f"{path} line {number} has record schema {record['schema']}, this version reads {SCHEMA_VERSION}: "
                "upgrade kvbench or use another output.root"
            )
        _keep(found, record)
    result.records = list(found.values())
    return result


def _has_texts(record: dict[str, Any]) -> bool:
    return all(isinstance(record.get(name), str) for name in REQUIRED_TEXTS)


def _keep(found: dict[tuple[str, str, str], dict[str, Any]], record: dict[str, Any]) -> None:
    """Add a record unless one of its sample and arm is there; a success replaces a failure."""
    key = (record["dataset"], record["sample"], record["arm"])
    if key not in found or (found[key]["status"] != "ok" and record["status"] == "ok"):
        found[key] = record


def parts(run: Path) -> list[Path]:
    """Where records of a run can be: its own folder and those of its shards, in a fixed order."""
    return [run, *sorted((run / "shards").glob("*"))]


def record_files(run: Path) -> list[Path]:
    """All record files of a run, those of its shards included: arms in the order of their file names."""
    files = [file for part in parts(run) for file in (part / "records").glob("*.jsonl")]
    return sorted(files, key=lambda file: (file.name, file))


def read_records(run: Path) -> list[dict[str, Any]]:
    """All records of a run folder, those of its shards included, arms in the order of their file names.

    Args:
        run: the run's folder (the one with `config.json`).

    Raises:
        RecordError: if the folder is no run folder or holds records of a newer version.
    """
    if not (run / "records").is_dir():
        raise RecordError(f"{run} is not a run folder (it has no records/): give a folder below output.root")
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in record_files(run):
        for record in read_record_file(path).records:
            _keep(found, record)
    return list(found.values())


def read_config(run: Path) -> dict[str, Any]:
    """The run's `config.json`.

    Raises:
        RecordError: if it is missing or unreadable.
    """
    path = run / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} cannot be read ({error}): is {run} a run folder?") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} holds no JSON object: is {run} a run folder?")
    return content


def read_prompts(run: Path) -> dict[tuple[str, str], str]:
    """Prompts by (dataset, sample) from the run's `prompts.jsonl` files; broken lines are passed over."""
    prompts: dict[tuple[str, str], str] = {}
    for row in _rows(run, "prompts.jsonl"):
        try:
            prompts.setdefault((row["dataset"], row["sample"]), str(row["prompt"]))
        except (KeyError, TypeError):
            continue
    return prompts


def read_calls(run: Path) -> list[dict[str, Any]]:
    """What the calls of a run set out to do, oldest first; broken lines are passed over.

    Returns:
        Dictionaries with "started_at" (seconds since 1970), "host", "process", "shard" ("2/8" or None), "arms" (keys),
        "task_samples" (samples of the task, other shards' too) and "missing_answers" (records this call is to add).
    """
    numbers = ("started_at", "task_samples", "missing_answers")
    calls = [
        row
        for row in _rows(run, "calls.jsonl")
        if isinstance(row.get("arms"), list) and all(isinstance(row.get(name), (int, float)) for name in numbers)
    ]
    return sorted(calls, key=lambda call: call["started_at"])


def _rows(run: Path, name: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in the lines of a file and of its namesakes of the run's shards."""
    for part in parts(run):
        path = part / name
        if not path.is_file():
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row
