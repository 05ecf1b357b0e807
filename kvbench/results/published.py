"""Published numbers from `results/reference/*.csv`; one without a source is refused."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvbench.errors import DataError

NOT_STATED = "not stated"
COLUMNS = ("model", "method", "budget", "dataset", "score", "source", "note")


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        model: model name as in `configs/model`, or "not stated".
        method: method name, with options after a comma where it is an ablation.
        budget: fraction of the full cache as text, or "not stated".
        dataset: data set, or what was averaged.
        score: as printed.
        source: where it was read.
        note: conflicts and doubts.
        file: name of the file it stands in, without suffix.
    """

    model: str
    method: str
    budget: str
    dataset: str
    score: str
    source: str
    note: str
    file: str = ""


def read_published(folder: Path) -> list[Published]:
    """All published numbers of a folder, files in sorted order.

    Raises:
        DataError: if a file has other columns, or a row lacks a field other than the note.
    """
    found: list[Published] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise DataError(f"{path} has columns {reader.fieldnames}: give {','.join(COLUMNS)}")
            for number, row in enumerate(reader, 2):
                empty = [name for name in COLUMNS if name != "note" and not (row[name] or "").strip()]
                if empty:
                    raise DataError(f"{path} line {number} has no {empty[0]}: no number is shown without one")
                found.append(Published(**{name: row[name].strip() for name in COLUMNS}, file=path.stem))
    return found


def lookup(
    published: Iterable[Published], model: str, method: str, budget: float, datasets: Iterable[str]
) -> list[Published]:
    """The numbers for one arm with default options on any of the named data sets."""
    names = set(datasets)
    return [
        p
        for p in published
        if p.model == model and p.method == method and p.dataset in names and p.budget == f"{budget:g}"
    ]


def unplaced(published: Iterable[Published], experiment: str) -> list[Published]:
    """The numbers of an experiment that no cell can show, because their source does not state the model."""
    return [p for p in published if p.model == NOT_STATED and p.file == experiment]
