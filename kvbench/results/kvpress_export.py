"""A run in the layout of kvpress's evaluation folder, which its leaderboard takes: one folder per arm.

    OUT/ruler__4096__Qwen--Qwen3-8B__kvmerger__0.50/{predictions.csv,metrics.json,config.yaml}

After `evaluation/evaluate.py` and `evaluation/benchmarks/*/calculate_metrics.py` of NVIDIA/kvpress at commit 8bb29b9:
names of folders, the keys of the configuration, columns, and the scores. Those are computed anew by kvpress's rules,
which differ from the official ones: RULER's control characters vanish, LongBench predictions lose leading white space.
kvpress asks in other words (its own hub data sets), so a folder compares methods within kvbench's folders.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kvbench import __version__
from kvbench.commands import strict_json
from kvbench.errors import RecordError
from kvbench.metrics import get_metric
from kvbench.metrics.longbench import ROWS, base_dataset, bucket_mean, length_buckets
from kvbench.records.read import model_name, read_config, read_records
from kvbench.results.exports import note, safe_name, write_text
from kvbench.results.summary import REFERENCE_METHOD, RecordDict, grouped

NO_PRESS = "no_press"  # kvpress's name of the full cache
RULER_ROWS = 13 * 500  # tasks times samples of kvpress's data set, at each length
_CONTROL = re.compile(r"[\x00-\x1f]")


class _DataSet(NamedTuple):
    """Where kvpress has a data set, under what name, and with how many rows (RULER: of all tasks)."""

    name: str
    data_dir: str
    task: str
    rows: int


def export_kvpress(runs: Sequence[Path], out: Path) -> dict[Path, int]:
    """Write one folder per arm, length and data set of kvpress; `RecordError` for data sets that kvpress lacks.

    An arm is told by its method and options (`press_name`) and the share of the cache it removes. Where compression saw
    the question, the folder says `query_aware`; where samples are missing, `fraction`, as kvpress does.
    """
    from huggingface_hub.utils import yaml_dump

    collected: dict[str, tuple[dict[str, Any], _DataSet, list[tuple[str, RecordDict]]]] = {}
    seen = set[tuple[str, str, str]]()
    for run in runs:
        config, model = read_config(run), model_name(run)
        for (arm, dataset), records in grouped(read_records(run), "arm", "dataset").items():
            known = _data_set(dataset, records[0])
            settings = _settings(config, model, known, records[0])
            key = strict_json(settings)
            for record in records:
                if (sample := (key, dataset, record["sample"])) in seen:
                    twice = f"sample {sample[2]} of {dataset} for {arm} is in two of the runs"
                    raise RecordError(f"{twice}: export them one by one")
                seen.add(sample)
            good = [(known.task, record) for record in records if record["status"] == "ok"]
            collected.setdefault(key, (settings, known, []))[2].extend(good)
    written: dict[Path, int] = {}
    for settings, known, good in collected.values():
        if not good:
            continue
        settings["fraction"] = min(1.0, round(len(good) / known.rows, 6))
        if settings["fraction"] < 1:
            note(f"{settings['press_name']} {known.name} {known.data_dir}: {len(good)} of kvpress's {known.rows} rows")
        folder = out / _folder_name(settings)
        if folder / "predictions.csv" in written:
            raise RecordError(f"two arms or runs would both be {folder.name}: export them one by one")
        frame = pd.DataFrame([_row(task, record, known.name) for task, record in good])
        table = frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        write_text(folder / "predictions.csv", table)
        write_text(folder / "metrics.json", strict_json(_metrics(known.name, good), indent=4) + "\n")
        write_text(folder / "config.yaml", yaml_dump(settings))
        written[folder / "predictions.csv"] = len(good)
    if not written:
        raise RecordError(f"no sample succeeded in {', '.join(map(str, runs))}: nothing to export")
    return written


def _data_set(dataset: str, record: RecordDict) -> _DataSet:
    if dataset in ROWS:
        base = base_dataset(dataset)
        return _DataSet("longbench" if base == dataset else "longbench-e", dataset, base, ROWS[dataset])
    task, length = record["meta"].get("task"), record["meta"].get("length_tokens")
    if not dataset.startswith("ruler") or not task or not length:
        raise RecordError(f"kvpress has no data set {dataset!r} with scores: export runs of RULER or LongBench")
    return _DataSet("ruler", str(length), str(task), RULER_ROWS)


def _settings(config: dict[str, Any], model: str, known: _DataSet, record: RecordDict) -> dict[str, Any]:
    """The configuration file, without `fraction`: keys of kvpress's `EvaluationConfig`."""
    settings, protocol = config.get("model", {}), config.get("protocol", {})
    full = record["method"] == REFERENCE_METHOD
    options = record["arm"].partition("@")[2].partition(",")[2]
    return {
        "dataset": known.name,
        "data_dir": known.data_dir,
        "model": settings.get("hub_id") or model,
        "press_name": NO_PRESS if full else ",".join(filter(None, (record["method"], options))),
        "compression_ratio": 0.0 if full else round(1 - record["budget"], 6),
        "fraction": 1.0,
        "max_new_tokens": protocol.get("max_new_tokens"),
        "max_context_length": settings.get("max_prompt_tokens"),
        "query_aware": protocol.get("compress", "after_question") == "after_question",
        "press_init_command": f"kvbench {__version__}: {record['arm']}",
        "seed": protocol.get("seed", 0),
    }


