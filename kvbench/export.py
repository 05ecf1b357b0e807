"""Write a run's predictions in the formats that the benchmarks' own tools read, or its scores for a model card.

    python -m kvbench.export longbench RUN --out DIR     DIR/pred/<model>-<arm>/<dataset>.jsonl for the official eval.py
                                                         (LongBench-E: DIR/pred_e/...)
    python -m kvbench.export zeroscrolls RUN --out DIR   DIR/<model>-<arm>.csv for the leaderboard
    python -m kvbench.export model-index RUN --out DIR   DIR/<model>.md, a model card with the scores as metadata

RUN is a run folder; several of them (a sweep over data sets) are exported together. Files are written anew each time,
never appended to: upstream's appending scored doubled rows. What is missing from a file is said on standard error. The
last line printed is one JSON document: the rows (or metrics) of each file.

Formats: LongBench/pred.py and eval.py at commit 2e00731f; tau-nlp/zero_scrolls (columns Task, ID, Prediction).
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench import strict_json
from kvbench.commands import command
from kvbench.errors import RecordError
from kvbench.metrics.longbench import DATASETS
from kvbench.records.environment import environments, refuse_mixture
from kvbench.records.read import model_name, read_calls, read_records
from kvbench.results.model_index import export_model_index
from kvbench.tasks.fetched import LONGBENCH_E_DATASETS, ZEROSCROLLS_TEST_QUESTIONS

ZEROSCROLLS_PREFIX = "zeroscrolls_"
LONGBENCH_ROWS = {
    **{name: rows for name, (_, rows) in DATASETS.items()},
    **dict.fromkeys((f"{name}_e" for name in LONGBENCH_E_DATASETS), 300),
    "qasper_e": 224,
    "multifieldqa_en_e": 150,
    "multi_news_e": 294,
}
ZEROSCROLLS_ROWS = {f"{ZEROSCROLLS_PREFIX}{task}": rows for task, rows in ZEROSCROLLS_TEST_QUESTIONS.items()}


@dataclass(frozen=True)
class Group:
    """All records of one arm of one model on one data set.

    Attributes:
        label: "<model>-<arm>", as a file name.
        dataset: name in the records.
        records: successes, in the order they were recorded.
        n_failed: samples that failed.
    """

    label: str
    dataset: str
    records: list[dict[str, Any]]
    n_failed: int


def groups_of(runs: Sequence[Path], official_rows: dict[str, int]) -> list[Group]:
    """Group the records of some runs by model, arm and data set.

    Args:
        runs: run folders.
        official_rows: the data sets to take; others are left out.

    Returns:
        The groups, sorted by label and data set.

    Raises:
        RecordError: if a folder is no run, none of the data sets is in it, or two runs recorded the same sample.
    """
    grouped: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    seen: set[str] = set()
    for run in runs:
        model = model_name(run)
        for record in read_records(run):
            seen.add(record["dataset"])
            if record["dataset"] not in official_rows:
                continue
            label = re.sub(r"[^A-Za-z0-9@.,_=+-]+", "_", f"{model}-{record['arm']}")
            samples = grouped.setdefault((label, record["dataset"]), {})
            if record["sample"] in samples:
                raise RecordError(
                    f"sample {record['sample']} of {record['dataset']} for {label} is in {run} and in another of the "
                    "runs: they differ in protocol or task, export them one by one"
                )
            samples[record["sample"]] = record
    if not grouped:
        raise RecordError(
            f"no records of these data sets in {', '.join(map(str, runs))} (found: {', '.join(sorted(seen)) or 'none'})"
        )
    groups = []
    for (label, dataset), samples in sorted(grouped.items()):
        good = [record for record in samples.values() if record["status"] == "ok"]
        groups.append(Group(label, dataset, good, len(samples) - len(good)))
    return groups


def export_longbench(runs: Sequence[Path], out: Path) -> dict[Path, int]:
    """Write one JSONL file per arm and data set, as the official pred.py does.

    Args:
        runs: run folders.
        out: created if missing; gets `pred/` and, for LongBench-E, `pred_e/`.

    Returns:
        Rows of each file.

    Raises:
        RecordError: as `groups_of`, or if a file cannot be written.
    """
    written = {}
    for group in _reported(groups_of(runs, LONGBENCH_ROWS), LONGBENCH_ROWS):
        base = group.dataset.removesuffix("_e")
        path = out / ("pred" if base == group.dataset else "pred_e") / group.label / f"{base}.jsonl"
        rows = (
            {
                "pred": record["prediction"],
                "answers": record["answers"],
                "all_classes": record["all_classes"] or None,
                "length": record["length"],
            }
            for record in group.records
        )
        _write(path, "".join(strict_json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        written[path] = len(group.records)
    return written


def export_zeroscrolls(runs: Sequence[Path], out: Path) -> dict[Path, int]:
    """Write one CSV per arm with the predictions of all its tasks, as the leaderboard takes them.

    Args:
        runs: run folders.
        out: created if missing.

    Returns:
        Rows of each file.

    Raises:
        RecordError: as `groups_of`, or if a file cannot be written.
    """
    by_label: dict[str, list[Group]] = {}
    for group in _reported(groups_of(runs, ZEROSCROLLS_ROWS), ZEROSCROLLS_ROWS):
        by_label.setdefault(group.label, []).append(group)
    written = {}
    for label, groups in by_label.items():
        if any(record["meta"].get("split") != "test" for group in groups for record in group.records):
            _note(f"{label}: has validation questions; the leaderboard takes those of task.split=test")
        tasks = {group.dataset.removeprefix(ZEROSCROLLS_PREFIX) for group in groups}
        if missing := [task for task in ZEROSCROLLS_TEST_QUESTIONS if task not in tasks]:
            _note(f"{label}: has no {', '.join(missing)}; the leaderboard takes all ten tasks")
        buffer = io.StringIO()
        table = csv.writer(buffer, lineterminator="\n")
        table.writerow(("Task", "ID", "Prediction"))
        for group in groups:
            task = group.dataset.removeprefix(ZEROSCROLLS_PREFIX)
            table.writerows((task, record["sample"], record["prediction"]) for record in group.records)
        path = out / f"{label}.csv"
        _write(path, buffer.getvalue())
        written[path] = sum(len(group.records) for group in groups)
    return written


def _reported(groups: list[Group], official_rows: dict[str, int]) -> list[Group]:
    """The groups, after saying which of them are not complete."""
    for group in groups:
        official = official_rows[group.dataset]
        if group.n_failed or len(group.records) != official:
            failed = f", {group.n_failed} failed" if group.n_failed else ""
            _note(f"{group.label} {group.dataset}: {len(group.records)} of {official} official rows{failed}")
    return groups


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole; what cannot be encoded (a lone surrogate) becomes an escape."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(text.encode("utf-8", "backslashreplace"))
        scratch.replace(path)
    except OSError as error:
        raise RecordError(
            f"{path} cannot be written ({error.strerror}): choose another place with --out DIR"
        ) from error


EXPORTERS: dict[str, Callable[[Sequence[Path], Path], dict[Path, int]]] = {
    "longbench": export_longbench,
    "zeroscrolls": export_zeroscrolls,
    "model-index": export_model_index,
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the command; None for those of the process.

    Returns:
        The exit code: 0, or 2 after an error that the user can mend.
    """
    parser = argparse.ArgumentParser(prog="python -m kvbench.export", description="Export predictions or scores.")
    parser.add_argument("format", choices=tuple(EXPORTERS))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, default=Path("export"), metavar="DIR", help="default: export")
    parser.add_argument("--mix-environments", action="store_true", help="export answers of several environments too")
    options = parser.parse_args(arguments)
    if not options.mix_environments:
        records = [record for run in options.runs for record in read_records(run)]
        calls = [call for run in options.runs for call in read_calls(run)]
        refuse_mixture(environments(records, calls), "the export", "say that it may with --mix-environments")
    written = EXPORTERS[options.format](options.runs, options.out)
    print(strict_json.dumps({str(path): rows for path, rows in written.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
