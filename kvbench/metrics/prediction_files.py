"""Prediction files in the format of LongBench's pred.py: `<dataset>.jsonl`, one object per line.

Every row has `pred`, `answers`, `all_classes` and `length`. Files come from anyone, so every row is checked and an
error names the file and the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import DataError
from kvbench.metrics.longbench import DATASETS, base_dataset
from kvbench.tasks.jsonl import read_jsonl


@dataclass(frozen=True)
class PredictionFile:
    """The rows of one file.

    Attributes:
        dataset: file name up to the first dot.
        predictions: generated texts.
        answers: reference answers of every row.
        lengths: the data set's length fields (words or characters); None where a row has none.
        all_classes: label set of the LAST row, which the official script uses for all rows.
    """

    dataset: str
    predictions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    lengths: tuple[int | None, ...]
    all_classes: tuple[str, ...]


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _row_problem(row: dict[str, Any], needs_length: bool, needs_classes: bool) -> str | None:
    """What is wrong with a row, or None."""
    for key in ("pred", "answers", "all_classes", *(["length"] if needs_length else [])):
        if key not in row:
            return f"has no {key!r}"
    if not isinstance(row["pred"], str):
        return f"has a 'pred' of type {type(row['pred']).__name__}, expected a string"
    if not _strings(row["answers"]) or not row["answers"]:
        return "has 'answers' that are not a non-empty list of strings"
    if needs_classes and not row["all_classes"]:
        return "has no class names in 'all_classes'"
    if row["all_classes"] is not None and not _strings(row["all_classes"]):
        return "has 'all_classes' that are neither null nor a list of strings"
    if needs_length and (not isinstance(row["length"], int) or isinstance(row["length"], bool)):
        return f"has a 'length' of {row['length']!r}, expected a whole number"
    return None


def read_predictions(path: Path, needs_length: bool = False) -> PredictionFile:
    """Read one file of predictions in the official format.

    Args:
        path: `<dataset>.jsonl`.
        needs_length: whether every row must have its length field (LongBench-E).

    Returns:
        Its rows in order.

    Raises:
        DataError: if the data set is unknown, the file is empty or a row is malformed; names file and line.
    """
    dataset = path.name.split(".")[0]
    if base_dataset(dataset) not in DATASETS:
        raise DataError(f"{path}: {dataset!r} is no LongBench data set; known are {', '.join(DATASETS)}")
    needs_classes = DATASETS[base_dataset(dataset)][0] == "classification"
    rows = []
    for number, row in read_jsonl(path):
        problem = _row_problem(row, needs_length, needs_classes)
        if problem:
            raise DataError(f"{path}, line {number} {problem}; mend or remove it")
        rows.append(row)
    return PredictionFile(
        dataset,
        tuple(row["pred"] for row in rows),
        tuple(tuple(row["answers"]) for row in rows),
        tuple(row.get("length") for row in rows),
        tuple(rows[-1]["all_classes"] or ()),
    )
