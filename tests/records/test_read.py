"""Record files from anyone: what is no record is passed over or refused in one line, never a traceback."""

import json

import pytest

from kvbench.errors import RecordError
from kvbench.records.read import read_calls, read_config, read_prompts, read_record_file, read_records
from kvbench.records.schema import SCHEMA_VERSION, Record

GOOD = Record(sample="s1", dataset="d", arm="full", method="full", budget=1.0).to_dict()
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        '{"schema": ' + DEEP,
        "[1]",
        "null",
        "9" * 5000,
        json.dumps({**GOOD, "sample": ["s1"]}),
        json.dumps({**GOOD, "dataset": {}}),
        json.dumps({**GOOD, "arm": 1}),
        json.dumps({**GOOD, "status": None}),
        json.dumps({name: value for name, value in GOOD.items() if name != "schema"}),
        '{"sample": "\xff"',
        "\0" * 50,
    ],
    ids=[
        "deep",
        "deep schema",
        "list",
        "null",
        "long number",
        "list as sample",
        "object as dataset",
        "number as arm",
        "null as status",
        "no schema",
        "cut",
        "zeros",
    ],
)
def test_a_line_that_is_no_record_is_passed_over(tmp_path, line):
    path = tmp_path / "full.jsonl"
    path.write_text(f"{line}\n{json.dumps(GOOD)}\n", encoding="latin-1")
    content = read_record_file(path)
    assert (content.records, content.broken_lines) == ([GOOD], [1])


@pytest.mark.parametrize("schema", [SCHEMA_VERSION + 1, "2.0", None])
def test_a_record_of_another_kind_of_schema_is_refused(tmp_path, schema):
    path = tmp_path / "full.jsonl"
    path.write_text(json.dumps({**GOOD, "schema": schema}) + "\n")
    with pytest.raises(RecordError, match="upgrade kvbench"):
        read_record_file(path)


@pytest.mark.parametrize("text", [DEEP, '{"a": ' + DEEP, "[]", "{", "\udcff"])
def test_a_configuration_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(RecordError, match=r"is .* a run folder") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_lines_beside_the_records_are_passed_over_too(tmp_path):
    (tmp_path / "records").mkdir()
    lines = [DEEP, "[1]", '{"dataset": [], "sample": "s"}', '{"started_at": 1}', '{"started_at": "soon", "arms": []}']
    for name in ("prompts.jsonl", "calls.jsonl"):
        (tmp_path / name).write_text("\n".join(lines))
    assert read_prompts(tmp_path) == {}
    assert read_calls(tmp_path) == []
    assert read_records(tmp_path) == []
