"""What all commands have in common: how they end, how Ctrl-C ends them, and that no output can break them.

    @command
    def main(arguments: Sequence[str] | None = None) -> int: ...

Exit codes: what `main` returns; 2 for something to mend, told in one line on standard error; 130 for Ctrl-C; 141 if the
reader of standard output is gone (`| head -1`), as a shell reports of any tool that SIGPIPE ended.

Inside `with interruptible() as interrupts:` the first Ctrl-C only asks to finish what is in flight
(`interrupts.asked`), the second stops at once, but never within `interrupts.held()`; outside it raises
KeyboardInterrupt as ever.
"""

from __future__ import annotations

import codecs
import functools
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, ParamSpec, TextIO

from kvbench.errors import KvbenchError, printable

EXIT_MEND, EXIT_FAILED_SAMPLES, EXIT_INTERRUPTED, EXIT_NO_READER = 2, 3, 130, 128 + signal.SIGPIPE
LAUNCHER_EXTRAS = {"submitit": "slurm", "joblib": "joblib"}
"""Extras that install Hydra's launcher plug-ins, by the beginning of the plug-in's name."""

P = ParamSpec("P")


class OutputError(KvbenchError):
    """Standard output cannot be written."""


class NoReader(BaseException):
    """Whoever read standard output is gone; no `except Exception` on the way to the end may hold this up."""


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate the `main` of a command: errors that the user can mend become one line and an exit code."""

    @functools.wraps(main)
    def run(*arguments: P.args, **options: P.kwargs) -> int:
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Output(_open(sys.stdout, 1)), _Notes(_open(sys.stderr, 2))
        try:
            try:
                code = _exit_code(main, *arguments, **options)
            except SystemExit:  # argparse's --help
                if code := _exit_code(sys.stdout.flush):
                    return code
                raise
            return _exit_code(sys.stdout.flush) or code
        finally:
            sys.stdout, sys.stderr = streams

    return run


def mendable(error: Exception) -> str | None:
    """The one line for an error that the user can mend; None for a defect of the project.

    Besides our own errors, those are Hydra's and OmegaConf's, and whatever the system says about a named file.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, KvbenchError):
        return str(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return one_line(error)
    if isinstance(error, OSError) and error.filename is not None:
        return printable(
            f"{error.filename} cannot be used ({error.strerror}): check the path, its permissions and free space"
        )
    return None


def one_line(error: BaseException) -> str:
    """Hydra's message in one line, with what it knows of the cause."""
    parts: dict[str, None] = {}
    current: BaseException | None = error
    while current is not None:
        parts[" ".join(str(current).split())] = None
        current = current.__cause__
    line = " <- ".join(filter(None, parts))
    if ".backend'. To append to your config" in line:
        from kvbench.methods.registry import BACKEND_HAS_GONE  # late: not every command loads torch

        return f"backend{BACKEND_HAS_GONE}"
    for plug_in, extra in LAUNCHER_EXTRAS.items():
        if f"Could not load 'hydra/launcher/{plug_in}" in line:
            return f"the launcher {plug_in} is not installed: pip install 'kvbench[{extra}]'"
    return printable(line)


def _exit_code(act: Callable[P, int | None], *arguments: P.args, **options: P.kwargs) -> int:
    try:
        return act(*arguments, **options) or 0
    except NoReader:
        return EXIT_NO_READER
    except KeyboardInterrupt as error:
        progress = f" ({error})" if str(error) else ""
        print(f"kvbench: interrupted{progress}; what was recorded stays, the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        line = mendable(error)
        if line is None:
            raise
        print(f"kvbench: {line}", file=sys.stderr)
        return EXIT_MEND


class _Output:
    """Standard output. What its encoding lacks becomes an escape that JSON reads too; failures are told apart."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        return self._try(self._stream.write, text.encode(encoding, "kvbench").decode(encoding))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except OSError as error:
            self._give_up()
            if isinstance(error, BrokenPipeError):
                raise NoReader from None
            raise OutputError(
                f"standard output cannot be written ({error.strerror}): nothing that was recorded or written to files "
                "is lost; free space, or send the output elsewhere, and run the same command again"
            ) from None

    def _give_up(self) -> None:
        """Send what is left to nowhere: Python would try to write it once more at its end, and complain."""
        _to_nowhere(self._stream.fileno())


class _Notes(_Output):
    """Standard error. A run that can no longer say how far it is goes on all the same."""

    def _try(self, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except OSError:
            self._give_up()
            return 0


def _open(stream: TextIO | None, descriptor: int) -> TextIO:
    """The stream; for one that was closed (`>&-`), nowhere, so that no file is opened under its number."""
    if stream is not None:
        return stream
    _to_nowhere(descriptor)
    return os.fdopen(descriptor, "w", encoding="utf-8", closefd=False)


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("kvbench", _escape)
FIRST = "\nkvbench: finishing the samples in flight; Ctrl-C again stops now, without them\n"


class Interrupts:
    """What Ctrl-C has asked for so far."""

    def __init__(self) -> None:
        self._count = 0
        self._held = False

    def asked(self) -> bool:
        """Whether Ctrl-C was pressed: begin nothing new."""
        return self._count > 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a short piece of work, such as writing a record, come to its end even if Ctrl-C is pressed twice."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._count > 1:
            raise KeyboardInterrupt

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self._count += 1
        if self._count == 1:
            # A print could meet itself here: the handler may run in the middle of another one.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, FIRST.encode())
        elif not self._held:
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Handle Ctrl-C in two steps until the block ends.

    Only the main thread can, and a process that was started to ignore it (nohup, background jobs) goes on ignoring it.
    """
    interrupts = Interrupts()
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or former != signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, former)


def strict_json(value: Any, **options: Any) -> str:
    """JSON that any reader takes: as `json.dumps` with these options, but numbers that are not finite are null."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
