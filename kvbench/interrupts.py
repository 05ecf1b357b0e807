"""Ctrl-C in two steps: the first asks to finish what is in flight, the second stops at once.

    with interruptible() as interrupts:
        for result in engine.run(loaded, jobs, interrupts.asked):
            with interrupts.held():
                folder.append(...)

Outside of the block Ctrl-C raises KeyboardInterrupt as ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
        """Let a short piece of work, such as writing a record, come to its end even if Ctrl-C is pressed twice.

        Yields:
            Nothing.

        Raises:
            KeyboardInterrupt: at the end of the block, if it was pressed the second time meanwhile.
        """
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

    Yields:
        What was asked for.
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
