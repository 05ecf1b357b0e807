"""The folders for kvpress: names, columns and scores, and how kvpress's own code reads them where it is at hand."""

import importlib
import json
import os
import sys
from ast import literal_eval
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import yaml

from kvbench.export import main
from kvbench.records.folder import RunFolder
from kvbench.records.schema import Record

MODEL = {"name": "qwen3", "hub_id": "Qwen/Qwen3-8B"}
RULER_PREDICTIONS = [" 12 and\x0034\n", "nothing", "34, 12", ""]


def make_run(root: Path, *records: Record, compress="before_question", **config: Any) -> Path:
    config = {"model": MODEL, "protocol": {"compress": compress, "seed": 3}, **config}
    folder = RunFolder(root, "run", {"n": len(list(root.glob("*"))), **config})
    folder.describe(config)
    folder.append(records)
    return folder.path


def record(sample: str, dataset: str, arm: str = "kvmerger@0.35", **fields: Any) -> Record:
    method, _, budget = arm.partition("@")
    values = {
        "method": method, "budget": float(budget.partition(",")[0] or 1), "metric": "string_match_all", "score": 1.0,
        "parts": {"score": 1.0}, "answers": ["12", "34"], "prediction": "12 34", "budget_measured": 0.3495, **fields,
    }  # fmt: skip
    return Record(sample=sample, dataset=dataset, arm=arm, **values)


def ruler(sample: str, task: str, arm: str = "kvmerger@0.35", length: int = 4096, **fields: Any) -> Record:
    meta = {"task": task, "length_tokens": length}
    return record(sample, f"ruler-26.3-{length}-{task}", arm, meta=meta, **fields)


def ruler_records(arm: str) -> list[Record]:
    vt = [ruler(str(n), "vt", arm, prediction=text) for n, text in enumerate(RULER_PREDICTIONS)]
    qa = ruler("0", "qa_1", arm, metric="string_match_part", prediction="It is 34", answers=["12", "34"])
    return [*vt, qa, ruler("9", "vt", arm, status="failed", score=None, parts={}, budget_measured=None)]


def export(tmp_path: Path, *runs: Path) -> dict[str, Path]:
    assert main(["kvpress", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    return {path.name: path for path in (tmp_path / "out").iterdir()}


def test_one_folder_per_arm_as_kvpress_names_them(tmp_path, capsys):
    arms = ("full", "kvmerger@0.35", "h2o@0.5,recent_share=0.25")
    runs = [make_run(tmp_path / "a", *ruler_records(arms[0]), *ruler_records(arms[1]))]
    runs += [make_run(tmp_path / "b", *ruler_records(arms[2]), compress="after_question")]
    start, part = "ruler__4096__Qwen--Qwen3-8B", "fraction0.001"
    for _ in range(2):  # a second export replaces the files
        folders = export(tmp_path, *runs)
    assert set(folders) == {
        f"{start}__no_press__0.00__{part}", f"{start}__kvmerger__0.65__{part}",
        f"{start}__h2o,recent_share=0.25__0.50__{part}__query_aware",
    }  # fmt: skip
    folder = folders[f"{start}__kvmerger__0.65__{part}"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["dataset"], config["data_dir"], config["model"]) == ("ruler", "4096", "Qwen/Qwen3-8B")
    assert (config["press_name"], config["compression_ratio"], config["query_aware"]) == ("kvmerger", 0.65, False)
    assert "kvmerger@0.35" in config["press_init_command"]
    # By kvpress's rule the control character vanishes: "12 and34".
    assert json.loads((folder / "metrics.json").read_text()) == {
        "qa_1": {"string_match": 100.0}, "vt": {"string_match": 50.0},
    }  # fmt: skip
    frame = pd.read_csv(folder / "predictions.csv", keep_default_na=False)
    assert list(frame.columns) == ["_id", "task", "answer", "predicted_answer", "compression_ratio"]
    assert list(frame["predicted_answer"]) == [*RULER_PREDICTIONS, "It is 34"]
    assert set(frame["compression_ratio"]) == {0.6505}
    assert [literal_eval(answer) for answer in frame["answer"]] == [["12", "34"]] * 5
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])[str(folder / "predictions.csv")] == 5
    assert "5 of kvpress's 6500 rows" in printed.err


def test_tasks_of_several_runs_share_a_folder_and_lengths_do_not(tmp_path):
    runs = [
        make_run(tmp_path / "a", ruler("0", "vt")),
        make_run(tmp_path / "b", ruler("0", "cwe")),
        make_run(tmp_path / "c", ruler("0", "cwe", length=8192)),
    ]
    folders = export(tmp_path, *runs)
    tasks = {name.split("__")[1]: set(json.loads((f / "metrics.json").read_text())) for name, f in folders.items()}
    assert tasks == {"4096": {"vt", "cwe"}, "8192": {"cwe"}}


