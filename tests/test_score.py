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


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_last_line_is_the_official_result(folder, capsys):
    assert main([str(folder)]) == 0
    result = last_line(capsys)
    assert result == {"lcc": 25.0, "qasper": 66.67, "trec": 75.0}
    assert list(result) == sorted(result)
    assert not (folder / "result.json").exists()


def test_table_says_metric_rows_and_averages(folder, capsys):
    main([str(folder)])
    table = capsys.readouterr().out
    assert "code_sim " in table
    assert "3 (official 200)" in table
    assert "English single-document QA" in table
    assert "INCOMPLETE, missing" in table
    assert "KVMerger paper's nine" in table


def test_code_metric_by_name(folder, capsys):
    assert main([str(folder), "--code-metric", "levenshtein"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1])["lcc"] == 50.0
    assert "code_sim_levenshtein" in output


def test_write_only_when_asked(folder, capsys):
    assert main([str(folder), "--write"]) == 0
    written = (folder / "result.json").read_text(encoding="utf-8")
    assert json.loads(written) == last_line(capsys)
    assert written.startswith('{\n    "lcc": 25.0,\n')


def test_length_buckets(folder, capsys):
    assert main([str(folder), "--e"]) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert result["qasper"] == {"0-4k": 100.0, "4-8k": 0.0, "8k+": 100.0}
    assert result["trec"]["0-4k"] == 100.0
    assert result["trec"]["4-8k"] == 50.0
    assert result["trec"]["8k+"] is None
    assert '"8k+": null' in output
    assert "1 / 1 / 1" in output


def test_classes_come_from_the_last_row(tmp_path, capsys):
    write(tmp_path, "trec", [row("Boat Car", "Boat", 1, ["Boat", "Car"]), row("Boat", "Boat", 1, ["Boat"])])
    main([str(tmp_path)])
    assert last_line(capsys)["trec"] == 100.0


def test_suffix_of_longbench_e_is_known(tmp_path, capsys):
    write(tmp_path, "triviaqa_e", [row("boat\nship", "boat")])
    assert main([str(tmp_path)]) == 0
    assert last_line(capsys) == {"triviaqa_e": 100.0}


GOOD = json.dumps(row("a", "b"))


@pytest.mark.parametrize(
    ("name", "text", "arguments", "message"),
    [
        ("qasper.jsonl", f"{GOOD}\nnot json\n", [], "qasper.jsonl:2: malformed JSON (Expecting value"),
        ("qasper.jsonl", f"{GOOD}\n\n", [], "qasper.jsonl:2: the line is empty"),
        ("qasper.jsonl", '{"pred": ' + "[" * 100_000 + "\n", [], "qasper.jsonl:1: JSON is nested too deeply"),
        ("qasper.jsonl", "[1]\n", [], "qasper.jsonl:1: a row must be a JSON object"),
        ("qasper.jsonl", '{"answers": ["a"], "all_classes": null}\n', [], "line 1 has no 'pred'"),
        ("qasper.jsonl", '{"pred": "a", "answers": ["a"]}\n', [], "line 1 has no 'all_classes'"),
        ("qasper.jsonl", '{"pred": null, "answers": ["a"], "all_classes": null}\n', [], "'pred' of type NoneType"),
        ("qasper.jsonl", '{"pred": "a", "answers": "a", "all_classes": null}\n', [], "'answers' that are not"),
        ("qasper.jsonl", '{"pred": "a", "answers": [], "all_classes": null}\n', [], "'answers' that are not"),
        ("qasper.jsonl", '{"pred": "a", "answers": ["a"], "all_classes": [1]}\n', [], "neither null nor a list"),
        ("trec.jsonl", '{"pred": "a", "answers": ["a"], "all_classes": null}\n', [], "no class names"),
        ("qasper.jsonl", '{"pred": "a", "answers": ["a"], "all_classes": null}\n', ["--e"], "has no 'length'"),
        (
            "qasper.jsonl",
            '{"pred": "a", "answers": ["a"], "all_classes": null, "length": "9"}\n',
            ["--e"],
            "a 'length' of '9'",
        ),
        ("qasper.jsonl", "", [], "qasper.jsonl is empty"),
        ("boats.jsonl", f"{GOOD}\n", [], "'boats' is no LongBench data set; known are narrativeqa"),
        ("notes.txt", "", [], "holds 0 .jsonl files"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_2(tmp_path, capsys, name, text, arguments, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert main([str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvbench: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_not_utf8(tmp_path, capsys):
    (tmp_path / "qasper.jsonl").write_bytes(GOOD.encode() + b"\n\xff\n")
    assert main([str(tmp_path)]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_missing_folder(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


def test_unwritable_result(folder, capsys):
    (folder / "result.json").mkdir()
    assert main([str(folder), "--write"]) == 2
    assert "result.json cannot be written" in capsys.readouterr().err


def test_damaged_environment_is_refused(folder, capsys, monkeypatch):
    def refuse():
        raise MetricError("rouge/rouge.py of package rouge 1.0.1 was overwritten by rouge-chinese")

    monkeypatch.setattr(score, "check_environment", refuse)
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rouge-chinese" in captured.err
