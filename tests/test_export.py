"""Exports are read back the way the official tools read them, and scored with the project's own scorer."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from kvbench.export import LONGBENCH_ROWS, main
from kvbench.metrics import get_metric
from kvbench.records.folder import RunFolder
from kvbench.records.schema import Record


def make_run(root: Path, *records: Record, model: str = "tiny/model", **identity: Any) -> Path:
    folder = RunFolder(root, "run", {"model": {"name": model}, **identity})
    folder.describe({})
    folder.append(records)
    return folder.path


def record(sample: str = "a", dataset: str = "qasper", arm: str = "h2o@0.35", **fields: Any) -> Record:
    values: dict[str, Any] = {"prediction": "Paris", "answers": ["Paris", "in Paris"], "length": 7, **fields}
    return Record(sample=sample, dataset=dataset, arm=arm, method="h2o", budget=0.35, **values)


def read_as_eval_py(path: Path) -> list[dict[str, Any]]:
    """The official eval.py iterates over the open text file and parses each line."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_longbench_rows_have_the_official_fields(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
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
    assert main(["longbench", str(run), "--out", str(tmp_path / "out")]) == 0
    streams = capsys.readouterr()
    out = tmp_path / "out"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "pred/tiny_model-h2o@0.35/qasper.jsonl",
        "pred/tiny_model-h2o@0.35/trec.jsonl",
        "pred_e/tiny_model-h2o@0.35/trec.jsonl",
        "pred/tiny_model-full/qasper.jsonl",
    }
    path = out / "pred/tiny_model-h2o@0.35/qasper.jsonl"
    assert read_as_eval_py(path) == [{"pred": odd, "answers": ["Paris", "in Paris"], "all_classes": None, "length": 7}]
    assert "法国" in path.read_text(encoding="utf-8")
    assert read_as_eval_py(out / "pred/tiny_model-h2o@0.35/trec.jsonl")[0]["all_classes"] == ["x", "y"]
    assert json.loads(streams.out.splitlines()[-1]) == {str(out / name): 1 for name in files}
    assert "tiny_model-h2o@0.35 qasper: 1 of 200 official rows, 1 failed" in streams.err


@pytest.mark.shared
@pytest.mark.parametrize("dataset", ["trec", "dureader"])
def test_an_official_prediction_file_comes_out_byte_for_byte(dataset: str, tmp_path: Path, shared_data: Path) -> None:
    official = shared_data / "golden" / "llama2-7b-chat-4k" / f"{dataset}.jsonl"
    rows = [json.loads(line) for line in official.read_bytes().splitlines()]
    records = [
        record(
            f"row-{number}",
            dataset=dataset,
            prediction=row["pred"],
            answers=row["answers"],
            all_classes=row["all_classes"] or [],
            length=row["length"],
        )
        for number, row in enumerate(rows)
    ]
    run = make_run(tmp_path, *records)
    assert main(["longbench", str(run), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / f"out/pred/tiny_model-h2o@0.35/{dataset}.jsonl").read_bytes() == official.read_bytes()


def test_exporting_twice_does_not_double_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path, record("a"), record("b"))
    for _ in range(2):
        assert main(["longbench", str(run), "--out", str(tmp_path / "out")]) == 0
    assert len(read_as_eval_py(tmp_path / "out/pred/tiny_model-h2o@0.35/qasper.jsonl")) == 2


def test_scores_of_the_export_are_those_of_the_records(tmp_path: Path) -> None:
    metric = get_metric("qa_f1")
    predictions = ["Paris", "It is in Paris, France", "London"]
    records = [
        record(str(i), prediction=text, score=metric.score(text, ["Paris", "in Paris"], (), "qasper")["score"])
        for i, text in enumerate(predictions)
    ]
    run = make_run(tmp_path, *records)
    assert main(["longbench", str(run), "--out", str(tmp_path / "out")]) == 0
    rows = read_as_eval_py(tmp_path / "out/pred/tiny_model-h2o@0.35/qasper.jsonl")
    scores = [metric.score(row["pred"], row["answers"], (), "qasper")["score"] for row in rows]
    assert scores == [one.score for one in records]
    assert scores[0] == 1.0
    assert scores[2] == 0.0


def test_zeroscrolls_csv_holds_strings_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    odd = 'a, "b"\nc'
    test = {"meta": {"split": "test"}}
    first = make_run(tmp_path, record("q1", dataset="zeroscrolls_qmsum", prediction=odd, **test), n=1)
    second = make_run(
        tmp_path,
        record("s1", dataset="zeroscrolls_space_digest", prediction="60%", **test),
        record("l1", dataset="qasper"),
        n=2,
    )
    assert main(["zeroscrolls", str(first), str(second), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "tiny_model-h2o@0.35.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [["Task", "ID", "Prediction"], ["qmsum", "q1", odd], ["space_digest", "s1", "60%"]]
    err = capsys.readouterr().err
    assert "has no gov_report, summ_screen_fd, squality, qasper" in err
    assert "validation" not in err


def test_validation_predictions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path, record("q1", dataset="zeroscrolls_qmsum", meta={"split": "validation"}))
    assert main(["zeroscrolls", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "has validation questions" in capsys.readouterr().err


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path, record("p", dataset="passkey"))
    twice = [make_run(tmp_path, record("a"), protocol=n) for n in (1, 2)]
    (tmp_path / "file").write_text("")
    for words, message in (
        (["longbench", str(run)], "no records of these data sets .* (found: passkey)"),
        (["longbench", str(tmp_path / "none")], "is .* a run folder"),
        (["longbench", *map(str, twice)], "export them one by one"),
        (["longbench", str(twice[0]), "--out", str(tmp_path / "file")], "choose another place with --out DIR"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err.strip().splitlines()
        assert all(part in err[-1] for part in message.split(" .* ")), err


def test_official_row_counts_add_up() -> None:
    """4,750 rows in LongBench, 3,668 in LongBench-E."""
    assert sum(rows for name, rows in LONGBENCH_ROWS.items() if not name.endswith("_e")) == 4750
    assert sum(rows for name, rows in LONGBENCH_ROWS.items() if name.endswith("_e")) == 3668
