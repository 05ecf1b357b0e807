"""Ctrl-C once asks, twice stops; what is being written is written first; the handler is undone."""

import os
import signal
import threading

import pytest

from kvbench.commands import FIRST, interruptible


@pytest.fixture(autouse=True)
def default_handler():
    """The handler of a process that was started from a terminal, whatever the tests were started from."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_once_asks_and_says_so(capfd):
    with interruptible() as interrupts:
        assert not interrupts.asked()
        press()
        assert interrupts.asked()
    assert capfd.readouterr().err == FIRST
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_twice_stops():
    with interruptible():
        press()
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_what_is_being_written_comes_to_its_end():
    written = []

    def write(interrupts) -> None:
        with interrupts.held():
            press()
            press()
            written.append("line")
        written.append("more")

    with interruptible() as interrupts, pytest.raises(KeyboardInterrupt):
        write(interrupts)
    assert written == ["line"]


def test_an_error_while_writing_is_not_hidden_by_an_interrupt():
    def fail(interrupts) -> None:
        with interrupts.held():
            press()
            press()
            raise OSError("disk full")

    with interruptible() as interrupts, pytest.raises(OSError, match="disk full"):
        fail(interrupts)


def test_threads_and_ignored_interrupts_are_left_alone():
    seen = []

    def run() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run()
    assert seen == [signal.default_int_handler, signal.SIG_IGN]
