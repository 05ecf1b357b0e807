"""Score a folder of LongBench prediction files, from kvbench or from anyone else, as the official script does.

    python -m kvbench.score predictions/llama2-7b-chat-4k
    python -m kvbench.score predictions_e/llama2-7b-chat-4k --e --write

The folder holds the official format of pred.py: `<dataset>.jsonl`, one object per line with `pred`, `answers`,
`all_classes` and `length`. A table goes to standard output, and its last line is the content of the official
`result.json` as one line of JSON. Equal to LongBench/eval.py at commit 2e00731f to the last decimal, whichever other
packages are installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from kvbench.arguments import CODE_METRICS, parse
from kvbench.commands import command, strict_json
from kvbench.errors import DataError
from kvbench.metrics.base import check_environment, get_metric
from kvbench.metrics.longbench import DATASETS, LENGTH_BUCKETS, averages, base_dataset, bucket_mean, length_buckets
from kvbench.tasks.data import read_jsonl

WHOLE = "score"  # the only part of a file unless it is scored by length


class DatasetScore(NamedTuple):
    """Score of one file, in parts: `WHOLE`, or the length buckets of LongBench-E."""

    dataset: str
    metric: str
    rows: dict[str, int]
    scores: dict[str, float]  # on the 0..100 scale, unrounded; NaN for an empty bucket, in JSON null
    official: dict[str, float]  # the same as the official script rounds them


def _row_problem(row: dict[str, Any], needs_length: bool, needs_classes: bool) -> str | None:
    def is_strings(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    for key in ("pred", "answers", "all_classes", *(["length"] if needs_length else [])):
        if key not in row:
            return f"has no {key!r}"
    if not isinstance(row["pred"], str):
        return f"has a 'pred' of type {type(row['pred']).__name__}, expected a string"
    if not is_strings(row["answers"]) or not row["answers"]:
        return "has 'answers' that are not a non-empty list of strings"
    if needs_classes and not row["all_classes"]:
        return "has no class names in 'all_classes'"
    if row["all_classes"] is not None and not is_strings(row["all_classes"]):
        return "has 'all_classes' that are neither null nor a list of strings"
    if needs_length and type(row["length"]) is not int:
        return f"has a 'length' of {row['length']!r}, expected a whole number"
    return None


def score_file(path: Path, by_length: bool = False, code_metric: str = "difflib") -> DatasetScore:
    """Score `<dataset>.jsonl`; `DataError` names file and line of a malformed row.

    `by_length` scores every length bucket by itself (LongBench-E). `code_metric`, for lcc and repobench-p, is "difflib"
    (the official requirements) or "levenshtein" (what fuzzywuzzy computes where python-Levenshtein is installed).
    """
    dataset = path.name.split(".")[0]
    if base_dataset(dataset) not in DATASETS:
        raise DataError(f"{path}: {dataset!r} is no LongBench data set; known are {', '.join(DATASETS)}")
    name = DATASETS[base_dataset(dataset)].metric
    rows = []
    for number, row in read_jsonl(path):
        if problem := _row_problem(row, by_length, name == "classification"):
            raise DataError(f"{path}, line {number} {problem}; mend or remove it")
        rows.append(row)
    metric = get_metric(CODE_METRICS[code_metric] if name == "code_sim" else name)
    classes = tuple(rows[-1]["all_classes"] or ())  # the official script uses those of the last row for all rows
    scores = [metric.score(row["pred"], row["answers"], classes, dataset) for row in rows]
    if not by_length:
        score = metric.aggregate(scores)
        return DatasetScore(dataset, metric.name, {WHOLE: len(rows)}, {WHOLE: score}, {WHOLE: round(score, 2)})
    buckets = length_buckets([row["length"] for row in rows], [score["score"] for score in scores])
    counts = {bucket: len(values) for bucket, values in buckets.items()}
    means = {bucket: bucket_mean(values) for bucket, values in buckets.items()}  # numpy's, and so is the rounding
    rounded = {bucket: float(round(mean, 2)) for bucket, mean in means.items()}
    return DatasetScore(dataset, metric.name, counts, {bucket: float(mean) for bucket, mean in means.items()}, rounded)


def score_folder(folder: Path, by_length: bool = False, code_metric: str = "difflib") -> list[DatasetScore]:
    """Score every prediction file of a folder in the order of their names, after `check_environment`."""
    check_environment()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name the one that holds the <dataset>.jsonl files")
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(".jsonl") and path.is_file())
    if not paths:
        raise DataError(f"{folder} holds 0 .jsonl files; name the folder that holds the <dataset>.jsonl files")
    return [score_file(path, by_length, code_metric) for path in paths]


def _print_tables(scores: Sequence[DatasetScore], by_length: bool) -> None:
    numbers = (Column(heading, justify="right") for heading in (*(LENGTH_BUCKETS if by_length else (WHOLE,)), "n"))
    names = (Column(heading, overflow="fold") for heading in ("data set", "metric"))
    table = Table(*names, *numbers, title="LongBench-E" if by_length else "LongBench")
    for score in scores:
        official = DATASETS[base_dataset(score.dataset)].rows
        note = "" if by_length or score.rows[WHOLE] == official else f" (official {official})"
        cells = (f"{value:.2f}" for value in score.official.values())
        table.add_row(score.dataset, score.metric, *cells, " / ".join(map(str, score.rows.values())) + note)
    console = Console(soft_wrap=False)
    console.print(table)
    if by_length:
        return
    title = "Averages (unweighted, of unrounded scores)"
    table = Table("average", Column("score", justify="right"), "mean of", title=title)
    for average in averages({score.dataset: score.scores[WHOLE] for score in scores}):
        if average.value is not None:
            missing = f"; INCOMPLETE, missing {', '.join(average.missing)}" if average.missing else ""
            table.add_row(average.name, f"{average.value:.2f}", f"{', '.join(average.parts)}{missing}")
    console.print(table)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, that of the process if none is given; returns the exit code, 2 after a mendable error."""
    options = parse("score", arguments)
    scores = score_folder(options.folder, options.e, options.code_metric)
    result = {score.dataset: score.official if options.e else score.official[WHOLE] for score in scores}
    if options.write:
        path = options.folder / "result.json"
        try:
            path.write_text(strict_json(result, ensure_ascii=False, indent=4), encoding="utf-8")
        except OSError as error:
            problem = f"{path} cannot be written ({error.strerror})"
            raise DataError(f"{problem}; leave out --write or copy the folder") from error
    _print_tables(scores, options.e)
    print(strict_json(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
