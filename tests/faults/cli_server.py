"""Runs the command line again and again in forks of one process, since importing torch each time takes seconds.

Reads one JSON document a line from standard input, answers each with one:

    {"start": {...}}   fork a child that runs `kvbench.cli.main`; answers {"pid": ...}; see `run_child` for the keys
    {"wait": pid}      answers {"status": ...}, the wait status of a child that has ended or been killed
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from typing import Any, NoReturn

import transformers.models.llama.modeling_llama  # noqa: F401  (else each child would import it)
from huggingface_hub import constants

from kvbench import cli
from kvbench.metrics import base


def run_child(order: dict[str, Any]) -> NoReturn:
    """Run the command line in this process and end it.

    Args:
        order: "arguments" (words after the command), "folder" (working directory), "stdout" and "stderr" (files);
            optionally "file_limit_bytes" (larger files cannot be written), "no_network" (a file to which every attempt
            to reach another machine is written, before it is refused), "environment" (variables to set),
            "dies_at_open" (a file's name and a count: kill -9 when it is opened for the so-manieth time to append),
            "online" (undo HF_HUB_OFFLINE) and "broken_metric" (what the metric `needle` does instead of its work:
            "raises", "nan" or "text").
    """
    os.chdir(order["folder"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests themselves were started with
    if "file_limit_bytes" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit_bytes"],) * 2)
    if "no_network" in order:
        refuse_network(order["no_network"])
    os.environ.update(order.get("environment", {}))
    if "dies_at_open" in order:
        die_at_open(*order["dies_at_open"])
    if "online" in order:
        constants.HF_HUB_OFFLINE = False  # read once, at import
    if "broken_metric" in order:
        break_metric(order["broken_metric"])
    sys.argv = ["kvbench", *order["arguments"]]
    code = cli.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def break_metric(kind: str) -> None:
    def needle(prediction, answer, all_classes):
        if kind == "raises":
            raise ValueError("broken metric")
        return math.nan if kind == "nan" else "good"

    base._metrics()["needle"] = base.BestAnswerMetric("needle", "broken on purpose", needle)


def die_at_open(name: str, count: int) -> None:
    n_left = count

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal n_left
        if event == "open" and arguments[1] is None and str(arguments[0]).endswith(name):  # by `os.open`
            n_left -= 1
            if n_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def refuse_network(log: str) -> None:
    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{event} {arguments}\n")
            raise OSError(101, "Network is unreachable")

    sys.addaudithook(audit)


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"status": os.waitpid(request["wait"], 0)[1]}
        elif pid := os.fork():
            answer = {"pid": pid}
        else:
            try:
                run_child(request["start"])
            except BaseException:  # a traceback in the child's own output, and an exit code that no command has
                sys.excepthook(*sys.exc_info())
                os._exit(99)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
