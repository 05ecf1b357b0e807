"""docs/plugins.md and the README's method: classes pass the check, commands run, the package is found."""

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

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
SMALL = ["model=tiny-random", "model.n_layers=10", "task.lengths=[128]", "task.limit=1", "protocol.max_new_tokens=2"]


def block(kind, file, page=PAGE):
    (found,) = re.findall(rf"```{kind}\n# {re.escape(file)}\n(.*?)```", page, re.DOTALL)
    return found


def commands(program):
    """Arguments of the commands in fenced blocks that call a module of kvbench."""
    return [shlex.split(words) for words in re.findall(rf"^python -m {re.escape(program)} (.*)$", PAGE, re.MULTILINE)]


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """The files of both pages in a folder that is the current one and on the path, as with `python -m`."""
    (tmp_path / "my_methods").mkdir()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, page in {"last_votes": PAGE, "rolling": PAGE, "newest": readme}.items():
        file = f"my_methods/{name}.py"
        (tmp_path / file).write_text(block("python", file, page), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in [module for module in sys.modules if module.split(".")[0] in ("my_methods", "last_votes")]:
        del sys.modules[module]


@pytest.fixture
def arms(monkeypatch, capfd):
    """Call `kvbench` in this process; the arms of its last line."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["kvbench", *words])
        assert main() == 0, capfd.readouterr().err
        return json.loads(capfd.readouterr().out.splitlines()[-1])["arms"]

    return call


def test_the_readme_s_method_runs_from_its_own_file(methods, arms):
    full, arm = arms(*SMALL, "task=passkey", "method=my_methods.newest:Newest", "budget=0.5")
    assert full["arm"] == "full"
    assert (arm["arm"], arm["method"], arm["n"]) == ("newest@0.5", "newest", 1)
    assert 0.49 < arm["budget_measured"] <= 0.5
    assert arm["kl"] > 0


def test_the_page_s_thirty_lines_are_thirty():
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
    assert finding.rule == "compress"
    for text in (finding.statement, finding.seen.partition(" (")[0], finding.remedy):
        assert " ".join(text.split()) in " ".join(PAGE.split())


def test_the_page_s_runs_give_the_arm_beside_the_others(methods, arms):
    alone, together = ([arm["arm"] for arm in arms(*words, *SMALL)] for words in commands("kvbench"))
    assert alone == ["full", "last_votes@0.5"]
    assert "last_votes@0.5" in together
    assert len(together) > 5


def test_the_template_package_is_found_by_name_and_its_test_passes(methods, arms):
    project = tomllib.loads(block("toml", "pyproject.toml"))["project"]
    (methods / "last_votes").mkdir()
    source = block("python", "my_methods/last_votes.py")
    (methods / "last_votes" / "__init__.py").write_text(source, encoding="utf-8")
    ((group, points),) = project["entry-points"].items()
    installed = methods / "kvbench_last_votes-0.1.0.dist-info"  # what an installer makes of the project table
    installed.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n"
    (installed / "METADATA").write_text(metadata, encoding="utf-8")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (installed / "entry_points.txt").write_text(f"[{group}]\n{lines}", encoding="utf-8")
    test = {}
    exec(block("python", "tests/test_last_votes.py"), test)
    (cases,) = test["test_the_method_keeps_the_contract"].pytestmark
    for rule in cases.args[1][: len(RULES)]:
        with contextlib.suppress(SkipTest):
            rule()
    assert type(build_policy("last_votes", {"last_tokens": 4})).__module__ == "last_votes"
    try:
        _, arm = arms(*SMALL, "method=last_votes", "method.last_tokens=4", "budget=0.5", "task=passkey")
    finally:  # the store is the process's, the package ours
        ConfigStore.instance().repo["method"].pop("last_votes.yaml", None)
    assert arm["arm"] == "last_votes@0.5,last_tokens=4"


def test_the_page_lists_the_rules():
    listed = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert listed == [(name, look.__doc__) for name, (look, _) in RULES.items()]
