"""No bare NaN or Infinity wherever the project writes JSON."""

import json
import re
from pathlib import Path

import pytest

import kvbench
from kvbench import score
from kvbench.commands import strict_json

PACKAGE = Path(kvbench.__file__).parent


def strictly(text: str):
    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null():
    value = {"a": [float("nan"), (float("inf"), 1.5)], "b": -float("inf"), "c": "NaN", "d": None}
    expected = {"a": [None, [None, 1.5]], "b": None, "c": "NaN", "d": None}
    assert strictly(strict_json(value, ensure_ascii=False)) == expected


def test_an_empty_length_bucket_is_null_in_the_result(tmp_path, capsys):
    row = {"pred": "yes", "answers": ["yes"], "all_classes": None, "length": 100}
    (tmp_path / "qasper_e.jsonl").write_text(json.dumps(row) + "\n")
    assert score.main([str(tmp_path), "--e", "--write"]) == 0
    expected = {"qasper_e": {"0-4k": 100.0, "4-8k": None, "8k+": None}}
    assert strictly(capsys.readouterr().out.splitlines()[-1]) == expected
    assert strictly((tmp_path / "result.json").read_text()) == expected


LENIENT = {
    "paths.py": (1, "strings and sizes"),
    "fetch.py": (1, "names and folders"),
    "models/fetch.py": (1, "names and folders"),
    "results/page.py": (2, "texts, and names of arms"),
    "testing.py": (1, "read back by Python itself"),
    "records/environment.py": (1, "a key to count by"),
    "records/provenance.py": (1, "hashed"),
    "records/folder.py": (2, "an identity's hash, a prompt's text"),
    "commands.py": (1, "escapes of characters"),
    "tasks/ruler.py": (1, "a tokenizer's settings, hashed"),
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_whoever_writes_numbers_writes_them_strictly(path):
    """A plain `json.dumps` stands only where no float can be, or where it refuses them itself."""
    name = path.relative_to(PACKAGE).as_posix()
    calls = re.findall(r"(?<!strict_)json\.dumps?\((.*)", path.read_text(encoding="utf-8"))
    lenient = [call for call in calls if "allow_nan=False" not in call]
    assert len(lenient) <= LENIENT.get(name, (0, ""))[0], f"{name}: use kvbench.commands.strict_json"
