"""The command line as a user meets it: the last line, the exit codes, one line per error, resuming."""

import json
import shutil
import subprocess
import sys

import pytest

from kvbench.cli import main
from kvbench.config import check_arguments, defer_task_settings

SMOKE = [
    "model=tiny-random", "model.n_layers=4", "arms=smoke", "task=passkey", "task.limit=2", "task.lengths=[300]",
    "engine=fused", "protocol.max_new_tokens=6", "protocol.gold_tokens=4",
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
    assert set(found) == {"run", "model", "task", "n_samples", "answers", "wall_s", "arms"}
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
    reused = {"new": 0, "reused": 18}
    assert {**document(again), "wall_s": 0} == {**smoke[1], "wall_s": 0, "answers": reused}
    assert "0 new, 18 reused answers" in again[1]
    assert "loading" not in again[2]


def test_a_named_method_adds_one_arm_to_the_run(smoke, kvbench, tmp_path):
    found = document(kvbench(shutil.copytree(smoke[0], tmp_path / "copy"), *SMOKE, "method=h2o", "budget=0.2"))
    assert found["run"] == smoke[1]["run"]
    assert "h2o@0.2" in [arm["arm"] for arm in found["arms"]]


def test_a_sweep_runs_every_combination(kvbench, tmp_path):
    found = document(kvbench(tmp_path, "-m", *SMOKE, "method=h2o,cam", "budget=0.5,0.35"))
    assert [arm["arm"] for arm in found["arms"]] == ["full", "cam@0.5", "cam@0.35", "h2o@0.5", "h2o@0.35"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "runs.csv"]  # no outputs/, no multirun/


def test_a_method_that_repeats_the_context_runs_before_the_question_and_records_its_cost(kvbench, tmp_path):
    arms = ["method=kvzip", "budget=0.4", "protocol.compress=before_question", "task.limit=1"]
    _, arm = document(kvbench(tmp_path, *SMOKE, *arms))["arms"]
    assert (arm["arm"], arm["n"], arm["n_failed"]) == ("kvzip@0.4", 1, 0)
    (path,) = tmp_path.glob("**/kvzip@0.4.jsonl")
    record = json.loads(path.read_text())
    assert record["seconds"] > record["engine"]["second_pass_seconds"] > 0
    assert record["engine"]["second_pass_tokens"] > 2 * record["compressed_tokens"] - 4
    assert record["budget_measured"] == pytest.approx(0.4, abs=0.005)
    assert len(set(record["slots_per_layer"])) > 1


def test_help_is_a_screenful_and_cfg_needs_no_model(kvbench, tmp_path):
    code, out, _ = kvbench(tmp_path, "--help")
    assert code == 0
    assert out.count("\n") <= 24
    assert max(map(len, out.splitlines())) <= 120
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
        (["method=nope"], ["method=nope is unknown", "`kvbench ls methods` lists all"]),
        (["task=passky"], ["task=passky is unknown: did you mean passkey?", "`kvbench ls tasks` lists all"]),
        (["task=nope"], ["task=nope", "`kvbench ls tasks`"]), (["engine=plane"], ["did you mean plain?"]),
        (["model=nope"], ["model=nope", "no folder", "ORGANISATION/MODEL"]), (["arms=papr"], ["did you mean paper?"]),
        (["model=tiny-randm"], ["did you mean tiny-random?"]), (["experiment=needel"], ["did you mean needle?"]),
        (["protocol.sede=1"], ["protocol.sede is no setting: did you mean protocol.seed?"]),
        (["model.pth=3"], ["did you mean model.path?"]), (["metod=h2o"], ["metod", "did you mean method?"]),
        (["limit=3"], ["limit is no setting: did you mean task.limit?"]),
        (["arms.h2o_50.recent_shre=1"], ["did you mean arms.h2o_50.recent_share?"]),
        (["method.sigma=3"], ["method.sigma is an option of no method", "method=NAME"]),
        (["method=h2o,cam"], ["method=h2o,cam", "'methods=[h2o,cam]'", "-m"]),
        (["budget=0.5,0.35"], ["budget=0.5,0.35", "'budgets=[0.5,0.35]'"]),
        (["methods=h2o,cam"], ["'methods=[h2o,cam]'"]), (["task=mini,niah"], ["task=mini,niah", "add -m"]),
        (["methods=[h2o,kvmergr]"], ["kvmergr", "did you mean kvmerger?"]),
        (["methods=[]"], ["methods=[] names no method"]), (["methods=[3]"], ["methods has the entry 3"]),
        (["methods=[{h2o:{recent:3}}]"], ["recent for method h2o: did you mean recent_share?"]),
        (["method=h2o", "methods=[cam]"], ["method and methods are both given"]),
        (["methods=[h2o]", "budget=0.5", "budgets=[0.5]"], ["budget and budgets are both given"]),
        (["method=no.such:Class"], ["no.such:Class", "no module no.such", "file.py:Class"]),
        (["method=json:JSONDecoder"], ["json:JSONDecoder is not a subclass of kvbench.methods.base.Policy"]),
        (["method=gone.py:Class"], ["there is no file gone.py"]), (["--bogus"], ["--bogus", "kvbench run --help"]),
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
        (["method=null"], ["method=null", "leave it out", "ls methods"]), (["arms=null"], ["arms=null", "ls arms"]),
        (["model=5"], ["model=5", "ls models"]), (["~model"], ["model"]),
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
        (["model.path=/nowhere"], ["/nowhere"]), (["model=/nowhere"], ["model=/nowhere is unknown", "no folder"]),
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
    assert check_arguments(["task=glob(ruler/*)", "task.length=8192"], True).task.length == 8192
    for alone in (["task=ruler/vt", "task.length=8192"], ["task.limit=2"]):
        assert defer_task_settings(alone) == alone