def _folder_name(settings: dict[str, Any]) -> str:
    """As `EvaluationConfig.get_results_dir` joins it."""
    parts = [settings["dataset"], settings["data_dir"], settings["model"].replace("/", "--"), settings["press_name"]]
    parts.append(f"{settings['compression_ratio']:.2f}")
    if settings["fraction"] < 1:
        parts.append(f"fraction{settings['fraction']:.3f}")
    if settings["max_context_length"] is not None:
        parts.append(f"max_context{settings['max_context_length']}")
    if settings["query_aware"]:
        parts.append("query_aware")
    return safe_name("__".join(parts))


def _row(task: str, record: RecordDict, name: str) -> dict[str, Any]:
    """A line of the predictions: kvpress's columns, apart from those of its own prompts, which records do not have."""
    measured = record["budget_measured"]
    own = {"answer": record["answers"]}
    if name != "ruler":
        own = {"answers": record["answers"], "all_classes": record["all_classes"] or None, "length": record["length"]}
    return {
        "_id": record["sample"], "task": task, **own, "predicted_answer": record["prediction"],
        "compression_ratio": None if measured is None else round(1 - measured, 6),
    }  # fmt: skip


def _metrics(name: str, good: Sequence[tuple[str, RecordDict]]) -> Any:
    """What kvpress's scorer of the data set returns for these predictions."""
    if name == "longbench-e":
        scores = [_score(record, record["prediction"]) for _, record in good]
        buckets = length_buckets([record["length"] or 0 for _, record in good], scores)
        return {bucket: round(float(bucket_mean(own)), 2) if own else None for bucket, own in buckets.items()}
    if name == "longbench":
        scores = [_score(record, record["prediction"].lstrip()) for _, record in good]
        return round(100 * sum(scores) / len(scores), 2)
    by_task: dict[str, list[float]] = {}
    for task, record in good:
        text = _CONTROL.sub("", record["prediction"].strip()).strip()
        by_task.setdefault(task, []).append(_score(record, text))
    return {
        task: {"string_match": round(sum(scores) / len(scores) * 100, 2)} for task, scores in sorted(by_task.items())
    }


def _score(record: RecordDict, text: str) -> float:
    scored = get_metric(record["metric"]).score(text, record["answers"], record["all_classes"], record["dataset"])
    return scored["score"]
