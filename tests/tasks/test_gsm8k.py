"""GSM8K: the official file read, asked and scored; what is wrong with a row is named; fetched and checked."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from hub_server import serve

from kvbench import cli
from kvbench.errors import DataError
from kvbench.metrics import get_metric
from kvbench.metrics.text import last_number
from kvbench.records.read import read_records
from kvbench.results.summary import DEFAULT_GATE, fails_gate
from kvbench.tasks import gsm8k
from kvbench.tasks.gsm8k import REQUEST, SHA256, Gsm8k

ROW = {"question": "Two and three?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"}


def write(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("place", ["test.jsonl", "gsm8k/test.jsonl"])
def test_a_row_becomes_a_sample(place: str, tmp_path: Path) -> None:
    write(tmp_path / place, ROW, ROW)
    first, second = Gsm8k(root=str(tmp_path)).samples()
    assert (first.id, second.id, first.dataset) == ("test-1", "test-2", "gsm8k")
    assert first.prompt == f"Two and three?\n\n{REQUEST}"
    assert first.answers == ("It is 2+3=5.\n#### 5",)  # without the notes for a calculator
    assert (first.max_new_tokens, first.chat, first.question_start, first.metric) == (512, True, None, "last_number")


@pytest.mark.shared
def test_the_official_file_whole_with_every_answer_its_own(shared_data: Path) -> None:
    file = shared_data / "gsm8k" / "test.jsonl"
    assert sha256(file.read_bytes()).hexdigest() == SHA256
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    samples = Gsm8k(root=str(shared_data)).samples()
    assert len(samples) == len(rows) == 1319
    metric = get_metric("last_number")
    scores = [
        metric.score(row["answer"], sample.answers, (), "gsm8k") for row, sample in zip(rows, samples, strict=True)
    ]
    assert metric.aggregate(scores) == 100
    bare = [row["answer"].rpartition("#### ")[2].replace(",", "") for row in rows]
    scores = [metric.score(f"Answer: ${n}.00.", s.answers, (), "") for n, s in zip(bare, samples, strict=True)]
    assert metric.aggregate(scores) == 100
    of_another = [metric.score(n, s.answers, (), "") for n, s in zip(bare[1:], samples, strict=False)]
    assert metric.aggregate(of_another) < 5
    assert fails_gate("last_number", metric.aggregate(of_another), DEFAULT_GATE)
    assert not any("<<" in sample.answers[0] for sample in samples)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    for row, message in (
        ({**ROW, "answer": "It is 5."}, r"test.jsonl:1: field 'answer' has no number after ####"),
        ({"question": "?"}, "field 'answer' is missing"),
        ({**ROW, "question": 3}, "must be a string"),
    ):
        write(tmp_path / "test.jsonl", row)
        with pytest.raises(DataError, match=message):
            Gsm8k(root=str(tmp_path)).samples()
    with pytest.raises(DataError, match=r"run `python -m kvbench.fetch gsm8k`"):
        Gsm8k(root=str(tmp_path / "none")).samples()


def fetch(address: str, cache: Path) -> subprocess.CompletedProcess:
    code = "from kvbench.fetch import main; from kvbench.tasks import gsm8k; import sys; gsm8k.URL = sys.argv[1]; "
    code += "sys.exit(main(['gsm8k']))"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "KVBENCH_", "XDG_"))}
    environment = {**kept, "KVBENCH_CACHE": str(cache), "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", code, address], env=environment, capture_output=True, text=True, timeout=600
    )


def test_another_file_is_refused(tmp_path: Path) -> None:
    with serve() as hub:
        hub.files["/test.jsonl"] = json.dumps(ROW).encode()
        done = fetch(f"{hub.url}/test.jsonl", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    for part in ("gsm8k is not in the cache", "this is not the pinned file", "-m kvbench.fetch gsm8k", "data.root=DIR"):
        assert part in done.stderr


@pytest.mark.shared
def test_the_official_file_is_fetched(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as hub:
        hub.files["/test.jsonl"] = (shared_data / "gsm8k" / "test.jsonl").read_bytes()
        done = fetch(address := f"{hub.url}/test.jsonl", tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("KVBENCH_DATA", raising=False)
    monkeypatch.setattr(gsm8k, "URL", address)
    assert len(Gsm8k().samples()) == 1319


def test_a_run_answers_and_scores_and_has_no_context_to_compress(tmp_path: Path, monkeypatch, capfd) -> None:
    root = write(tmp_path / "gsm8k" / "test.jsonl", ROW, ROW).removesuffix("/gsm8k/test.jsonl")
    words = ["kvbench", "model=tiny-random", "task=gsm8k", "method=h2o", f"data.root={root}", "task.max_new_tokens=5"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    assert cli.main() == 0
    said = json.loads(capfd.readouterr().out.splitlines()[-1])
    (run,) = (tmp_path / "runs").glob("gsm8k-*")
    records = read_records(run)
    assert {record["arm"] for record in records} == {"full", "h2o@0.5"}
    for record in records:
        assert (record["score"], record["status"]) == (last_number(record["prediction"], "#### 5"), "ok")
        assert record["gold_tokens"] > 0
    assert said["arms"][0]["n"] == 2
    monkeypatch.setattr(sys, "argv", [*words, "protocol.compress=before_question"])
    assert cli.main() == 2
    assert "cannot tell context from question" in capfd.readouterr().err.splitlines()[-1]
