"""Record files from anyone: what is no record is passed over or refused in one line, never a traceback."""

import json
import math

import pytest

from kvbench.errors import RecordError
from kvbench.records.read import (
    read_calls,
    read_config,
    read_environments,
    read_prompts,
    read_record_file,
    read_records,
)
from kvbench.records.schema import SCHEMA_VERSION, Record

GOOD = Record(sample="s1", dataset="d", arm="full", method="full", budget=1.0).to_dict()
DEEP = "[" * 100_000


def without(*names):
    return {name: value for name, value in GOOD.items() if name not in names}


NO_RECORDS = {
    "deep": DEEP,
    "deep schema": '{"schema": ' + DEEP,
    "list": "[1]",
    "null": "null",
    "long number": "9" * 5000,
    "list as sample": json.dumps({**GOOD, "sample": ["s1"]}),
    "object as dataset": json.dumps({**GOOD, "dataset": {}}),
    "number as arm": json.dumps({**GOOD, "arm": 1}),
    "null as status": json.dumps({**GOOD, "status": None}),
    "no schema": json.dumps(without("schema")),
    "no method": json.dumps(without("method")),
    "Infinity": json.dumps({**GOOD, "gold_nll": float("inf")}),
    "too large a number": json.dumps(GOOD).replace('"seconds": 0.0', '"seconds": 1e999'),
    "null in a list of numbers": json.dumps({**GOOD, "kl_per_token": [None]}),
    "text as part": json.dumps({**GOOD, "parts": {"score": "1"}}),
    "number as list": json.dumps({**GOOD, "slots_per_layer": 7}),
    "true as number": json.dumps({**GOOD, "full_slots": True}),
    "cut": '{"sample": "\xff"',
    "zeros": "\0" * 50,
}


@pytest.mark.parametrize("line", NO_RECORDS.values(), ids=NO_RECORDS)
def test_a_line_that_is_no_record_is_passed_over(tmp_path, line):
    path = tmp_path / "full.jsonl"
    path.write_text(f"{line}\n{json.dumps(GOOD)}\n", encoding="latin-1")
    assert read_record_file(path) == [GOOD]


def test_older_records_that_name_a_method_s_kernels_belong_to_the_arm_without(tmp_path):
    options = {"backend": "torch", "recent_share": 0.25}
    old = {**GOOD, "method": "h2o", "arm": "h2o@0.5,backend=torch,recent_share=0.25", "options": options}
    theirs = {**old, "method": "plugged_in", "sample": "s2"}  # a plug-in's own option of that name stays
    path = tmp_path / "h2o.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (old, theirs)))
    first, second = read_record_file(path)
    assert (first["arm"], first["options"]) == ("h2o@0.5,recent_share=0.25", {"recent_share": 0.25})
    assert second == theirs


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
    call = {"started_at": 1, "arms": [], "task_samples": 2, "missing_answers": 3}
    wrong = [{"started_at": math.inf}, {"task_samples": math.nan}, {"arms": [1]}, {"arms": [[]]}, {"shard": 2}]
    lines = [DEEP, *(json.dumps({**call, **field}) for field in wrong), "[1]", '{"dataset": [], "sample": "s"}']
    lines += ['{"started_at": 1}', '{"started_at": "soon", "arms": []}']
    for name in ("prompts.jsonl", "calls.jsonl"):
        (tmp_path / name).write_text("\n".join(lines))
    assert read_prompts(tmp_path) == {}
    assert read_calls(tmp_path) == []
    assert read_records(tmp_path) == []


def test_a_field_that_an_older_version_did_not_write_is_filled_in(tmp_path):
    path = tmp_path / "full.jsonl"
    path.write_text(json.dumps(without("gold_nll", "call")))
    assert read_record_file(path) == [GOOD]


@pytest.mark.parametrize("text", ["[]", "{", "[1, 2]"])
def test_an_environment_that_is_none_is_passed_over(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    assert read_environments(tmp_path) == []
    (tmp_path / "environment.json").write_text('{"kvbench": "0.1.0"}')
    assert read_environments(tmp_path) == [{"kvbench": "0.1.0"}]
