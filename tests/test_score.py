import json

import pytest

from kvbench import score
from kvbench.errors import MetricError
from kvbench.score import main


def row(prediction, answer, length=100, all_classes=None):
    return {"pred": prediction, "answers": [answer], "all_classes": all_classes, "length": length}


def write(folder, dataset, rows):
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows)
    (folder / f"{dataset}.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "qasper", [row("a red boat", "red boat"), row("ship", "boat", 4000), row("boat", "boat", 9000)])
    write(tmp_path, "lcc", [row("tide", "diet")])
    write(tmp_path, "trec", [row("Boat", "Boat", 3999, ["Boat", "Car"]), row("Car Boat", "Car", 7999, ["Boat", "Car"])])
    (tmp_path / "notes.txt").write_text("not a prediction file")
    return tmp_path


def test_the_table_the_averages_and_the_official_result(folder, capsys):
    assert main([str(folder)]) == 0
    output = capsys.readouterr().out
    for part in (
        "code_sim ",
        "3 (official 200)",
        "English single-document QA",
        "INCOMPLETE, missing",
        "KVMerger paper's",
    ):
        assert part in output
    result = json.loads(output.splitlines()[-1])
    assert result == {"lcc": 25.0, "qasper": 66.67, "trec": 75.0}
    assert list(result) == sorted(result)
    assert not (folder / "result.json").exists()
    assert main([str(folder), "--write"]) == 0
    written = (folder / "result.json").read_text(encoding="utf-8")
    assert json.loads(written) == result
    assert written.startswith('{\n    "lcc": 25.0,\n')


def test_code_metric_by_name_and_length_buckets(folder, capsys):
    assert main([str(folder), "--code-metric", "levenshtein"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1])["lcc"] == 50.0
    assert "code_sim_levenshtein" in output
    assert main([str(folder), "--e"]) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert result["qasper"] == {"0-4k": 100.0, "4-8k": 0.0, "8k+": 100.0}
    assert result["trec"] == {"0-4k": 100.0, "4-8k": 50.0, "8k+": None}
    assert "1 / 1 / 1" in output


def test_classes_come_from_the_last_row_and_the_suffix_of_longbench_e_is_known(tmp_path, capsys):
    write(tmp_path, "trec", [row("Boat Car", "Boat", 1, ["Boat", "Car"]), row("Boat", "Boat", 1, ["Boat"])])
    write(tmp_path, "triviaqa_e", [row("boat\nship", "boat")])
    assert main([str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"trec": 100.0, "triviaqa_e": 100.0}


GOOD = json.dumps(row("a", "b"))


def but(**fields):
    """A row with some fields replaced; a field set to `...` is left out."""
    return json.dumps({key: value for key, value in {**row("a", "b"), **fields}.items() if value is not ...}) + "\n"


@pytest.mark.parametrize(
    ("name", "text", "arguments", "message"),
    [
        ("qasper.jsonl", f"{GOOD}\nnot json\n", [], "qasper.jsonl:2: malformed JSON (Expecting value"),
        ("qasper.jsonl", GOOD + "\n\udcff\n", [], "qasper.jsonl:2: byte 1 is not UTF-8"),
        ("qasper.jsonl", but(pred=...), [], "line 1 has no 'pred'"),
        ("qasper.jsonl", but(all_classes=...), [], "line 1 has no 'all_classes'"),
        ("qasper.jsonl", but(pred=None), [], "'pred' of type NoneType"),
        ("qasper.jsonl", but(answers="a"), [], "'answers' that are not"),
        ("qasper.jsonl", but(answers=[]), [], "'answers' that are not"),
        ("qasper.jsonl", but(all_classes=[1]), [], "neither null nor a list"),
        ("trec.jsonl", but(), [], "no class names"),
        ("qasper.jsonl", but(length=...), ["--e"], "has no 'length'"),
        ("qasper.jsonl", but(length="9"), ["--e"], "a 'length' of '9'"),
        ("qasper.jsonl", "", [], "qasper.jsonl is empty"),
        ("boats.jsonl", f"{GOOD}\n", [], "'boats' is no LongBench data set; known are narrativeqa"),
        ("notes.txt", "", [], "holds 0 .jsonl files"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_2(tmp_path, capsys, name, text, arguments, message):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main([str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvbench: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_missing_folder_and_unwritable_result(folder, capsys):
    assert main([str(folder / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
    (folder / "result.json").mkdir()
    assert main([str(folder), "--write"]) == 2
    assert "result.json cannot be written" in capsys.readouterr().err


def test_damaged_environment_is_refused(folder, capsys, monkeypatch):
    def refuse():
        raise MetricError("rouge/rouge.py of package rouge 1.0.1 was overwritten by rouge-chinese")

    monkeypatch.setattr(score, "check_environment", refuse)
    assert main([str(folder)]) == 2
    out, err = capsys.readouterr()
    assert (out, "rouge-chinese" in err) == ("", True)
