"""A run's predictions in the formats that the benchmarks' own tools read, or its scores for a model card.

Files are written anew each time, never appended to: upstream's appending scored doubled rows. What is missing from a
file is said on standard error. Each exporter takes run folders and a folder to write to, and returns how many rows (or
metrics) each file has. LongBench's format is that of LongBench/pred.py and eval.py at commit 2e00731f.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kvbench import __version__
from kvbench.commands import strict_json
from kvbench.errors import RecordError
from kvbench.metrics.longbench import ROWS as LONGBENCH_ROWS
from kvbench.metrics.zeroscrolls import PREFIX as ZEROSCROLLS_PREFIX
from kvbench.metrics.zeroscrolls import TASKS as ZEROSCROLLS_TASKS
from kvbench.records.read import model_name, read_config, read_records
from kvbench.results.summary import REFERENCE_METHOD, ArmSummary, RecordDict, arm_order, summarise
from kvbench.tasks.data import LONGBENCH_REPO, LONGBENCH_REVISION, ZEROSCROLLS_REPO

ZEROSCROLLS_ROWS = {f"{ZEROSCROLLS_PREFIX}{name}": task.rows for name, task in ZEROSCROLLS_TASKS.items()}
DIGITS = 4


class Group(NamedTuple):
    """All records of one arm of one model on one data set; the label names model and arm in a file name."""

    label: str
    model: str
    dataset: str
    run: Path  # the first with such records
    records: list[RecordDict]

    @property
    def good(self) -> list[RecordDict]:
        """The successes, in the order they were recorded."""
        return [record for record in self.records if record["status"] == "ok"]


def groups_of(runs: Sequence[Path], official_rows: Mapping[str, int] | None = None) -> list[Group]:
    """The records of some runs by label and data set; `RecordError` if there are none or two runs share a sample.

    With `official_rows` of the data sets to take, others are left out and incomplete ones told.
    """
    groups: dict[tuple[str, str], Group] = {}
    known, seen = set[tuple[str, str, str]](), set[str]()
    for run in runs:
        model = model_name(run)
        for record in read_records(run):
            dataset, label = record["dataset"], safe_name(f"{model}-{record['arm']}")
            seen.add(dataset)
            if official_rows is not None and dataset not in official_rows:
                continue
            if (key := (label, dataset, record["sample"])) in known:
                raise RecordError(
                    f"sample {record['sample']} of {dataset} for {label} is in {run} and in another of the runs: they "
                    "differ in protocol or task, export them one by one"
                )
            known.add(key)
            groups.setdefault((label, dataset), Group(label, model, dataset, run, [])).records.append(record)
    if not groups:
        found = f"(found: {', '.join(sorted(seen)) or 'none'})"
        raise RecordError(f"no records of these data sets in {', '.join(map(str, runs))} {found}")
    made = [groups[key] for key in sorted(groups)]
    for group in made:
        official, n_good = (official_rows or {}).get(group.dataset), len(group.good)
        if official is not None and not n_good == len(group.records) == official:
            failed = f", {len(group.records) - n_good} failed" if n_good < len(group.records) else ""
            note(f"{group.label} {group.dataset}: {n_good} of {official} official rows{failed}")
    return made


def export_longbench(runs: Sequence[Path], out: Path) -> dict[Path, int]:
    """Write one JSONL file per arm and data set, as the official pred.py does, into `pred/` or (for "E") `pred_e/`."""
    written = {}
    for group in groups_of(runs, LONGBENCH_ROWS):
        base = group.dataset.removesuffix("_e")
        path = out / ("pred" if base == group.dataset else "pred_e") / group.label / f"{base}.jsonl"
        rows = [
            {"pred": record["prediction"], "answers": record["answers"], "all_classes": record["all_classes"] or None,
             "length": record["length"]}
            for record in group.good
        ]  # fmt: skip
        write_text(path, "".join(strict_json(row, ensure_ascii=False) + "\n" for row in rows))
        written[path] = len(rows)
    return written


def export_zeroscrolls(runs: Sequence[Path], out: Path) -> dict[Path, int]:
    """Write one CSV per arm with the predictions of all its tasks, as the leaderboard takes them."""
    by_label: dict[str, list[Group]] = {}
    for group in groups_of(runs, ZEROSCROLLS_ROWS):
        by_label.setdefault(group.label, []).append(group)
    written = {}
    for label, groups in by_label.items():
        if any(record["meta"].get("split") != "test" for group in groups for record in group.good):
            note(f"{label}: has validation questions; the leaderboard takes those of task.split=test")
        tasks = {group.dataset.removeprefix(ZEROSCROLLS_PREFIX): group.good for group in groups}
        if missing := [task for task in ZEROSCROLLS_TASKS if task not in tasks]:
            note(f"{label}: has no {', '.join(missing)}; the leaderboard takes all ten tasks")
        rows = [(task, row["sample"], row["prediction"]) for task, good in tasks.items() for row in good]
        frame = pd.DataFrame(rows, columns=["Task", "ID", "Prediction"], dtype=object)
        path = out / f"{label}.csv"
        write_text(path, frame.to_csv(index=False, lineterminator="\n"))
        written[path] = len(rows)
    return written


def export_model_index(runs: Sequence[Path], out: Path) -> dict[Path, int]:
    """Write one model card per model, `<model>.md`, whose metadata lists the metrics of all arms on all data sets.

    That is what the hub shows beside a model, and what `huggingface_hub.metadata_update` merges into an existing card.
    """
    from huggingface_hub import ModelCardData

    by_model: dict[str, list[Group]] = {}
    for group in groups_of(runs):
        by_model.setdefault(group.model, []).append(group)
    written = {}
    for model, groups in by_model.items():
        lines = [(group, summary) for group in groups for summary in summarise(group.records)]
        lines.sort(key=lambda line: (line[0].dataset, arm_order(line[1])))
        results = [result for group, summary in lines for result in _eval_results(group, summary)]
        if not results:
            raise RecordError(f"no sample of {model} succeeded in {', '.join(map(str, runs))}: nothing to export")
        metadata = ModelCardData(model_name=model, eval_results=results).to_yaml()
        body = f"Evaluated with kvbench {__version__}: each metric is named by its arm, the method and the fraction of"
        path = out / f"{safe_name(model)}.md"
        write_text(path, f"---\n{metadata}\n---\n\n# {model}\n\n{body} the KV cache it keeps.\n")
        written[path] = len(results)
    return written


def _eval_results(group: Group, summary: ArmSummary) -> list[Any]:
    """What one arm scored on one data set, and its distance to the full cache; what was not measured is left out.

    The arm's measured budget and options stand in the arguments of its metrics: a score without them says nothing.
    """
    from huggingface_hub import EvalResult

    first = (group.good or group.records)[0]  # a failure may know no metric
    values = {first["metric"]: summary.score, "kl_to_full": summary.kl, "gold_nll": summary.gold_nll}
    measured = None if summary.budget_measured is None else round(summary.budget_measured, DIGITS)
    arguments = {"method": summary.method, "budget": summary.budget, "budget_measured": measured,
                 "options": first["options"], "samples": summary.n, "samples_failed": summary.n_failed}  # fmt: skip
    shared = {"task_type": "text-generation", **_hub_dataset(group.dataset, first)}
    shared["metric_args"] = {name: argument for name, argument in arguments.items() if argument not in (None, {})}
    return [
        EvalResult(metric_type=name, metric_name=f"{name} ({summary.arm})", metric_value=round(value, DIGITS), **shared)
        for name, value in values.items() if value is not None
    ]  # fmt: skip


def export_eval_results(runs: Sequence[Path], out: Path) -> dict[Path, int]:
    """Write one file per model and arm, `<model>/.eval_results/<arm>.yaml`, an entry per data set that is on the hub.

    The hub lists such files of a model's repository beside other scores of that model. So that a compressed cache's
    score never passes for them, an arm has a file of its own, and each entry's notes say method, budget and protocol.
    """
    from huggingface_hub import eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    entries: dict[Path, list[Any]] = {}
    for group in groups_of(runs):
        (summary,) = summarise(group.records)
        if "dataset_config" not in _hub_dataset(group.dataset, group.records[0]) or summary.score is None:
            note(f"{group.label} {group.dataset}: no score of a data set on the hub, left out")
            continue
        path = out / safe_name(group.model) / ".eval_results" / f"{safe_name(summary.arm)}.yaml"
        entries.setdefault(path, []).append(_eval_result_entry(group, summary))
    if not entries:
        raise RecordError(f"no score of a data set on the hub in {', '.join(map(str, runs))}: nothing to export")
    for path, own in entries.items():
        write_text(path, yaml_dump(eval_result_entries_to_yaml(own)))
    return {path: len(own) for path, own in entries.items()}


def _eval_result_entry(group: Group, summary: ArmSummary) -> Any:
    from huggingface_hub import EvalResultEntry

    dataset, first = _hub_dataset(group.dataset, group.good[0]), group.good[0]
    kept = "the whole KV cache"
    if summary.method != REFERENCE_METHOD:
        measured = "" if summary.budget_measured is None else f" (measured {summary.budget_measured:.2%})"
        kept = f"a compressed KV cache, {summary.arm}, keeps {summary.budget:.0%}{measured}"
    protocol = read_config(group.run).get("protocol", {}).get("compress", "after_question")
    n_cut = sum(record["truncated_tokens"] > 0 for record in group.good)
    parts = [f"kvbench {__version__}: {kept}", f"protocol {protocol}", f"{first['metric']} over {summary.n} samples"]
    parts += [f"{summary.n_failed} failed"] * bool(summary.n_failed) + [f"{n_cut} prompts cut"] * bool(n_cut)
    newest = datetime.fromtimestamp(max(record["recorded_at"] for record in group.good), UTC)
    return EvalResultEntry(
        dataset_id=dataset["dataset_type"], task_id=dataset["dataset_config"],
        dataset_revision=dataset.get("dataset_revision"), value=round(summary.score or 0.0, DIGITS),
        date=newest.date().isoformat(), notes="; ".join(parts),
    )  # fmt: skip


def _hub_dataset(name: str, record: RecordDict) -> dict[str, Any]:
    """A data set as the hub names it; synthetic tasks are on no hub and keep their own name."""
    if name in LONGBENCH_ROWS:
        return {"dataset_type": LONGBENCH_REPO, "dataset_name": f"LongBench {name}", "dataset_config": name,
                "dataset_split": "test", "dataset_revision": LONGBENCH_REVISION}  # fmt: skip
    if name in ZEROSCROLLS_ROWS:
        config = name.removeprefix(ZEROSCROLLS_PREFIX)
        return {"dataset_type": ZEROSCROLLS_REPO, "dataset_name": f"ZeroSCROLLS {config}", "dataset_config": config,
                "dataset_split": record["meta"].get("split")}  # fmt: skip
    if name == "gsm8k":
        return {
            "dataset_type": "openai/gsm8k",
            "dataset_name": "GSM8K",
            "dataset_config": "main",
            "dataset_split": "test",
        }
    return {"dataset_type": f"kvbench-{name}", "dataset_name": f"kvbench {name}"}


def safe_name(name: str) -> str:
    """The name with an underscore for what file names are better without."""
    return re.sub(r"[^A-Za-z0-9@.,_=+-]+", "_", name)


def note(text: str) -> None:
    """Say on standard error what a reader of the files has to know."""
    print(f"note: {text}", file=sys.stderr)


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole; what cannot be encoded (a lone surrogate) becomes an escape."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(text.encode("utf-8", "backslashreplace"))
        scratch.replace(path)
    except OSError as error:
        what = f"{path} cannot be written ({error.strerror})"
        raise RecordError(f"{what}: choose another place with --out DIR") from error
