"""ZeroSCROLLS, from zips and folders in the format of the hub's files; no real rows are at hand."""

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import ConfigError, DataError
from kvbench.metrics.zeroscrolls import TASKS
from kvbench.tasks.zeroscrolls import ZeroScrolls


def row(number: int, output: str | None = "gold", **fields: Any) -> dict[str, Any]:
    head, document, query = "You get a story.\n\nStory:\n", f"Once upon time {number}. ", "\n\nQuestion:\nWhen?\n\n"
    valid = {
        "id": f"q{number}", "pid": f"q{number}_0", "input": head + document + query + "Answer:\n", "output": output,
        "document_start_index": len(head), "document_end_index": len(head + document),
        "query_start_index": len(head + document) + 2, "query_end_index": len(head + document + query),
        "truncation_seperator": "... [cut] ...",
    }  # fmt: skip
    return {name: value for name, value in {**valid, **fields}.items() if value is not ...}


def lines(*rows: Any) -> str:
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows)


def write_zip(root: Path, task: str, **splits: str) -> None:
    with zipfile.ZipFile(root / f"{task}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, content in splits.items():
            archive.writestr(f"{task}/{split}.jsonl", content)


def task(root: Path, name: str = "quality", /, **fields: Any) -> ZeroScrolls:
    known = {"name": f"zeroscrolls_{name}", "task": name, **TASKS[name]._asdict(), "root": str(root)}
    del known["rows"]
    return ZeroScrolls(**{**known, **fields})


@pytest.mark.parametrize("packed", [True, False])
def test_rows_become_samples_from_a_zip_or_a_folder(tmp_path: Path, packed: bool) -> None:
    content = lines(row(2, "B"), row(1, "A"))
    if packed:
        write_zip(tmp_path, "quality", validation=content, test=lines(row(3, None)))
    else:
        (tmp_path / "quality").mkdir()
        (tmp_path / "quality" / "validation.jsonl").write_text(content)
    assert (len(TASKS), sum(one.rows for one in TASKS.values())) == (10, 4378)
    first, second = task(tmp_path).samples()
    assert [(s.id, s.answers) for s in (first, second)] == [("q2", ("B",)), ("q1", ("A",))]
    assert (first.prompt, first.dataset) == (row(2)["input"], "zeroscrolls_quality")
    assert first.prompt[first.question_start :] == "Question:\nWhen?\n\nAnswer:\n"
    assert (first.truncation, first.max_new_tokens) == ("document_end", 10)
    assert first.meta["query_start"] == first.question_start
    assert first.meta["truncation_separator"] == "... [cut] ..."


def test_references_of_one_question_are_merged_in_first_seen_order(tmp_path: Path) -> None:
    content = lines(row(5, "c"), row(1, "a"), row(5, "b"), row(5, "c"), row(1, "z"))
    write_zip(tmp_path, "squality", validation=content)
    samples = task(tmp_path, "squality").samples()
    assert [(s.id, s.answers) for s in samples] == [("q5", ("c", "b", "c")), ("q1", ("a", "z"))]


def test_rows_without_output_are_exported_but_never_scored(tmp_path: Path) -> None:
    write_zip(tmp_path, "quality", validation=lines(row(1, "A")), test=lines(row(2, None), row(3, "C"), row(4, None)))
    with pytest.raises(DataError, match=r"quality/test\.jsonl: 2 of 3 rows have no output .* task.export_only=true"):
        task(tmp_path, split="test").samples()
    samples = task(tmp_path, split="test", export_only=True).samples()
    assert [sample.answers for sample in samples] == [(), ("C",), ()]


def test_identical_splits_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_zip(tmp_path, "qasper", validation=lines(row(1)), test=lines(row(1)))
    with caplog.at_level(logging.WARNING):
        assert len(task(tmp_path, "qasper").samples()) == 1
    assert "validation and test are the same file" in caplog.text
    with pytest.raises(DataError, match="the same file, a known defect"):
        task(tmp_path, "qasper", split="test").samples()


def test_another_input_under_a_known_id_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_zip(tmp_path, "quality", validation=lines(row(1), row(2, id="q1")))
    with caplog.at_level(logging.WARNING):
        (sample,) = task(tmp_path).samples()
    assert sample.prompt == row(1)["input"]
    assert "id q1 again with another input" in caplog.text


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (row(2, output=...), "field 'output' is missing"),
        (row(2, output=7), "'output' must be a string"),
        (row(2, truncation_seperator=...), "'truncation_seperator' is missing"),
        (row(2, query_end_index=10_000), "must lie within the 70 characters"),
        (row(2, query_start_index=3), "the query after the document"),
        (row(2, query_start_index="3"), "non-negative integer"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: Any, problem: str) -> None:
    write_zip(tmp_path, "quality", validation=lines(row(1), bad))
    with pytest.raises(DataError, match=problem) as error:
        task(tmp_path).samples()
    assert f"{tmp_path}/quality.zip/quality/validation.jsonl:2" in str(error.value)


def test_what_cannot_be_found_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"quality/validation\.jsonl nor .*quality\.zip exists"):
        task(tmp_path).samples()
    write_zip(tmp_path, "quality", test=lines(row(1)))
    with pytest.raises(DataError, match=r"has no quality/validation\.jsonl or validation\.jsonl"):
        task(tmp_path).samples()
    (tmp_path / "quality.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="damaged"):
        task(tmp_path).samples()
    for field, value in (("split", "train"), ("task", "nq")):
        with pytest.raises(ConfigError, match=value):
            task(tmp_path, **{field: value}).samples()
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere/quality"):
        task(tmp_path, root=None).samples()
