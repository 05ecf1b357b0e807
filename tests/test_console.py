"""The command `kvbench`: its commands, help, errors in a second, lists, and completion in a real bash."""

import os
import shutil
import subprocess
import sys
from importlib import import_module

import pytest

from kvbench.__main__ import console
from kvbench.arguments import COMMANDS, EXPORT_FORMATS, parser
from kvbench.ls import complete_setting, rows
from kvbench.ls import main as ls
from kvbench.methods.registry import load_policies

SCRIPT = "import sys\nfrom kvbench.__main__ import console\nsys.exit(console())\n"


@pytest.fixture
def call(monkeypatch, capfd):
    """`kvbench WORDS` in this process: exit code, output, errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["kvbench", *words])
        capfd.readouterr()
        try:
            code = console()
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return run


def test_every_command_has_a_module_and_a_help(call):
    for name, command in COMMANDS.items():
        assert callable(import_module(f"kvbench.{command.module}").main)
        assert name in call("--help")[1]
        if not command.own_words:
            assert call(name, "--help")[1].startswith(f"usage: kvbench {name}")
    assert call()[1].count("\n") <= 24
    assert call("run", "--help")[1].startswith("kvbench compares")


def test_words_are_those_that_the_modules_know():
    from kvbench.export import EXPORTERS
    from kvbench.fetch import FETCHERS

    assert tuple(EXPORTERS) == EXPORT_FORMATS
    help_text = parser("fetch").format_help()
    assert all(name in help_text for name in FETCHERS)


MISTAKES = {
    ("rnu",): "'rnu' is no command of kvbench: did you mean run?",
    ("ls", "metods"): "did you mean methods?",
    ("check", "h2q"): "did you mean h2o?",
    ("check", "kvbench.methods.h2o:H3O"): "(h2o.py has no H3O): did you mean H2O?",
    ("run", "method=kvbench.methods.h2o:H3O"): "(h2o.py has no H3O): did you mean H2O?",
    ("check",): "the following arguments are required: METHOD",
    ("export", "longbenhc", "x"): "did you mean longbench?",
    ("tables", "--experiment", "nedle"): "did you mean needle?",
    ("tables", "--limit", "x"): "argument --limit: invalid int value: 'x': see kvbench tables --help",
    ("progress", "--onse"): "unrecognized arguments: --onse",
    ("run", "task=passky"): "did you mean passkey?",
    ("task=passky",): "did you mean passkey?",
    ("run", "log=wandbb"): "did you mean wandb?",
    ("lm-eval", "--model", "kvbench", "--model_args", "budget=0.5,method=kvmergr"): "did you mean kvmerger?",
    ("run", "method=h2o", "+x=1", "--nope"): "see kvbench run --help",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(call, words):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith("kvbench: ")
    assert err.count("\n") == 1
    assert MISTAKES[words] in err


def test_names_are_checked_and_listed_without_torch():
    lines = [
        "import io, sys", "from contextlib import redirect_stderr, redirect_stdout",
        "from kvbench.__main__ import console",
    ]  # fmt: skip
    for words in (*MISTAKES, ("ls",), ("--help",), ("run", "--help")):
        lines += [
            f"sys.argv = ['kvbench', *{words!r}]",
            "with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):",
        ]
        lines += ["    console()", "assert 'torch' not in sys.modules, sys.argv"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_lists_have_a_line_for_every_name(capsys):
    assert [name for name, _ in rows("methods")] == list(load_policies())
    tasks = dict(rows("tasks"))
    assert {"passkey", "demo", "longbench/qasper", "zeroscrolls/qmsum"} <= set(tasks)
    assert "qasper" not in tasks
    for what in ("methods", "tasks", "models", "arms", "engines", "experiments"):
        assert all(summary for _, summary in rows(what)), what
    assert ls(["methods", "models"]) == 0
    out = capsys.readouterr().out
    assert "methods:\n" in out
    assert "tiny-random " in out


def test_settings_are_completed():
    assert {"method=", "methods=", "task=", "protocol.compress=", "log="} <= set(complete_setting("pro"))
    assert "task=passkey" in complete_setting("task=pa")
    assert "methods=[h2o,cam" in complete_setting("methods=[h2o,c")
    assert complete_setting("retry_failed=") == ["retry_failed=true", "retry_failed=false"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("kvbench pro", ["progress"]),
        ("kvbench ls mo", ["models"]),
        ("kvbench run task=passk", ["passkey"]),  # bash begins a new word after the equals sign
        ("kvbench run retry_f", ["retry_failed="]),
        ("kvbench check snap", ["snapkv"]),
    ],
)
def test_bash_completes(tmp_path, line, expected):
    pytest.importorskip("argcomplete")
    assert shutil.which("bash")
    (tmp_path / "kvbench").write_text(f"#!{sys.executable}\n{SCRIPT}")
    (tmp_path / "kvbench").chmod(0o755)
    script = f"""
    eval "$(kvbench completion bash)"
    COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
    COMP_WORDS=({line.replace("=", " = ")}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    _python_argcomplete kvbench
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert [word.strip() for word in done.stdout.splitlines()] == expected, done.stderr


def test_python_m_takes_commands_too():
    done = subprocess.run(
        [sys.executable, "-m", "kvbench", "ls", "engines"], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["fused", "plain"]


def test_parsers_know_no_other_words():
    assert vars(parser("progress").parse_args(["--once"]))["once"]
