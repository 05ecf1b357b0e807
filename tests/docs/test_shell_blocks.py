"""Every shell command of README and documentation: run where that is cheap, else parsed, and said why not run.

A fenced block without a language is a shell block if its first word is a program; `NOT_RUN` names what is parsed only.
"""

import argparse
import importlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.utils import instantiate

from kvbench.arguments import COMMANDS as OWN
from kvbench.cli import main
from kvbench.config import composed, group_options, method_entries, spelled_out
from kvbench.methods.registry import build_policy

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("python", "kvbench", "make", "pip", "git", "hf", "export", "docker", "cd")
NOT_RUN = {
    r"data\.root=|task=qasper|task=zeroscrolls/": "reads rows that are not ours to ship",
    r"model=|model\.path=": "reads weights that are not here, most of them on a GPU",
    r"task=(?:glob\()?ruler/": "RULER's generator is an extra: tests/tasks/test_ruler.py runs it",
    r"my_methods": "tests/docs/test_plugins_page.py runs it, with the files of the page",
    r"hydra/launcher=": "tests/test_launchers.py runs jobs through every launcher",
}
"""What is in a command of `kvbench` itself that keeps it from being run here, and why."""
SMALL = [
    "model=tiny-random", "model.n_layers=20", "task.limit=1", "protocol.max_new_tokens=2", "protocol.gold_tokens=2",
]  # fmt: skip
SMALL_TASKS = {
    "demo": ["task.tasks.passkey.lengths=[192]", "task.tasks.fewshot.lengths=[192]"],
    "passkey": ["task.lengths=[192]"],
}


def shell_lines():
    """Page and words of every command."""
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
            if language in ("", "bash", "sh") and program(shlex.split(block.splitlines()[0], comments=True)):
                for line in block.replace("\\\n", " ").splitlines():
                    for part in line.split(" && "):
                        if words := shlex.split(part, comments=True):
                            yield page.relative_to(ROOT).as_posix(), tuple(words)


def program(words):
    """The program that a command starts, without its folder; none if it starts none that we know."""
    name = Path(words[0]).name if words else ""
    return name if name in PROGRAMS else ""


def module_of(words):
    """The module of kvbench that a command starts, and its arguments; none if it starts another program."""
    if program(words) == "python" and words[1:2] == ("-m",) and words[2].split(".")[0] == "kvbench":
        return words[2], list(words[3:])
    if program(words) == "kvbench":
        if words[1] == "run" or words[1] not in OWN:
            return "kvbench", list(words[2 if words[1] == "run" else 1 :])
        return f"kvbench.{OWN[words[1]].module}", list(words[2:])
    return None, list(words)


COMMANDS = sorted(set(shell_lines()))
OURS = [(page, words) for page, words in COMMANDS if module_of(words)[0] == "kvbench" and "--help" not in words]
OTHERS = [(page, words) for page, words in COMMANDS if module_of(words)[0] not in (None, "kvbench")]
RUN = [(page, words) for page, words in OURS if not any(re.search(pattern, " ".join(words)) for pattern in NOT_RUN)]


def shown(value):
    return " ".join(value) if isinstance(value, tuple) else str(value)


def test_there_are_commands_of_each_kind():
    assert len(OURS) > 15
    assert len(OTHERS) > 8
    assert len(RUN) > 5
    assert not [words for _, words in COMMANDS if not program(words)]
    for pattern in NOT_RUN:
        assert [words for _, words in OURS if re.search(pattern, " ".join(words))], f"{pattern}: nothing of it is left"


@pytest.mark.parametrize(("page", "words"), OURS, ids=shown)
def test_it_composes_to_a_task_and_methods(page, words):
    if "my_methods" in " ".join(words):
        pytest.skip(NOT_RUN["my_methods"])
    overrides = [word for word in spelled_out(module_of(words)[1]) if word != "-m"]
    choices = []
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        swept = override.is_sweep_override()
        assert not swept or "-m" in words, f"{text} is a sweep without -m"
        if isinstance(override.value(), Glob):
            values = override.value().filter(group_options(override.key_or_group))
        else:
            values = override.sweep_string_iterator() if swept else ()
        choices.append([f"{override.get_key_element()}={value}" for value in values] or [text])
    for combination in itertools.product(*choices):
        config = composed(combination)
        assert config.task._target_.startswith("kvbench.tasks.")
        if config.methods:
            for name, options in method_entries(config):
                build_policy(name, options)
            continue
        methods = [config.method] if config.method else list(config.arms.values())
        assert methods
        for method in methods:
            instantiate(method)


def call(words, monkeypatch, capfd):
    arguments = [word for word in words if word == "-m"] + [word for word in words if word != "-m"]
    monkeypatch.setattr(sys, "argv", ["kvbench", *arguments])
    assert main() == 0, capfd.readouterr().err
    return json.loads(capfd.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("page", "words"), RUN, ids=shown)
def test_it_runs_on_a_tiny_model(page, words, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    (task,) = [word.removeprefix("task=") for word in words if word.startswith("task=")] or ["demo"]
    small = [*SMALL_TASKS[task], *SMALL]
    found = call([*module_of(words)[1], *small], monkeypatch, capfd)
    assert found["n_samples"] == 1
    assert len(found["arms"]) >= 1


class Parsed(BaseException):
    """Raised once the arguments have been read; nobody catches it."""


@pytest.mark.parametrize(("page", "words"), OTHERS, ids=shown)
def test_the_command_line_takes_it(page, words, monkeypatch, capsys):
    module, arguments = module_of(words)
    if module == "kvbench.lm_eval":
        pytest.skip("its command line is that of lm_eval: tests/integrations/test_lm_eval.py")
    real = argparse.ArgumentParser.parse_args

    def parse(self, *given, **named):
        real(self, *given, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    arguments = ["RUN" if word == "RUN..." else word for word in arguments]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises((Parsed, SystemExit)) as ended:
        importlib.import_module(module).main(arguments)
    assert ended.type is Parsed or ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "words"), [(page, words) for page, words in COMMANDS if program(words) == "make"], ids=shown
)
def test_make_knows_the_target(page, words):
    if not shutil.which("make"):
        pytest.skip("make is not here")
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_extras_that_are_installed_exist():
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = {extra for _, words in COMMANDS for extra in re.findall(r"(?:kvbench|\.)\[(\w+)\]", " ".join(words))}
    assert named
    assert named <= known.keys()


def test_other_programs_files_exist():
    for page, words in COMMANDS:
        if program(words) == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), f"{page}: {' '.join(words)}"
