"""Made-up run folders for tests of the report; their numbers mean nothing."""

import json
from pathlib import Path
from typing import Any

from kvbench.records.schema import Record
from kvbench.results.cells import ExpectedArm, ExpectedColumn, TableSpec
from kvbench.results.statistics import Scores

ARMS = ("full", "h2o@0.5", "kvmerger@0.5", "kvmerger@0.35")


def make_record(arm: str, sample: str, score: float, dataset: str = "qasper", **fields: Any) -> Record:
    method, _, budget = arm.partition("@")
    kept = float(budget or 1)
    defaults: dict[str, Any] = {
        "metric": "qa_f1", "parts": {"score": score}, "score": score, "prediction": f"{arm} says {score}",
        "token_ids": [1, 2, round(score * 10)], "answers": ["gold"], "gold_nll": 1.0 - score / 2, "kl": 1 - kept,
        "slots_per_layer": [round(50 * kept), round(50 * kept)], "full_slots": 100, "cache_bytes": round(4096 * kept),
        "full_bytes": 4096, "budget_measured": kept, "seconds": 0.5, "gold_tokens": 2, "finish": "stop",
    }  # fmt: skip
    return Record(sample=sample, dataset=dataset, arm=arm, method=method, budget=kept, **{**defaults, **fields})


def make_run(root: Path, name: str, records: list[Record]) -> Path:
    run = root / name
    (run / "records").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"model": {"name": "m"}, "protocol": {"seed": 0}, "config": {}}))
    environment = {"kvbench": "0.1.0", "commit": "abc", "torch_threads": 2, "devices": [], "packages": {"torch": "2"}}
    (run / "environment.json").write_text(json.dumps(environment))
    for arm in {record.arm for record in records}:
        lines = [json.dumps(record.to_dict()) for record in records if record.arm == arm]
        (run / "records" / f"{arm}.jsonl").write_text("\n".join(lines) + "\n")
    return run


def make_spec(*runs: tuple[str, Path], model: str = "llama2-7b-chat", arms: tuple[str, ...] = ARMS) -> TableSpec:
    expected = tuple(ExpectedArm(a, a.partition("@")[0], float(a.partition("@")[2] or 1), True) for a in arms)
    return TableSpec("test", model, "a test", expected, tuple(ExpectedColumn(n, r, f"make {n}") for n, r in runs))


def make_scores(values, metric="qa_f1") -> Scores:
    return Scores(metric, {f"s{i:04d}": {"score": float(value)} for i, value in enumerate(values)})
