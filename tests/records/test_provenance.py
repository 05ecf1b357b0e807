"""No answer is counted or tabled beside answers to another text, by another model, method or environment unsaid."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from kvbench import cli
from kvbench.export import main as export
from kvbench.methods.h2o import H2O
from kvbench.records import environment, provenance
from kvbench.records.provenance import file_sha256, method_sha256
from kvbench.records.read import read_calls, read_records, record_files
from kvbench.records.schema import HASHES
from kvbench.report import main as report
from kvbench.tasks import longbench

PASSKEY = ["task=passkey", "task.lengths=[200]", "task.limit=2"]
SHORT = ["protocol.max_new_tokens=3", "protocol.gold_tokens=2"]
NEWEST = """
from dataclasses import dataclass
from typing import ClassVar
from fault_policies import Newest
@dataclass(frozen=True, kw_only=True)
class Mine(Newest):
    name: ClassVar[str] = "{name}"
"""


class Line:
    """The command line, in this process and one folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
        self.folder, self.monkeypatch, self.capfd = folder, monkeypatch, capfd

    def __call__(self, *arguments: str, code: int = 0) -> tuple[dict, str]:
        """Run; returns the last line's document (empty if refused) and standard error."""
        words = ["kvbench", "model=tiny-random", *SHORT, f"output.root={self.folder / 'runs'}", *arguments]
        self.monkeypatch.setattr(sys, "argv", words)
        found = cli.main()
        out, err = self.capfd.readouterr()
        assert found == code, err
        return (json.loads(out.splitlines()[-1]) if code == 0 else {}), err

    @property
    def run(self) -> Path:
        """The one run folder."""
        (found,) = [path for path in (self.folder / "runs").iterdir() if not path.name.startswith(".")]
        return found

    def n_lines(self) -> int:
        """Answers ever recorded."""
        return sum(path.read_bytes().count(b"\n") for path in record_files(self.run))


@pytest.fixture
def kvbench(tmp_path, monkeypatch, capfd) -> Line:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return Line(tmp_path, monkeypatch, capfd)


