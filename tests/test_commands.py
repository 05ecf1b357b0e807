"""How every command ends: no state of its output breaks it, and what the user can mend is one line."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvbench.commands import EXIT_NO_READER, command, mendable
from kvbench.errors import DataError

COMMANDS = [
    "kvbench.cli", "kvbench.paper", "kvbench.score", "kvbench.export", "kvbench.fetch", "kvbench.report",
    "kvbench.progress", "kvbench.check", "kvbench.analysis", "kvbench.lm_eval",
    "kvbench.models.fetch",
]  # fmt: skip
RUN = [
    "model=tiny-random", "task=passkey", "task.limit=1", "task.lengths=[128]", "method=h2o", "budget=0.5",
    "protocol.max_new_tokens=2", "protocol.gold_tokens=2", "output.root=runs",
]  # fmt: skip
MANY_LINES = "\n".join(
    [
        "import sys",
        "from kvbench.commands import command",
        "@command",
        "def main():",
        "    for number in range(100_000): print(number, 'é', '\\ud800', '🙂')",
        "    return 0",
        "sys.exit(main())",
    ]
)


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which $KVBENCH is the command with small settings and $MANY one that prints a megabyte."""
    settings = {"KVBENCH": f"{sys.executable} -m kvbench {' '.join(RUN)}", "PYTHON": sys.executable, "MANY": MANY_LINES}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, **settings, **environment},
    )  # fmt: skip


def recorded(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("runs/*/records/*.jsonl"))


@pytest.mark.parametrize("line", ["$KVBENCH | true", "$KVBENCH 2>&1 | true"])
def test_a_reader_that_leaves_ends_the_command_quietly_after_the_work(tmp_path, line):
    call = shell(line, tmp_path)
    assert call.returncode == EXIT_NO_READER
    assert "Traceback" not in call.stderr
    assert "Exception ignored" not in call.stderr
    assert recorded(tmp_path) == 1


def test_a_reader_that_leaves_in_the_middle_ends_the_command_there(tmp_path):
    call = shell('$PYTHON -c "$MANY" | head -1', tmp_path)
    assert (call.returncode, call.stderr) == (EXIT_NO_READER, "")
    assert call.stdout.startswith("0 é \\ud800")


def test_a_full_output_is_one_line_and_loses_no_record(tmp_path):
    call = shell("$KVBENCH > /dev/full", tmp_path)
    assert call.returncode == 2
    assert call.stderr.splitlines()[-1].startswith("kvbench: standard output cannot be written (No space left")
    assert "Traceback" not in call.stderr
    assert "Exception ignored" not in call.stderr
    assert recorded(tmp_path) == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_closed_streams_and_a_full_standard_error_hold_up_no_run(tmp_path, closed):
    call = shell(f"$KVBENCH {closed}", tmp_path)
    assert call.returncode == 0, call.stderr
    assert recorded(tmp_path) == 1
    if ">&-" not in closed.replace("2>&-", ""):
        assert json.loads(call.stdout.splitlines()[-1])["n_samples"] == 1


def test_json_can_be_read_whatever_the_encoding(tmp_path):
    call = shell("$KVBENCH \"model.name='é🙂'\"", tmp_path, PYTHONIOENCODING="ascii")
    assert call.returncode == 0, call.stderr
    assert call.stdout.isascii()
    assert json.loads(call.stdout.splitlines()[-1])["model"] == "é🙂"


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    for name in (r"model.name=\xff", r"model.name=\'\xff\'"):
        call = shell(f"$KVBENCH $'{name}'", tmp_path)
        assert call.returncode == 2
        assert call.stderr.splitlines()[-1].startswith("kvbench: argument ")
        assert r"\udcff" in call.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_wrapped(name):
    assert hasattr(importlib.import_module(name).main, "__wrapped__")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a\nb"), 2, "kvbench: a b\n"),
        (FileNotFoundError(2, "No such file or directory", "results/a\x1b.md"), 2,
         "kvbench: results/a\\x1b.md cannot be used (No such file or directory): check the path, its permissions and "
         "free space\n"),
        (KeyboardInterrupt(), 130, "kvbench: interrupted; what was recorded stays, the same command goes on\n"),
        (KeyboardInterrupt("1 of 2 samples"), 130,
         "kvbench: interrupted (1 of 2 samples); what was recorded stays, the same command goes on\n"),
    ],
)  # fmt: skip
def test_what_can_be_mended_is_one_line_and_an_exit_code(error, code, line, capsys):
    @command
    def main() -> int:
        raise error

    assert main() == code
    assert capsys.readouterr().err == line


def test_a_defect_keeps_its_traceback():
    @command
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()
    assert mendable(OSError(5, "Input/output error")) is None  # no file: whose it is nobody knows
