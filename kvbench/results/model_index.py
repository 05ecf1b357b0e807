"""Scores as a model card of the Hugging Face hub holds them: the `model-index` of its metadata.

One file per model, `<model>.md`, is a model card whose metadata lists, for each data set, the metrics of all arms:
what the hub shows beside a model, and what `huggingface_hub.metadata_update` merges into an existing card. An arm's
measured budget and options stand in the arguments of its metrics, since a score without them says nothing.

Format: hub-docs' modelcard.md, through `huggingface_hub.EvalResult` and `ModelCardData`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kvbench import __version__
from kvbench.errors import RecordError
from kvbench.metrics.longbench import DATASETS
from kvbench.records.read import model_name, read_records
from kvbench.results.summary import ArmSummary, RecordDict, summarise
from kvbench.tasks.fetched import (
    LONGBENCH_E_DATASETS,
    LONGBENCH_REPO,
    LONGBENCH_REVISION,
    ZEROSCROLLS_REPO,
    ZEROSCROLLS_TEST_QUESTIONS,
)

TASK_TYPE = "text-generation"
DIGITS = 4


def export_model_index(runs: Sequence[Path], out: Path) -> dict[Path, int]:
    """Write one model card per model, with the scores of all its arms on all data sets.

    Args:
        runs: run folders; those of one model are put together.
        out: created if missing.

    Returns:
        Metrics in each file.

    Raises:
        RecordError: if a folder is no run, two runs recorded the same sample, no sample succeeded, or a file cannot be
            written.
    """
    written = {}
    for model, datasets in _by_model(runs).items():
        results = [
            result
            for dataset, records in sorted(datasets.items())
            for summary in summarise(records)
            for result in eval_results(dataset, summary, _of_arm(records, summary.arm))
        ]
        if not results:
            raise RecordError(f"no sample of {model} succeeded in {', '.join(map(str, runs))}: nothing to export")
        card = ModelCardData(model_name=model, eval_results=results)
        body = (
            f"Evaluated with kvbench {__version__}: each metric is named by its arm, the method and the fraction of "
            "the KV cache it keeps.\n"
        )
        path = out / f"{re.sub(r'[^A-Za-z0-9@.,_=+-]+', '_', model)}.md"
        try:
            ModelCard(f"---\n{card.to_yaml()}\n---\n\n# {model}\n\n{body}").save(path)
        except OSError as error:
            raise RecordError(
                f"{path} cannot be written ({error.strerror}): choose another place with --out DIR"
            ) from error
        written[path] = len(results)
    return written


def eval_results(dataset: str, summary: ArmSummary, records: Sequence[RecordDict]) -> list[EvalResult]:
    """What one arm scored on one data set: its metric, and its distance to the full cache.

    Args:
        dataset: name in the records.
        summary: the arm's line of numbers.
        records: the arm's records, at least one.

    Returns:
        Up to three results; a number that was not measured is left out.
    """
    first = records[0]
    values = {
        first["metric"]: summary.score,
        "kl_to_full": summary.kl,
        "gold_nll": summary.gold_nll,
    }
    arguments: dict[str, Any] = {
        "method": summary.method,
        "budget": summary.budget,
        "budget_measured": None if summary.budget_measured is None else round(summary.budget_measured, DIGITS),
        "options": first["options"],
        "samples": summary.n,
        "samples_failed": summary.n_failed,
    }
    return [
        EvalResult(
            task_type=TASK_TYPE,
            metric_type=metric,
            metric_name=f"{metric} ({summary.arm})",
            metric_value=round(value, DIGITS),
            metric_args={name: argument for name, argument in arguments.items() if argument not in (None, {})},
            **_dataset(dataset, first),
        )
        for metric, value in values.items()
        if value is not None
    ]


def _dataset(name: str, record: RecordDict) -> dict[str, Any]:
    """A data set as the hub names it; our synthetic tasks are on no hub and keep their own name."""
    if name in DATASETS or name.removesuffix("_e") in LONGBENCH_E_DATASETS:
        return {
            "dataset_type": LONGBENCH_REPO,
            "dataset_name": f"LongBench {name}",
            "dataset_config": name,
            "dataset_split": "test",
            "dataset_revision": LONGBENCH_REVISION,
        }
    task = name.removeprefix("zeroscrolls_")
    if task != name and task in ZEROSCROLLS_TEST_QUESTIONS:
        split = record["meta"].get("split")
        return {
            "dataset_type": ZEROSCROLLS_REPO,
            "dataset_name": f"ZeroSCROLLS {task}",
            "dataset_config": task,
            "dataset_split": split,
        }
    return {"dataset_type": f"kvbench-{name}", "dataset_name": f"kvbench {name}"}


def _by_model(runs: Sequence[Path]) -> dict[str, dict[str, list[RecordDict]]]:
    found: dict[str, dict[str, list[RecordDict]]] = {}
    seen: dict[tuple[str, str, str, str], Path] = {}
    for run in runs:
        model = model_name(run)
        for record in read_records(run):
            key = (model, record["dataset"], record["sample"], record["arm"])
            if seen.setdefault(key, run) != run:
                raise RecordError(
                    f"sample {record['sample']} of {record['dataset']} for {record['arm']} is in {seen[key]} and in "
                    f"{run}: they differ in protocol or task, export them one by one"
                )
            found.setdefault(model, {}).setdefault(record["dataset"], []).append(record)
    if not found:
        raise RecordError(f"no records in {', '.join(map(str, runs))}: give folders below output.root")
    return found


def _of_arm(records: Sequence[RecordDict], arm: str) -> list[RecordDict]:
    """The arm's records, successes first: a failure knows no metric."""
    return sorted((record for record in records if record["arm"] == arm), key=lambda record: record["status"] != "ok")