def arms(document: dict) -> set[str]:
    return {arm["arm"] for arm in document["arms"]}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Write LongBench rows of our own into a folder; returns the arguments that read them."""
    official = tmp_path / "official"
    official.mkdir()
    pinned = {}
    for name, content in (("dataset2prompt", "{context} {input}"), ("dataset2maxlen", 8)):
        (official / f"{name}.json").write_text(json.dumps({"qasper": content}))
        pinned[f"{name}.json"] = hashlib.sha256((official / f"{name}.json").read_bytes()).hexdigest()
    monkeypatch.setattr(longbench, "OFFICIAL_SHA256", pinned)

    def write(folder: str, context: str, answer: str = "seven") -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        row = {
            "input": "How many?", "context": context * 40, "answers": [answer], "length": 9, "dataset": "qasper",
            "language": "en", "all_classes": None, "_id": "the same",
        }  # fmt: skip
        (tmp_path / folder / "qasper.jsonl").write_text(json.dumps(row) + "\n")
        return ["task=qasper", f"data.root={tmp_path / folder}", f"data.official={official}"]

    return write


def test_other_texts_under_equal_ids_are_asked_again_and_never_tabled_together(kvbench, rows):
    one, two = rows("one", "Seven geese fly. "), rows("two", "Two cats sleep. ")
    first, _ = kvbench(*one, "arms=smoke")
    n_arms = len(first["arms"])
    again, _ = kvbench(*one, "arms=smoke")
    assert again["arms"] == first["arms"]
    assert kvbench.n_lines() == n_arms
    second, said = kvbench(*two, "method=cam", "budget=0.5")
    assert "2 recorded answers are of another text" in said
    assert arms(second) == {"full", "cam@0.5"}  # not beside answers to the first text
    assert f"{n_arms - 2} answers of an earlier text, model or method are left out." in second["notes"]
    back, _ = kvbench(*one, "arms=smoke")
    assert [(a["arm"], a["kl"]) for a in back["arms"]] == [(a["arm"], a["kl"]) for a in first["arms"]]
    assert kvbench.n_lines() == 2 * n_arms + 2


@pytest.mark.parametrize("edited", [{"context": "Six geese fly. "}, {"answer": "about six"}])
def test_an_edited_row_is_asked_again(kvbench, rows, edited):
    kvbench(*rows("one", "Seven geese fly. "), "method=h2o", "budget=0.5")
    _, said = kvbench(*rows("one", **{"context": "Seven geese fly. ", **edited}), "method=h2o", "budget=0.5")
    assert "2 recorded answers are of another text" in said
    assert kvbench.n_lines() == 4


def test_other_weights_in_the_same_folder_are_another_model(kvbench, tiny_model, tmp_path):
    folder = tmp_path / "checkpoint"
    words = ["model=local", f"model.path={folder}", "model.chat_format=none", *PASSKEY]
    nll = set()
    for seed in (0, 1):
        made = tiny_model(seed=seed)
        made.model.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        nll.add(kvbench(*words, "method=h2o", "budget=0.5")[0]["arms"][-1]["gold_nll"])
    assert len(nll) == 2
    assert kvbench.n_lines() == 8


def test_a_hash_of_a_file_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    for content in (b"a", b"b"):
        file.write_bytes(content)
        for _ in range(2):
            assert file_sha256(file) == hashlib.sha256(content).hexdigest()
    assert len(list((tmp_path / "cache" / "sha256").iterdir())) == 2


def test_an_edited_method_is_another_method(kvbench, tmp_path, monkeypatch):
    words = [*PASSKEY, "method=full", "method._target_=mine.Mine", "budget=0.5"]
    file = tmp_path / "mine.py"
    for text in (NEWEST.format(name="mine"), NEWEST.format(name="mine") + "    scale: float = 2.0\n"):
        file.write_text(text)
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        kvbench(*words)
    assert kvbench.n_lines() == 6  # the full cache's answers stay


def test_what_a_method_imports_from_beside_it_is_part_of_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "pack").mkdir()
    lazy = "    def h(self):\n        from . import kernel\n"
    files = {
        "__init__": "", "helper": "def f(): return 1\n", "kernel": "BLOCK = 1\n", "other": "",
        "method": f"from pack.helper import f\nclass Method:\n    g = staticmethod(f)\n{lazy}",
    }  # fmt: skip
    found = []
    for changes in ({}, {"helper": "def f(): return 2\n"}, {"kernel": "BLOCK = 2\n"}, {"other": "X = 1\n"}):
        for name, text in {**files, **changes}.items():
            (tmp_path / "pack" / f"{name}.py").write_text(text)
        for name in [name for name in sys.modules if name.split(".")[0] == "pack"]:
            del sys.modules[name]
        from pack.method import Method

        found.append(method_sha256(Method))
    assert len(set(found[:3])) == 3
    assert found[3] == found[0]


@pytest.mark.parametrize(("edited", "counts"), [("selection", True), ("refit", False)])
def test_operations_that_a_method_uses_are_part_of_its_source(monkeypatch, edited, counts):
    before, source = method_sha256(H2O), provenance._source
    extra = {f"kvbench.ops.{edited}": "#"}
    monkeypatch.setattr(provenance, "_source", lambda name: source(name) and source(name) + extra.get(name, ""))
    assert (method_sha256(H2O) != before) == counts


def test_a_method_under_another_one_s_name_is_refused(kvbench, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(NEWEST.format(name="h2o"))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    _, said = kvbench(*PASSKEY, "method=full", "method._target_=mine.Mine", "budget=0.5", code=2)
    assert said == "kvbench: mine.Mine has the name 'h2o' of kvbench.methods.h2o.H2O: give it a `name` of its own\n"


def test_budgets_that_differ_never_share_a_name(kvbench):
    found = [arms(kvbench(*PASSKEY, "method=snapkv", f"budget={b}")[0]) for b in ("0.5", "0.5000004", "0.9999999")]
    assert found[-1] == {"full", "snapkv@0.5", "snapkv@0.5000004", "snapkv@0.9999999"}
    assert len(record_files(kvbench.run)) == 4


def test_answers_of_two_environments_are_tabled_together_only_if_told(kvbench, monkeypatch, capfd):
    words = [*PASSKEY, "method=h2o"]
    kvbench(*words, "budget=0.5")
    monkeypatch.setattr(environment, "__version__", "9.9.9")
    n_before = kvbench.n_lines()
    _, said = kvbench(*words, "budget=0.2", code=2)
    assert said.count("\n") == 1
    for part in ("9.9.9", environment.version("kvbench"), "output.root=DIR", "mix_environments=true"):
        assert part in said
    assert kvbench.n_lines() == n_before  # refused before anything was computed
    document, _ = kvbench(*words, "budget=0.2", "mix_environments=true")
    assert arms(document) == {"full", "h2o@0.5", "h2o@0.2"}
    assert "several environments" in document["notes"][0]
    for command in (report, lambda words: export(["model-index", *words])):
        assert command([str(kvbench.run)]) == 2
        assert "kvbench 9.9.9" in capfd.readouterr().err
        assert command([str(kvbench.run), "--mix-environments"]) == 0
    assert "several environments" in (kvbench.run / "report.html").read_text()
    calls = read_calls(kvbench.run)
    assert [call["environment"]["kvbench"] for call in calls] == [environment.version("kvbench"), "9.9.9"]
    assert {record["call"] for record in read_records(kvbench.run)} == {call["id"] for call in calls}


def test_a_dtype_resolved_otherwise_is_another_model(kvbench, monkeypatch):
    words = [*PASSKEY, "method=h2o", "budget=0.5"]
    kvbench(*words)
    monkeypatch.setattr("kvbench.models.load.resolve_dtype", lambda dtype, device: torch.bfloat16)
    kvbench(*words)
    assert kvbench.n_lines() == 8
    assert [call["environment"]["dtype"] for call in read_calls(kvbench.run)] == ["float32", "bfloat16"]


def test_records_from_before_are_read_as_unverified_and_reused_only_if_told(kvbench):
    words = [*PASSKEY, "method=h2o", "budget=0.5"]
    before, _ = kvbench(*words)
    new = ("call", *HASHES)
    for file in record_files(kvbench.run):
        old = [{k: v for k, v in json.loads(line).items() if k not in new} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(record) + "\n" for record in old))
    (kvbench.run / "calls.jsonl").unlink()
    told, _ = kvbench(*words, "mix_environments=true")
    assert told["arms"] == before["arms"]
    assert told["notes"] == ["4 of 4 answers are unverified: from before records said what made them."]
    _, said = kvbench(*PASSKEY, "method=cam", "budget=0.5", code=2)
    assert "2 answers: from before records said what made them" in said
    assert report([str(kvbench.run)]) == 0
    assert "are unverified" in (kvbench.run / "report.html").read_text()
    _, said = kvbench(*words)
    assert "4 recorded answers are of another text" in said
    assert kvbench.n_lines() == 8


@pytest.mark.parametrize("setting", ["model.device=cuda:77", "engine.kernels=fast", "engine.kernels=triton"])
def test_settings_are_checked_when_nothing_is_left_to_do(kvbench, monkeypatch, setting):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = [*PASSKEY, "method=h2o", "budget=0.5"]
    kvbench(*words)
    _, said = kvbench(*words, setting, code=2)
    assert said.startswith("kvbench: ")
    assert said.count("\n") == 1
