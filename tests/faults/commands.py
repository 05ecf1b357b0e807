"""The command line as these tests use it: started in a fork of a prepared process, killed, waited for, read."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
TIMES = ("seconds", "recorded_at", "call")
"""Fields of a record that differ from run to run."""
RUN = [
    "model=tiny-random", "model.n_layers=4", "arms=smoke", "task=passkey", "task.limit=8", "task.lengths=[200]",
    "protocol.max_new_tokens=4", "protocol.gold_tokens=3",
]  # fmt: skip
"""A run of 8 samples and 9 arms, a second long, in 8 batches."""


@dataclass
class Command:
    """One call of the command line; `code` is its exit code, or minus the signal that ended it, once waited for.

    Its process is not reaped before `wait`, so that a signal can hit no other.
    """

    server: Server
    pid: int
    stdout_file: Path
    stderr_file: Path
    code: int | None = None

    def running(self) -> bool:
        state = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
        return state not in "ZX"

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(self.server.ask({"wait": self.pid})["status"])
            assert "Traceback" not in self.stderr, self.stderr
        return self.code

    @property
    def stdout(self) -> str:
        return self.stdout_file.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text(encoding="utf-8")

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The arms of the JSON document in the last line of standard output."""
        return {arm["arm"]: arm for arm in json.loads(self.stdout.splitlines()[-1])["arms"]}

    @property
    def error_line(self) -> str:
        """The one line that a command ends with when there is something to mend."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("kvbench: ")]
        assert len(lines) == 1, self.stderr
        return lines[0]

    @property
    def tables(self) -> str:
        """The printed tables without their last column, the seconds: the one thing that differs from run to run."""
        rows = [line for line in self.stdout.splitlines() if not line.startswith("{")]
        return "\n".join(re.sub(r"[^│┃┳┻╇┴┬┼╋┏┓┡┩└┘━─]*[│┃┓┩┘━─]*\s*$", "", line) for line in rows)


@dataclass
class Server:
    """The process that forks."""

    process: subprocess.Popen[str]
    folder: Path
    n_started: int = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, arguments: Sequence[str], folder: Path, **limits: Any) -> Command:
        """Start a command in `folder`; see `cli_server.run_child` for the limits."""
        self.n_started += 1
        stdout, stderr = (self.folder / f"{self.n_started}.{name}" for name in ("stdout", "stderr"))
        order = {"arguments": list(arguments), "folder": str(folder), "stdout": str(stdout), "stderr": str(stderr)}
        return Command(self, self.ask({"start": {**order, **limits}})["pid"], stdout, stderr)

    def run(self, arguments: Sequence[str], folder: Path, code: int | None = None, **limits: Any) -> Command:
        """Run a command to its end, which has to be the exit code if one is given."""
        command = self.start(arguments, folder, **limits)
        assert command.wait() == code or code is None, command.stderr
        return command


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """A server that keeps the output of its commands in `folder`."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command, pipe = [sys.executable, str(Path(__file__).with_name("cli_server.py"))], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    try:
        yield Server(process, folder)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=600)


def wait_until(condition: Any, command: Command, every_s: float = 0.003, timeout_s: float = 300.0) -> bool:
    """Wait until `condition()`, looking every so often; returns False if the command ended before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if not command.running():
            return bool(condition())
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(every_s)
    return True


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file's lines: what a reader may count on. A last line may lack its line feed alone."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def rows(root: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The record of every (data set, sample, arm) below a folder of runs, first success first, without its times."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(root.glob("*/records/*.jsonl")):
        for record in complete_lines(path):
            timeless = {name: value for name, value in record.items() if name not in TIMES}
            found.setdefault((record["dataset"], record["sample"], record["arm"]), timeless)
    return found
