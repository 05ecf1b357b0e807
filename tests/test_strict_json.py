"""No bare NaN or Infinity wherever the project writes JSON."""

import json
import re
from pathlib import Path

import pytest

import kvbench
from kvbench import score, strict_json


def strictly(text: str):
    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null():
    value = {"a": [float("nan"), (float("inf"), 1.5)], "b": -float("inf"), "c": "NaN", "d": None}
    assert strictly(strict_json.dumps(value, ensure_ascii=False)) == {"a": [None, [None, 1.5]], "b": None, "c": "NaN",
                                                                      "d": None}  # fmt: skip


def test_an_empty_length_bucket_is_null_in_the_result(tmp_path, capsys):
    row = {"pred": "yes", "answers": ["yes"], "all_classes": None, "length": 100}
    (tmp_path / "qasper_e.jsonl").write_text(json.dumps(row) + "\n")
    assert score.main([str(tmp_path), "--e", "--write"]) == 0
    expected = {"qasper_e": {"0-4k": 100.0, "4-8k": None, "8k+": None}}
    assert strictly(capsys.readouterr().out.splitlines()[-1]) == expected
    assert strictly((tmp_path / "result.json").read_text()) == expected


LENIENT = {
    "paths.py": "strings and sizes",
    "fetch.py": "names and folders",
    "models/fetch.py": "names and folders",
    "report/checksums.py": "hashes and texts",
    "report/browser.py": "names of arms",
    "check/class_rules.py": "read back by Python itself",
    "records/environment.py": "a key to count by",
    "provenance.py": "hashed",
    "commands.py": "escapes of characters",
}


@pytest.mark.parametrize("path", sorted(Path(kvbench.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_whoever_writes_numbers_writes_them_strictly(path):
    """A plain `json.dumps` stands only where no float can be, or where it refuses them itself."""
    name = path.relative_to(Path(kvbench.__file__).parent).as_posix()
    calls = re.findall(r"(?<!strict_)json\.dumps?\((.*)", path.read_text(encoding="utf-8"))
    lenient = [call for call in calls if "allow_nan=False" not in call]
    allowed = {"records/folder.py": 2}.get(name, 9 if name in LENIENT else 0)  # an identity's hash, a prompt's text
    assert len(lenient) <= allowed, f"{name}: use kvbench.strict_json"
