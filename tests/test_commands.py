"""How every command ends: what the user can mend is one line, no state of its output breaks it, Ctrl-C asks first."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.commands import EXIT_NO_READER, FIRST, command, interruptible, mendable
from kvbench.errors import DataError, printable

COMMANDS = [
    "analysis", "check", "cli", "export", "fetch", "lm_eval", "models.fetch", "paper", "progress", "report", "score",
]  # fmt: skip
RUN = [
    "model=tiny-random", "task=passkey", "task.limit=1", "task.lengths=[128]", "method=h2o", "budget=0.5",
    "protocol.max_new_tokens=2", "protocol.gold_tokens=2", "output.root=runs",
]  # fmt: skip
MANY_LINES = r"""
import sys
from kvbench.commands import command
@command
def main():
    for number in range(100_000): print(number, 'é', '\ud800', '🙂')
    return 0
sys.exit(main())
"""


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_wrapped(name):
    assert hasattr(importlib.import_module(f"kvbench.{name}").main, "__wrapped__")


GOES_ON = "what was recorded stays, the same command goes on\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a\nb"), 2, "kvbench: a b\n"),
        (FileNotFoundError(2, "No such file or directory", "results/a\x1b.md"), 2,
         "kvbench: results/a\\x1b.md cannot be used (No such file or directory): check the path, its permissions and "
         "free space\n"),
        (KeyboardInterrupt(), 130, f"kvbench: interrupted; {GOES_ON}"),
        (KeyboardInterrupt("1 of 2 samples"), 130, f"kvbench: interrupted (1 of 2 samples); {GOES_ON}"),
    ],
)  # fmt: skip
def test_what_can_be_mended_is_one_line_and_an_exit_code(error, code, line, capsys):
    @command
    def main():
        raise error

    assert main() == code
    assert capsys.readouterr().err == line


def test_a_defect_keeps_its_traceback():
    @command
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()
    assert mendable(OSError(5, "Input/output error")) is None  # no file: whose it is nobody knows


def test_what_acts_on_a_terminal_is_shown_as_an_escape():
    assert printable("a\x1b[2J\x07\r\n\x9b\u202e\u200b\ud800z") == "a\\x1b[2J\\x07\\r\\n\\x9b\\u202e\\u200b\\ud800z"
    assert printable("Größe 语言 🙂 «ok»") == "Größe 语言 🙂 «ok»"


@given(st.text())
def test_every_message_is_one_printable_line(text):
    message = str(DataError(text))
    message.encode("utf-8")
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in message)
    assert message.splitlines() in ([], [message])


# ---- output ----------------------------------------------------------------------------------------------------------


def shell(line, folder, **environment):
    """Run a line of bash in which $KVBENCH is the command with small settings and $MANY one that prints a megabyte."""
    settings = {"KVBENCH": f"{sys.executable} -m kvbench {' '.join(RUN)}", "PYTHON": sys.executable, "MANY": MANY_LINES}
    call = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, **settings, **environment},
    )  # fmt: skip
    assert "Traceback" not in call.stderr
    assert "Exception ignored" not in call.stderr
    return call


def recorded(folder):
    return sum(len(path.read_text().splitlines()) for path in folder.glob("runs/*/records/*.jsonl"))


@pytest.mark.parametrize("line", ["$KVBENCH | true", "$KVBENCH 2>&1 | true"])
def test_a_reader_that_leaves_ends_the_command_quietly_after_the_work(tmp_path, line):
    assert shell(line, tmp_path).returncode == EXIT_NO_READER
    assert recorded(tmp_path) == 2


def test_a_reader_that_leaves_in_the_middle_ends_the_command_there(tmp_path):
    call = shell('$PYTHON -c "$MANY" | head -1', tmp_path)
    assert (call.returncode, call.stderr) == (EXIT_NO_READER, "")
    assert call.stdout.startswith("0 é \\ud800")


def test_a_full_output_is_one_line_and_loses_no_record(tmp_path):
    call = shell("$KVBENCH > /dev/full", tmp_path)
    assert call.returncode == 2
    assert call.stderr.splitlines()[-1].startswith("kvbench: standard output cannot be written (No space left")
    assert recorded(tmp_path) == 2


@pytest.mark.parametrize("closed", [">&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_closed_streams_and_a_full_standard_error_hold_up_no_run(tmp_path, closed):
    call = shell(f"$KVBENCH {closed}", tmp_path)
    assert call.returncode == 0, call.stderr
    assert recorded(tmp_path) == 2
    if closed == "2>/dev/full":
        assert json.loads(call.stdout.splitlines()[-1])["n_samples"] == 1


def test_json_can_be_read_whatever_the_encoding(tmp_path):
    call = shell("$KVBENCH \"model.name='é🙂'\"", tmp_path, PYTHONIOENCODING="ascii")
    assert call.returncode == 0, call.stderr
    assert call.stdout.isascii()
    assert json.loads(call.stdout.splitlines()[-1])["model"] == "é🙂"


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def default_handler():
    """The handler of a process that was started from a terminal, whatever the tests were started from."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, former)


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_once_asks_and_says_so_and_twice_stops(capfd, default_handler):
    with interruptible() as interrupts:
        assert not interrupts.asked()
        press()
        assert interrupts.asked()
        assert capfd.readouterr().err == FIRST
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) == default_handler


@pytest.mark.parametrize("error", [None, OSError("disk full")])
def test_what_is_being_written_comes_to_its_end_and_its_error_is_not_hidden(error, default_handler):
    written = []

    def write(interrupts):
        with interrupts.held():
            press()
            press()
            written.append("line")
            if error:
                raise error
        written.append("more")

    with interruptible() as interrupts, pytest.raises(type(error) if error else KeyboardInterrupt):
        write(interrupts)
    assert written == ["line"]


def test_threads_and_ignored_interrupts_are_left_alone(default_handler):
    seen = []

    def run():
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run()
    assert seen == [default_handler, signal.SIG_IGN]