def longbench_records() -> list[Record]:
    same = {"metric": "qa_f1", "length": 7, "all_classes": []}
    trec = {"metric": "classification", "all_classes": ["City", "Food"], "answers": ["City"]}
    e = [record(f"e{n}", "qasper_e", **{**same, "length": n, "prediction": "the 12"}) for n in (3000, 5000, 9000)]
    return [
        record("a", "qasper", prediction=" in\n12", **same), record("b", "qasper", prediction="", **same),
        record("c", "trec", prediction="\n City\nFood", **trec), *e,
    ]  # fmt: skip


def test_longbench_goes_by_kvpress_s_names(tmp_path):
    run = make_run(
        tmp_path / "a", *longbench_records(), compress="after_question", model={**MODEL, "max_prompt_tokens": 9}
    )
    folders = {name.split("__fraction")[0]: folder for name, folder in export(tmp_path, run).items()}
    metrics = {name: json.loads((folder / "metrics.json").read_text()) for name, folder in folders.items()}
    assert metrics == {
        "longbench__qasper__Qwen--Qwen3-8B__kvmerger__0.65": 33.33,
        "longbench__trec__Qwen--Qwen3-8B__kvmerger__0.65": 100.0,
        "longbench-e__qasper_e__Qwen--Qwen3-8B__kvmerger__0.65": {"0-4k": 100.0, "4-8k": 100.0, "8k+": 100.0},
    }
    assert all("max_context9__query_aware" in path.name for path in folders.values())
    frame = pd.read_csv(folders["longbench__trec__Qwen--Qwen3-8B__kvmerger__0.65"] / "predictions.csv")
    assert (frame["task"][0], literal_eval(frame["all_classes"][0])) == ("trec", ["City", "Food"])


def test_what_kvpress_lacks_is_one_line(tmp_path, capsys):
    twice = [make_run(tmp_path / n, ruler("0", "vt"), extra=n) for n in "ab"]
    failed = make_run(tmp_path / "d", ruler("0", "vt", status="failed", score=None, parts={}))
    for runs, message in (
        ([make_run(tmp_path / "e", record("0", "gsm8k"))], "kvpress has no data set 'gsm8k' with scores"),
        ([make_run(tmp_path / "f", record("0", "zeroscrolls_qmsum"))], "export runs of RULER or LongBench"),
        (twice, "export them one by one"),
        ([failed], "no sample succeeded"),
        ([make_run(tmp_path / "g", ruler("0", "vt"), ruler("0", "vt", "kvmerger@0.3501"))], "two arms"),
    ):
        assert main(["kvpress", *map(str, runs), "--out", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def evaluation() -> Path:
    """kvpress's folder `evaluation`, which its package does not install."""
    folder = Path(os.environ.get("KVBENCH_KVPRESS_EVALUATION", ""))
    if not (folder / "evaluate_registry.py").is_file():
        pytest.skip("set KVBENCH_KVPRESS_EVALUATION to the folder `evaluation` of a checkout of NVIDIA/kvpress")
    for package in ("kvpress", "fire", "rouge"):
        pytest.importorskip(package, reason=f"kvpress's evaluation needs the package {package}")
    return folder


def test_kvpress_s_own_code_names_and_scores_the_folders_alike(tmp_path, evaluation, monkeypatch):
    """Its scorers on our predictions give our metrics; its `EvaluationConfig` takes our file and names our folder."""
    monkeypatch.syspath_prepend(str(evaluation))
    runs = [
        make_run(tmp_path / "a", *ruler_records("full"), *ruler_records("kvmerger@0.35")),
        make_run(tmp_path / "b", *longbench_records(), compress="after_question"),
    ]
    folders = export(tmp_path, *runs)
    scorers = {
        name: importlib.import_module(f"benchmarks.{room}.calculate_metrics").__dict__[function]
        for name, room, function in (
            ("ruler", "ruler", "calculate_metrics"), ("longbench", "longbench", "calculate_metrics"),
            ("longbench-e", "longbench", "calculate_metrics_e"),
        )
    }  # fmt: skip
    registry = ModuleType("evaluate_registry")  # the real one needs every press; only its three tables are asked
    registry.DATASET_REGISTRY = registry.SCORER_REGISTRY = scorers  # type: ignore[attr-defined]
    registry.PRESS_REGISTRY = dict.fromkeys(["no_press", "kvmerger"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "evaluate_registry", registry)
    config_class = importlib.import_module("evaluate").EvaluationConfig
    for name, folder in folders.items():
        frame = pd.read_csv(folder / "predictions.csv", keep_default_na=False)
        for column in frame.columns.intersection(["answer", "answers", "all_classes"]):
            frame[column] = [literal_eval(value or "None") for value in frame[column]]
        config = config_class(**yaml.safe_load((folder / "config.yaml").read_text()))
        assert scorers[config.dataset](frame) == json.loads((folder / "metrics.json").read_text())
        assert config.get_results_dir(tmp_path / "theirs").name == name
