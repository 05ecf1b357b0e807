"""Reading records: whatever was written completely counts, whatever was not is passed over.

Lines can be broken only by a crash in the middle of a write; the sample is computed again by the next run. If two
processes recorded the same sample and arm, the first success counts; between the files of several shards, that of the
file first by name. Answers of different making never stand side by side: `consistent` keeps the newest and
`read_answers` counts the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kvbench.errors import RecordError
from kvbench.fields import fits
from kvbench.records.schema import HASHES, SCHEMA_VERSION, checked

ONCE_WITH_BACKEND = ("h2o", "kvmerger", "kvmerger_bias")
"""Methods that chose their kernels themselves before the engine did; it told arms apart that are one."""

Found = dict[tuple[str, str, str], dict[str, Any]]
"""Records by dataset, sample and arm, in the order of files and lines."""


def read_record_file(path: Path) -> list[dict[str, Any]]:
    """The records of one `.jsonl` file, none if it is missing; those of a newer schema version are a RecordError."""
    found: Found = {}
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    for number, line in enumerate(content.split(b"\n"), 1):
        value = parsed(line)
        schema = value.get("schema", 0) if isinstance(value, dict) else 0
        if not isinstance(schema, int) or schema > SCHEMA_VERSION:
            problem = f"has record schema {schema}, this version reads {SCHEMA_VERSION}"
            raise RecordError(f"{path} line {number} {problem}: upgrade kvbench or use another output.root")
        record = checked(value) if schema else None
        if record is None:
            continue
        if record["method"] in ONCE_WITH_BACKEND and record["options"].pop("backend", None):
            record["arm"] = re.sub(r",backend=\w+", "", record["arm"])  # the arm that has the same options today
        keep_newest(found, record)
    return list(found.values())


def parsed(line: str | bytes) -> Any:
    """The JSON value of a line, or None: NaN and Infinity, which are no JSON, included."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def keep_newest(found: Found, record: dict[str, Any]) -> None:
    """Add a record unless one of its sample and arm is there: success replaces failure, newer making older."""
    key = (record["dataset"], record["sample"], record["arm"])
    known = found.get(key)
    if known is None:
        found[key] = record
    elif any(known[name] != record[name] for name in HASHES):
        if record["recorded_at"] >= known["recorded_at"]:
            found[key] = record
    elif known["status"] != "ok" and record["status"] == "ok":
        found[key] = record


def consistent(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a run's records, one for each sample and arm, those that may stand side by side.

    Of two models only the newest one's answers are kept, of two questions to one sample and of two methods behind one
    arm likewise. Records that do not say what made them are kept: they count as an environment of their own.
    """
    kept = sorted(records, key=lambda record: record["recorded_at"])
    groups: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
        ("model_sha256", lambda record: None),
        ("question_sha256", lambda record: (record["dataset"], record["sample"])),
        ("method_sha256", lambda record: record["arm"]),
    )
    for made_by, group in groups:
        newest = {group(record): record[made_by] for record in kept if record[made_by]}
        kept = [record for record in kept if record[made_by] in ("", newest.get(group(record)))]
    return kept


def parts(run: Path) -> list[Path]:
    """Where records of a run can be: its own folder and those of its shards, in a fixed order."""
    return [run, *sorted((run / "shards").glob("*"))]


def record_files(run: Path) -> list[Path]:
    """All record files of a run, those of its shards included: arms in the order of their file names."""
    files = [file for part in parts(run) for file in (part / "records").glob("*.jsonl")]
    return sorted(files, key=lambda file: (file.name, file))


def read_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run folder that may stand side by side, those of its shards included, in the order of files."""
    return read_answers(run)[0]


def read_answers(run: Path) -> tuple[list[dict[str, Any]], int]:
    """As `read_records`, and how many samples and arms have only records of an earlier model, question or method."""
    if not (run / "records").is_dir():
        raise RecordError(f"{run} is not a run folder (it has no records/): give a folder below output.root")
    found: Found = {}
    for path in record_files(run):
        for record in read_record_file(path):
            keep_newest(found, record)
    kept = {id(record) for record in consistent(found.values())}
    return [record for record in found.values() if id(record) in kept], len(found) - len(kept)


def read_config(run: Path) -> dict[str, Any]:
    """The run's `config.json`; a RecordError if it is missing or unreadable."""
    path = run / "config.json"
    try:
        content = parsed(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error}): is {run} a run folder?") from error
    if not isinstance(content, dict):
        remedy = f"is {run} a run folder? If so, the command that made it writes the file anew"
        raise RecordError(f"{path} holds no JSON object: {remedy}")
    return content


def model_name(run: Path) -> str:
    """Name of the model in the run's `config.json`; "model" if it says none."""
    model = read_config(run).get("model")
    return str(model.get("name", "model")) if isinstance(model, dict) else "model"


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

    Each has "id", "started_at" (seconds since 1970), "host", "process", "shard" ("2/8" or None), "arms" (keys),
    "task_samples" (samples of the task, other shards' too), "missing_answers" (records this call is to add),
    "environment" (see `kvbench.records.environment`) and "hashes" (of the model, and by arm of the methods).
    """
    return sorted(filter(_is_call, _rows(run, "calls.jsonl")), key=lambda call: call["started_at"])


def read_environments(run: Path) -> list[dict[str, Any]]:
    """The environments of a run's calls, oldest first, each once; before calls said theirs, that of the first."""
    found = [call["environment"] for call in read_calls(run) if isinstance(call.get("environment"), dict)]
    if not found and (path := run / "environment.json").is_file():
        found = [content for content in [parsed(path.read_bytes())] if isinstance(content, dict)]
    return [environment for i, environment in enumerate(found) if environment not in found[:i]]


def _is_call(row: dict[str, Any]) -> bool:
    numbers = (row.get(name) for name in ("started_at", "task_samples", "missing_answers"))
    known = fits(row.get("arms"), list[str]) and fits(row.get("shard"), str | None)
    return known and all(fits(number, float) for number in numbers)


def _rows(run: Path, name: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in the lines of a file and of its namesakes of the run's shards."""
    for path in (part / name for part in parts(run)):
        if path.is_file():
            values = map(parsed, path.read_text(encoding="utf-8", errors="replace").split("\n"))
            yield from (value for value in values if isinstance(value, dict))
