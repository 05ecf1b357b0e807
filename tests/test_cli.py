"""The command line as a user meets it: the last line, the exit codes, one line per error, resuming."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from kvbench.cli import main
from kvbench.plan import defer_task_settings

SMOKE = [
    "model=tiny-random", "arms=smoke", "task=passkey", "task.limit=2", "task.lengths=[300]", "engine=fused",
    "protocol.max_new_tokens=6", "protocol.gold_tokens=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder with a run that was really started, and its last line."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "kvbench", *SMOKE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def kvbench(monkeypatch, capfd):
    """The same in this process, since importing torch takes seconds: exit code, output, errors."""

    def call(folder, *arguments):
        monkeypatch.chdir(folder)
        flags = [word for word in arguments if word == "-m"]  # argparse wants them before the overrides
        monkeypatch.setattr(sys, "argv", ["kvbench", *flags, *(word for word in arguments if word != "-m")])
        capfd.readouterr()
        try:
            code = main()
        except SystemExit as end:  # --help
            code = end.code or 0
        return code, *capfd.readouterr()

    return call


def document(outcome):
    code, out, err = outcome
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def test_last_line_is_the_promised_json(smoke):
    folder, found = smoke
    assert set(found) == {"run", "model", "task", "n_samples", "wall_s", "arms"}
    assert (found["model"], found["task"], found["n_samples"]) == ("tiny-random", "passkey", 2)
    assert [arm["arm"] for arm in found["arms"]][:2] == ["full", "cam@0.5"]
    assert len(found["arms"]) == 9
    for arm in found["arms"]:
        assert {"method", "budget", "score", "gold_nll", "kl", "cache_bytes"} <= set(arm)
        assert arm["n"] == 2
        assert arm["budget"] - 1 / 250 <= arm["budget_measured"] <= arm["budget"]
    assert (folder / found["run"] / "config.json").is_file()


def test_in_a_terminal_json_comes_only_when_asked_for(smoke, kvbench, monkeypatch):
    out = kvbench(smoke[0], *SMOKE)[1]
    assert "No arm's score is separated" in out or "by more than chance" in out or "No verdict" in out
    assert "python -m kvbench.report " in out
    monkeypatch.setattr("kvbench.commands._Output.isatty", lambda self: True, raising=False)
    assert not kvbench(smoke[0], *SMOKE)[1].splitlines()[-1].startswith("{")
    assert document(kvbench(smoke[0], *SMOKE, "--json"))["run"] == smoke[1]["run"]


def test_a_second_call_computes_nothing_and_says_the_same(smoke, kvbench):
    again = kvbench(smoke[0], *SMOKE)
    assert {**document(again), "wall_s": 0} == {**smoke[1], "wall_s": 0}
    assert "loading" not in again[2]


def test_a_named_method_adds_one_arm_to_the_run(smoke, kvbench, tmp_path):
    found = document(kvbench(shutil.copytree(smoke[0], tmp_path / "copy"), *SMOKE, "method=h2o", "budget=0.2"))
    assert found["run"] == smoke[1]["run"]
    assert "h2o@0.2" in [arm["arm"] for arm in found["arms"]]


def test_a_sweep_runs_every_combination(kvbench, tmp_path):
    found = document(kvbench(tmp_path, "-m", *SMOKE, "method=h2o,cam", "budget=0.5,0.35"))
    assert [arm["arm"] for arm in found["arms"]] == ["cam@0.5", "cam@0.35", "h2o@0.5", "h2o@0.35"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # no outputs/, no multirun/


def test_a_method_that_repeats_the_context_runs_before_the_question_and_records_its_cost(kvbench, tmp_path):
    arms = ["method=kvzip", "budget=0.4", "protocol.compress=before_question", "task.limit=1"]
    (arm,) = document(kvbench(tmp_path, *SMOKE, *arms))["arms"]
    assert (arm["arm"], arm["n"], arm["n_failed"]) == ("kvzip@0.4", 1, 0)
    (path,) = tmp_path.glob("**/kvzip@0.4.jsonl")
    record = json.loads(path.read_text())
    assert record["seconds"] > record["engine"]["second_pass_seconds"] > 0
    assert record["engine"]["second_pass_tokens"] > 2 * record["compressed_tokens"] - 4
    assert record["budget_measured"] == pytest.approx(0.4, abs=0.005)
    assert len(set(record["slots_per_layer"])) > 1


def test_help_and_cfg_need_no_model(kvbench, tmp_path):
    code, out, _ = kvbench(tmp_path, "--help")
    assert code == 0
    for name in ("cam", "full", "h2o", "kvmerger", "kvmerger_bias"):
        assert re.search(rf"^ *method: .*\b{name}\b", out, re.MULTILINE), name
    code, out, _ = kvbench(tmp_path, "--cfg", "job")
    assert code == 0
    assert "smollm2-135m" in out
    assert list(tmp_path.iterdir()) == []


def error_line(outcome):
    code, _, err = outcome
    assert code == 2
    assert "Traceback" not in err
    (line,) = (line for line in err.splitlines() if line.startswith("kvbench: "))
    return line


INTEGER_OR_NULL = "an integer of at least 1 or null"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method=nope"], ["nope", "h2o", "kvmerger"]), (["task=nope"], ["nope", "passkey"]),
        (["model=nope"], ["nope", "tiny-random"]), (["protocol.sede=1"], ["sede"]), (["model.pth=3"], ["pth"]),
        (["method=h2o", "method.backend=torch"], ["backend is no option", "set engine.kernels"]),
        (["method=h2o", "+method.backend=torch"], ["backend=torch is no option", "set engine.kernels"]),
        (["method=kvmerger", "method.treshold=0.8"], ["treshold"]),
        (["budget=0", "method=h2o"], ["budget=0", "(0, 1]"]), (["budget=1.5", "method=h2o"], ["1.5", "(0, 1]"]),
        (["budget=half", "method=h2o"], ["half"]), (["method=h2o", "budget=0.002"], ["0.002", "slots", "at least"]),
        (["method=kvmerger", "budget=0.5"], ["0.5", "whole"]),
        (["method=kvzip"], ["kvzip@0.5", "after_question", "set protocol.compress=before_question"]),
        (["protocol.compress=never"], ["never", "after_question"]), (["task.lengths=[9000]"], ["16384"]),
        (["output.root=/proc/none"], ["/proc/none", "output.root"]),
        (["task.limit=0"], ["task.limit=0", INTEGER_OR_NULL]),
        (["task.limit=abc"], ["task.limit='abc'", INTEGER_OR_NULL]),
        (["task.lengths=abc"], ["task.lengths='abc'", "a list", "128", "lengths=[1024]"]),
        (["task.digits=100000"], ["task.digits=100000", "from 2 to 100", "digits=6"]),
        (["task.name=7"], ["task.name=7", "printable text"]),
        (["engine.max_rows=abc"], ["engine.max_rows='abc'", "integer"]),
        (["engine.max_rows=1000000000"], ["1000000000", "from 1 to 65536"]),
        (["engine.memory_ratio=0"], ["engine.memory_ratio=0", "above 0"]),
        (["engine.kernels=abc"], ["engine.kernels='abc'", "auto, torch, triton"]),
        (["method=h2o", "method.budget=true"], ["budget=True", "(0, 1]"]),
        (["protocol.gold_tokens=-1"], ["protocol.gold_tokens=-1", "at least 0"]),
        (["protocol.max_new_tokens=0"], ["protocol.max_new_tokens=0", "at least 1 or null"]),
        (["method=null"], ["method=null", "leave it out", "kvmerger"]), (["arms=null"], ["arms=null", "paper"]),
        (["model=5"], ["model=5", "tiny-random"]), (["~model"], ["model"]),
        (["model.device=meta"], ["model.device='meta'", "cuda:N"]),
        (["model.hidden_size=-1"], ["model.hidden_size=-1", "from 1 to 131072", "hidden_size=64"]),
        (["model.hidden_size=66"], ["model.hidden_size=66", "model.n_query_heads=4", "divisor"]),
        (["model.head_dim=0"], ["model.head_dim=0", "from 2 to 1024"]),
        (["model.n_layers=256", "model.hidden_size=131072"], ["the weights of model tiny-random", "model.n_layers"]),
        (["-m", "task=glob(nope*)"], ["task=glob(nope*)", "matches nothing"]),
        (["-m", "shard=range(9999999)"], ["shard=range(9999999)", "from 1 to 1000"]),
        (["-m", "shard=range(1,9999999)"], ["shard=range(1,9999999)", "from 1 to 1000"]),
        (["-m", "protocol.seed=range(9999999)"], ["protocol.seed=range(9999999)", "10,000"]),
        (["-m", "protocol.seed=range(200)", "task.seed=range(200)"], ["40,000 jobs", "10,000"]),
        (["model.path=/nowhere"], ["/nowhere"]),
        (["model.name=\udcff"], ["argument ", r"\udcff", "UTF-8"]),  # what Python makes of a byte that is no text
        (["model.name='\udcff'"], ["argument ", r"\udcff", "UTF-8"]), (["shard=9/8"], ["9/8", "1 to 8", "shard=2/8"]),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line(tmp_path, kvbench, arguments, words):
    line = error_line(kvbench(tmp_path, *SMOKE, *arguments))
    assert [word for word in words if word not in line] == []


def test_a_task_s_settings_wait_for_the_tasks_of_a_sweep():
    given = ["task.length=8192", "task.seed=1,2", "task.lengths=[1,2]", "task.limit=range(3)", "model.seed=1"]
    deferred = ["task.length=choice(8192)", "task.seed=choice(1,2)", "task.lengths=choice([1,2])", *given[3:]]
    for tasks in ("task=glob(ruler/*)", "task=a,b"):
        assert defer_task_settings(["-m", tasks, *given]) == ["-m", tasks, *deferred]
    for alone in (["task=ruler/vt", "task.length=8192"], ["task.limit=2"]):
        assert defer_task_settings(alone) == alone
