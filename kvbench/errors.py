"""Errors a user can cause and mend: one line with the value, the limit and the remedy.

Everything that derives from `KvbenchError` ends a command with that one line and exit code 2, never with a traceback;
any other exception is a defect of the project and keeps its traceback. The exception: what a policy, a metric or the
model raises while one sample is computed fails that sample alone (`kvbench.runtime.requests`).
"""

import difflib
import traceback
import unicodedata
from collections.abc import Iterable
from pathlib import Path

UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs")
"""Unicode's control characters (ESC among them), format characters (text direction among them), lone surrogates."""


def printable(text: str) -> str:
    r"""`text` for a terminal: what could move the cursor, recolour, retitle or reorder is shown as an escape.

    Messages quote data sets and models; `\x1b[2J` in a row would otherwise clear the reader's screen.
    """
    unsafe = {character for character in text if unicodedata.category(character) in UNSAFE_CATEGORIES}
    return "".join(c.encode("unicode_escape").decode() if c in unsafe else c for c in text)


class KvbenchError(Exception):
    """A problem the user can mend; the message is one printable line: the value, the limit, the remedy."""

    def __init__(self, message: str):
        super().__init__(printable(" ".join(message.split())))


class ConfigError(KvbenchError):
    """A configuration value is unknown, of the wrong type or out of range."""


class BudgetError(KvbenchError):
    """A budget is too small (or otherwise impossible) for a policy on a prompt of a given length."""


class DataError(KvbenchError):
    """A data file is missing, malformed or does not match its checksum."""


class ModelError(KvbenchError):
    """A model or tokenizer cannot be had, or a prompt does not fit its context."""


class RecordError(KvbenchError):
    """A run folder or a record file cannot be written or read."""


class MetricError(KvbenchError):
    """A metric cannot be trusted in this environment."""


class LaunchError(KvbenchError):
    """Jobs cannot be sent to other processes, or the processes are lost."""


def failure_reason(error: BaseException) -> str:
    """One line for the record: the error's class, the first line of its message, and where it was raised."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text


def nearest(word: str, known: Iterable[str]) -> str:
    """Which of the known words was probably meant, as the end of a message: " did you mean passkey?", or nothing."""
    names = {name.lower(): name for name in known}
    ends = [name for name in names if name.endswith(f"/{word.lower()}")]  # qasper_e for longbench/qasper_e
    found = ends or difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return f" did you mean {names[found[0]]}?" if found else ""
