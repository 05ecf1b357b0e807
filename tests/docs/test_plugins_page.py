"""docs/plugins.md: its classes pass the check, its commands run, its package is found, its table lists the rules."""

import contextlib
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from unittest import SkipTest

import pytest
from hydra.core.config_store import ConfigStore

from kvbench.check import main as check
from kvbench.cli import main
from kvbench.methods.registry import build_policy
from kvbench.testing import RULES, check_policy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")


def block(kind: str, file: str) -> str:
    (found,) = re.findall(rf"```{kind}\n# {re.escape(file)}\n(.*?)```", PAGE, re.DOTALL)
    return found


def commands(program: str) -> list[list[str]]:
    """Arguments of the commands in fenced blocks that call a module of kvbench."""
    return [shlex.split(words) for words in re.findall(rf"^python -m {re.escape(program)} (.*)$", PAGE, re.MULTILINE)]


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """The page's two files in a folder that is the current one and on the path, as with `python -m`."""
    (tmp_path / "my_methods").mkdir()
    for name in ("last_votes", "rolling"):
        file = f"my_methods/{name}.py"
        (tmp_path / file).write_text(block("python", file), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in [module for module in sys.modules if module.split(".")[0] in ("my_methods", "last_votes")]:
        del sys.modules[module]


def test_the_page_s_thirty_lines_are_thirty(methods):
    lines = block("python", "my_methods/last_votes.py").partition("@dataclass")[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


def test_both_classes_pass_the_check_and_the_second_steps(methods, capsys):
    assert [words[0] for words in commands("kvbench.check")] == ["my_methods.last_votes:LastVotes"] * 2 + ["h2o"]
    assert check(commands("kvbench.check")[1]) == 0
    assert "last_tokens=16" in capsys.readouterr().out
    assert check(["my_methods.rolling:Rolling", "--json"]) == 0
    findings = {f["rule"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["new_tokens"]["status"] == "passed"


def test_the_page_shows_what_the_check_says_of_a_forgotten_need(methods):
    source = block("python", "my_methods/last_votes.py")
    (methods / "my_methods" / "forgetful.py").write_text(source.replace('{"window_attention"}', ""), encoding="utf-8")
    from my_methods.forgetful import LastVotes

    (finding,) = (one for one in check_policy(LastVotes, on_fail=None) if one.status == "broken")
    shown = " ".join(PAGE.split())
    assert finding.rule == "compress"
    for text in (finding.statement, finding.seen.partition(" (")[0], finding.remedy):
        assert " ".join(text.split()) in shown


def test_the_page_s_runs_give_the_arm_beside_the_others(methods, monkeypatch, capfd):
    small = [
        "model=tiny-random",
        "model.n_layers=10",
        "task.lengths=[128]",
        "task.limit=1",
        "protocol.max_new_tokens=2",
    ]
    alone, together = commands("kvbench")
    arms = []
    for words in (alone, together):
        monkeypatch.setattr(sys, "argv", ["kvbench", *words, *small])
        assert main() == 0, capfd.readouterr().err
        arms.append([arm["arm"] for arm in json.loads(capfd.readouterr().out.splitlines()[-1])["arms"]])
    assert arms[0] == ["last_votes@0.5"]
    assert "last_votes@0.5" in arms[1]
    assert len(arms[1]) > 5


def test_the_template_package_is_found_by_name_and_its_test_passes(methods, monkeypatch, capfd):
    project = tomllib.loads(block("toml", "pyproject.toml"))
    (methods / "last_votes").mkdir()
    source = block("python", "my_methods/last_votes.py")
    (methods / "last_votes" / "__init__.py").write_text(source, encoding="utf-8")
    ((group, points),) = project["project"]["entry-points"].items()
    installed = methods / "kvbench_last_votes-0.1.0.dist-info"  # what an installer makes of the project table
    installed.mkdir()
    name = project["project"]["name"]
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n", encoding="utf-8")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (installed / "entry_points.txt").write_text(f"[{group}]\n{lines}", encoding="utf-8")
    test = {}
    exec(block("python", "tests/test_last_votes.py"), test)
    (cases,) = test["test_the_method_keeps_the_contract"].pytestmark
    for rule in cases.args[1][: len(RULES)]:
        with contextlib.suppress(SkipTest):
            rule()
    assert type(build_policy("last_votes", {"last_tokens": 4})).__module__ == "last_votes"
    words = ["method=last_votes", "method.last_tokens=4", "budget=0.5", "task=passkey", "model=tiny-random"]
    monkeypatch.setattr(
        sys, "argv", ["kvbench", *words, "task.lengths=[128]", "task.limit=1", "protocol.max_new_tokens=2"]
    )
    try:
        assert main() == 0, capfd.readouterr().err
    finally:
        ConfigStore.instance().repo["method"].pop("last_votes.yaml")  # the store is the process's, the package ours
    (arm,) = json.loads(capfd.readouterr().out.splitlines()[-1])["arms"]
    assert arm["arm"] == "last_votes@0.5,last_tokens=4"


def test_the_page_lists_the_rules():
    listed = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert listed == [(name, look.__doc__) for name, (look, _) in RULES.items()]
