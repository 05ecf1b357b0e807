"""Score a folder of LongBench prediction files, from kvbench or from anyone else, as the official script does.

    python -m kvbench.score predictions/llama2-7b-chat-4k
    python -m kvbench.score predictions_e/llama2-7b-chat-4k --e --write

The folder holds the official format: `<dataset>.jsonl`, one object per line with `pred`, `answers`, `all_classes` and
`length`. A table goes to standard output, and its last line is the content of the official `result.json` as one line of
JSON. Equal to LongBench/eval.py at commit 2e00731f to the last decimal, whichever other packages are installed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kvbench import strict_json
from kvbench.commands import command
from kvbench.errors import DataError
from kvbench.metrics import Metric, get_metric
from kvbench.metrics.averages import Average, kvmerger_average, longbench_averages
from kvbench.metrics.environment import check_environment
from kvbench.metrics.longbench import DATASETS, base_dataset
from kvbench.metrics.prediction_files import PredictionFile, read_predictions

CODE_METRICS = {"difflib": "code_sim", "levenshtein": "code_sim_levenshtein"}
LENGTH_BUCKETS = ("0-4k", "4-8k", "8k+")


@dataclass(frozen=True)
class DatasetScore:
    """Score of one file.

    Attributes:
        dataset: name of the data set.
        metric: name of the metric.
        rows: number of scored rows (per bucket for LongBench-E).
        score: unrounded score on the 0..100 scale, or one for each length bucket for LongBench-E (if empty NaN, in JSON
            null).
        official: the same as the official script rounds it.
    """

    dataset: str
    metric: str
    rows: int | dict[str, int]
    score: float | dict[str, float]
    official: float | dict[str, float]


def _length_bucket(length: int) -> str:
    if length < 4000:
        return LENGTH_BUCKETS[0]
    return LENGTH_BUCKETS[1] if length < 8000 else LENGTH_BUCKETS[2]


def _bucket_scores(predictions: PredictionFile, metric: Metric, scores: Sequence[dict[str, float]]) -> DatasetScore:
    """LongBench-E: numpy's mean and numpy's rounding, as the official script; NaN for an empty bucket."""
    buckets: dict[str, list[float]] = {bucket: [] for bucket in LENGTH_BUCKETS}
    for length, score in zip(predictions.lengths, scores, strict=True):
        if length is None:
            raise DataError(f"{predictions.dataset}: a row has no 'length', which LongBench-E needs")
        buckets[_length_bucket(length)].append(score["score"])
    means = {bucket: np.float64(100 * np.mean(values) if values else math.nan) for bucket, values in buckets.items()}
    return DatasetScore(
        predictions.dataset,
        metric.name,
        {bucket: len(values) for bucket, values in buckets.items()},
        {bucket: float(mean) for bucket, mean in means.items()},
        {bucket: float(round(mean, 2)) for bucket, mean in means.items()},
    )


def score_predictions(
    predictions: PredictionFile, by_length: bool = False, code_metric: str = "difflib"
) -> DatasetScore:
    """Score the rows of one file.

    Args:
        predictions: the rows.
        by_length: score every length bucket by itself (LongBench-E).
        code_metric: "difflib" (the official requirements) or "levenshtein" (what fuzzywuzzy computes where
            python-Levenshtein is installed); only lcc and repobench-p depend on it.

    Returns:
        The score, unrounded and as the official script rounds it.
    """
    name = DATASETS[base_dataset(predictions.dataset)][0]
    metric = get_metric(CODE_METRICS[code_metric] if name == "code_sim" else name)
    scores = [
        metric.score(prediction, answers, predictions.all_classes, predictions.dataset)
        for prediction, answers in zip(predictions.predictions, predictions.answers, strict=True)
    ]
    if by_length:
        return _bucket_scores(predictions, metric, scores)
    score = metric.aggregate(scores)
    return DatasetScore(predictions.dataset, metric.name, len(scores), score, round(score, 2))


def score_folder(folder: Path, by_length: bool = False, code_metric: str = "difflib") -> list[DatasetScore]:
    """Score every prediction file of a folder, in the order of their names.

    Args:
        folder: holds `<dataset>.jsonl` files; other files are ignored.
        by_length: see `score_predictions`.
        code_metric: see `score_predictions`.

    Returns:
        One score per file.

    Raises:
        DataError: if there is no such folder, no file in it, or a malformed row.
        MetricError: if the environment cannot be trusted (`check_environment`).
    """
    check_environment()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name the one that holds the <dataset>.jsonl files")
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(".jsonl") and path.is_file())
    if not paths:
        raise DataError(f"{folder} holds 0 .jsonl files; name the folder that holds the <dataset>.jsonl files")
    return [score_predictions(read_predictions(path, by_length), by_length, code_metric) for path in paths]


def official_result(scores: Sequence[DatasetScore]) -> dict[str, float | dict[str, float]]:
    """Content of the official `result.json`."""
    return {score.dataset: score.official for score in scores}


def _write_result(path: Path, result: dict[str, float | dict[str, float]]) -> None:
    try:
        path.write_text(strict_json.dumps(result, ensure_ascii=False, indent=4), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); leave out --write or copy the folder") from error


def _score_table(scores: Sequence[DatasetScore], by_length: bool) -> Table:
    table = Table(title="LongBench-E" if by_length else "LongBench")
    table.add_column("data set", overflow="fold")
    table.add_column("metric", overflow="fold")
    for heading in LENGTH_BUCKETS if by_length else ("score",):
        table.add_column(heading, justify="right")
    table.add_column("n", justify="right")
    for score in scores:
        if isinstance(score.official, dict) and isinstance(score.rows, dict):
            cells = [f"{score.official[bucket]:.2f}" for bucket in LENGTH_BUCKETS]
            rows = " / ".join(str(score.rows[bucket]) for bucket in LENGTH_BUCKETS)
        else:
            official_rows = DATASETS[base_dataset(score.dataset)][1]
            cells = [f"{score.official:.2f}"]
            rows = f"{score.rows}" if score.rows == official_rows else f"{score.rows} (official {official_rows})"
        table.add_row(score.dataset, score.metric, *cells, rows)
    return table


def _average_table(averages: Sequence[Average]) -> Table:
    table = Table(title="Averages (unweighted, of unrounded scores)")
    table.add_column("average")
    table.add_column("score", justify="right")
    table.add_column("mean of")
    for average in averages:
        if average.value is not None:
            missing = f"; INCOMPLETE, missing {', '.join(average.missing)}" if average.missing else ""
            table.add_row(average.name, f"{average.value:.2f}", f"{', '.join(average.parts)}{missing}")
    return table


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvbench.score", description="Score LongBench prediction files.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of <dataset>.jsonl files")
    parser.add_argument("--e", action="store_true", help="LongBench-E: one score per length bucket")
    parser.add_argument(
        "--code-metric",
        choices=tuple(CODE_METRICS),
        default="difflib",
        help="similarity of code lines; default difflib, which the official requirements give",
    )
    parser.add_argument("--write", action="store_true", help="write DIR/result.json in the official layout")
    return parser.parse_args(arguments)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        arguments: command line without the program's name; None for the process's own.

    Returns:
        Exit code: 0, or 2 after an error the user can mend.
    """
    options = _parse(arguments)
    scores = score_folder(options.folder, options.e, options.code_metric)
    result = official_result(scores)
    if options.write:
        _write_result(options.folder / "result.json", result)
    console = Console(soft_wrap=False)
    console.print(_score_table(scores, options.e))
    if not options.e:
        unrounded = {score.dataset: score.score for score in scores if isinstance(score.score, float)}
        console.print(_average_table((*longbench_averages(unrounded), kvmerger_average(unrounded))))
    print(strict_json.dumps(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
