"""Exports are read back the way the official tools and the hub read them, and scored with the project's own scorer."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from kvbench.export import main
from kvbench.metrics import get_metric
from kvbench.records.folder import RunFolder
from kvbench.records.schema import Record
from kvbench.tasks.data import LONGBENCH_REVISION


def make_run(root: Path, *records: Record, **identity: Any) -> Path:
    folder = RunFolder(root, "run", {"model": {"name": "tiny/model"}, **identity})
    folder.describe({})
    folder.append(records)
    return folder.path


def record(sample: str = "a", dataset: str = "qasper", arm: str = "h2o@0.35", score=1.0, **fields: Any) -> Record:
    values: dict[str, Any] = {
        "prediction": "Paris", "answers": ["Paris", "in Paris"], "length": 7, "method": arm.partition("@")[0],
        "budget": 0.35, "metric": "qa_f1", "score": score, "parts": {"score": score}, "full_slots": 100,
        "slots_per_layer": [20, 14], "kl": 0.25, "gold_nll": 1.5, **fields,
    }  # fmt: skip
    return Record(sample=sample, dataset=dataset, arm=arm, **values)


@pytest.fixture
def export(tmp_path, capsys):
    """Export runs; returns the files below the folder, and both streams."""

    def run(kind: str, *runs: Path) -> tuple[set[str], Any]:
        assert main([kind, *map(str, runs), "--out", str(tmp_path / "out")]) == 0
        out = tmp_path / "out"
        return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}, capsys.readouterr()

    return run


def read_as_eval_py(path: Path) -> list[dict[str, Any]]:
    """The official eval.py iterates over the open text file and parses each line."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_longbench_rows_have_the_official_fields(tmp_path, export):
    odd = 'multi\nline "quoted"\r\u2028 法国'
    run = make_run(
        tmp_path,
        record("a", prediction=odd),
        record("b", dataset="trec", all_classes=["x", "y"], answers=["x"]),
        record("c", dataset="trec_e", all_classes=["x", "y"], answers=["x"]),
        record("a", arm="full"),
        record("d", status="failed", reason="too long"),
        record("p", dataset="passkey"),
    )
    for _ in range(2):  # exporting twice does not double rows
        files, streams = export("longbench", run)
    names = ("-h2o@0.35/qasper", "-h2o@0.35/trec", "-full/qasper")
    assert files == {*(f"pred/tiny_model{name}.jsonl" for name in names), "pred_e/tiny_model-h2o@0.35/trec.jsonl"}
    out = tmp_path / "out"
    path = out / "pred/tiny_model-h2o@0.35/qasper.jsonl"
    assert read_as_eval_py(path) == [{"pred": odd, "answers": ["Paris", "in Paris"], "all_classes": None, "length": 7}]
    assert "法国" in path.read_text(encoding="utf-8")
    assert read_as_eval_py(out / "pred/tiny_model-h2o@0.35/trec.jsonl")[0]["all_classes"] == ["x", "y"]
    assert json.loads(streams.out.splitlines()[-1]) == {str(out / name): 1 for name in files}
    assert "tiny_model-h2o@0.35 qasper: 1 of 200 official rows, 1 failed" in streams.err


@pytest.mark.shared
@pytest.mark.parametrize("dataset", ["trec", "dureader"])
def test_an_official_prediction_file_comes_out_byte_for_byte(dataset, tmp_path, shared_data, export):
    official = shared_data / "golden" / "llama2-7b-chat-4k" / f"{dataset}.jsonl"
    rows = [json.loads(line) for line in official.read_bytes().splitlines()]
    for row in rows:
        row.update(prediction=row.pop("pred"), all_classes=row["all_classes"] or [])
    export("longbench", make_run(tmp_path, *(record(f"row-{n}", dataset, **row) for n, row in enumerate(rows))))
    assert (tmp_path / f"out/pred/tiny_model-h2o@0.35/{dataset}.jsonl").read_bytes() == official.read_bytes()


def test_scores_of_the_export_are_those_of_the_records(tmp_path, export):
    def score(prediction, answers):
        return get_metric("qa_f1").score(prediction, answers, (), "qasper")["score"]

    predictions = ["Paris", "It is in Paris, France", "London"]
    scores = [score(text, ["Paris", "in Paris"]) for text in predictions]
    records = [record(str(i), score=s, prediction=p) for i, (s, p) in enumerate(zip(scores, predictions, strict=True))]
    export("longbench", make_run(tmp_path, *records))
    rows = read_as_eval_py(tmp_path / "out/pred/tiny_model-h2o@0.35/qasper.jsonl")
    assert [score(row["pred"], row["answers"]) for row in rows] == scores
    assert (scores[0], scores[2]) == (1.0, 0.0)


def test_zeroscrolls_csv_holds_strings_only(tmp_path, export):
    odd = 'a, "b"\nc'
    test = {"meta": {"split": "test"}}
    first = make_run(tmp_path, record("q1", "zeroscrolls_qmsum", prediction=odd, **test), n=1)
    percent = record("s1", "zeroscrolls_space_digest", prediction="60%", **test)
    second = make_run(tmp_path, percent, record("l1", dataset="qasper"), n=2)
    _, streams = export("zeroscrolls", first, second)
    with (tmp_path / "out" / "tiny_model-h2o@0.35.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [["Task", "ID", "Prediction"], ["qmsum", "q1", odd], ["space_digest", "s1", "60%"]]
    assert "has no gov_report, summ_screen_fd, squality, qasper" in streams.err
    assert "validation" not in streams.err
    validation = make_run(tmp_path, record("q1", "zeroscrolls_qmsum", meta={"split": "validation"}), n=3)
    assert "has validation questions" in export("zeroscrolls", validation)[1].err


def read_card(tmp_path: Path) -> Any:
    """The hub's own library validates what it reads."""
    card = ModelCard.load(tmp_path / "out" / "tiny_model.md")
    assert card.data.model_name == "tiny/model"
    return card.data.eval_results


def test_every_arm_s_score_and_fidelity_come_back_with_their_budget(tmp_path, export):
    run = make_run(
        tmp_path,
        record("c", status="failed", metric="", reason="no memory"),
        record("a", score=1.0, options={"recent_share": 0.25}),
        record("b", score=0.5, options={"recent_share": 0.25}),
        record("a", arm="full", budget=1.0, slots_per_layer=[50, 50], kl=0.0, score=0.75),
    )
    for _ in range(2):
        _, streams = export("model-index", run)
    results = read_card(tmp_path)
    assert list(json.loads(streams.out.splitlines()[-1]).values()) == [len(results)] == [6]
    found = {result.metric_name: result for result in results}
    assert set(found) == {f"{m} ({a})" for m in ("qa_f1", "kl_to_full", "gold_nll") for a in ("full", "h2o@0.35")}
    h2o = found["qa_f1 (h2o@0.35)"]
    assert (h2o.metric_type, h2o.metric_value, h2o.task_type) == ("qa_f1", 75.0, "text-generation")
    assert h2o.metric_args == {
        "method": "h2o", "budget": 0.35, "budget_measured": 0.34, "options": {"recent_share": 0.25}, "samples": 2,
        "samples_failed": 1,
    }  # fmt: skip
    assert found["kl_to_full (full)"].metric_value == 0.0
    assert (h2o.dataset_type, h2o.dataset_config, h2o.dataset_split) == ("THUDM/LongBench", "qasper", "test")


def test_runs_of_one_model_share_a_card_and_data_sets_keep_their_origin(tmp_path, export):
    unscored = {"metric": "rouge_geometric", "score": None, "parts": {}, "meta": {"split": "test"}}
    first = make_run(tmp_path, record("a"), record("e", "trec_e"), n=1)
    second = make_run(
        tmp_path, record("q", "zeroscrolls_qmsum", **unscored), record("p", "passkey", metric="needle", kl=None), n=2
    )
    export("model-index", first, second)
    origins: dict[tuple[str, ...], set[str]] = {}
    for result in read_card(tmp_path):
        key = (result.dataset_type, result.dataset_config, result.dataset_split)
        origins.setdefault(key, set()).add(result.metric_type)
    assert origins == {
        ("THUDM/LongBench", "qasper", "test"): {"qa_f1", "kl_to_full", "gold_nll"},
        ("THUDM/LongBench", "trec_e", "test"): {"qa_f1", "kl_to_full", "gold_nll"},
        ("tau/zero_scrolls", "qmsum", "test"): {"kl_to_full", "gold_nll"},  # no references to score with
        ("kvbench-passkey", None, None): {"needle", "gold_nll"},
    }


def test_each_arm_has_a_file_for_the_hub_that_says_what_it_kept(tmp_path, export):
    long = {"truncated_tokens": 5, "recorded_at": 1_800_000_000.0}
    first = make_run(
        tmp_path, record("a", **long), record("b", score=0.5, **long), record("a", arm="full", budget=1.0), n=1
    )
    math = record("test-1", "gsm8k", metric="last_number", recorded_at=1_800_000_000.0)
    second = make_run(tmp_path, math, record("p", "passkey", metric="needle"), n=2)
    for _ in range(2):
        files, streams = export("eval-results", first, second)
    folder = "tiny_model/.eval_results"
    assert files == {f"{folder}/h2o@0.35.yaml", f"{folder}/full.yaml"}
    assert "h2o@0.35 passkey: no score of a data set on the hub" in streams.err
    assert list(json.loads(streams.out.splitlines()[-1]).values()) == [1, 2]
    content = yaml.safe_load((tmp_path / "out" / folder / "h2o@0.35.yaml").read_text())
    gsm8k, qasper = parse_eval_result_entries(content)  # as the hub's own library reads it
    assert (gsm8k.dataset_id, gsm8k.task_id, gsm8k.value) == ("openai/gsm8k", "main", 100.0)
    assert (qasper.dataset_id, qasper.task_id, qasper.value) == ("THUDM/LongBench", "qasper", 75.0)
    assert (qasper.dataset_revision, qasper.date) == (LONGBENCH_REVISION, "2027-01-15")
    for part in ("a compressed KV cache, h2o@0.35, keeps 35% (measured 34.00%)", "protocol after_question",
                 "qa_f1 over 2 samples", "2 prompts cut"):  # fmt: skip
        assert part in qasper.notes
    (full,) = parse_eval_result_entries(yaml.safe_load((tmp_path / "out" / folder / "full.yaml").read_text()))
    assert "the whole KV cache" in full.notes
    assert "compressed" not in full.notes


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    passkey = make_run(tmp_path, record("p", dataset="passkey"))
    failed = make_run(tmp_path / "f", record("a", status="failed", score=None, parts={}, kl=None, gold_nll=None))
    twice = [make_run(tmp_path, record("a"), protocol=n) for n in (1, 2)]
    (tmp_path / "file").write_text("")
    for words, message in (
        (["longbench", str(passkey)], "no records of these data sets .* (found: passkey)"),
        (["model-index", str(failed)], "no sample of tiny/model succeeded"),
        *((["eval-results", str(run)], "no score of a data set on the hub") for run in (passkey, failed)),
        *(([kind, str(tmp_path / "none")], "is .* a run folder") for kind in ("longbench", "model-index")),
        *(([kind, *map(str, twice)], "export them one by one") for kind in ("longbench", "model-index")),
        *(([kind, str(twice[0]), "--out", str(tmp_path / "file")], "choose another place with --out DIR")
          for kind in ("longbench", "model-index")),
    ):  # fmt: skip
        assert main(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("kvbench: ")
        assert all(part in line for part in message.split(" .* ")), line
