"""What a fuzz counts: a case is fine if it succeeds or ends in one printable line, within seconds.

`KVBENCH_FUZZ_CASES` sets the number of cases of each fuzz, `KVBENCH_FUZZ_SEED` another sequence of them.
"""

from __future__ import annotations

import os
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from kvbench.commands import mendable

CASES = int(os.environ.get("KVBENCH_FUZZ_CASES", "200"))
SEED = int(os.environ.get("KVBENCH_FUZZ_SEED", "0"))
HANG_S = 20


class Hang(BaseException):
    """A case took so long that a user would think it hangs."""


@dataclass
class Tally:
    """How the cases ended.

    Attributes:
        ends: number of cases by how they ended, "success" and "refused" being fine.
        broken: a line for each case that is not fine.
    """

    ends: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def attempt(self, case: str, act: Callable[[], Any]) -> None:
        """Run one case and count its end."""
        try:
            with _alarm():
                act()
            end = "success"
        except Hang:
            end = "hang"
        except Exception as error:
            line = mendable(error)
            end = "refused" if line is not None and len(line.splitlines()) == 1 else "not one line"
            if line is None:
                place = traceback.extract_tb(error.__traceback__)[-1]
                end = f"{type(error).__name__} in {place.name}"
                case = f"{case}: {' '.join(str(error).split())[:120]}"
        self.ends[end] += 1
        if end not in ("success", "refused"):
            self.broken.append(f"{end}: {case}")

    def check(self, what: str, record_property: Callable[[str, object], None]) -> None:
        """Report the counts, and fail if any case is not fine."""
        fine = self.ends["success"] + self.ends["refused"]
        record_property(
            "faults",
            f"{what}: {self.ends.total()} tried, {fine} fine ({self.ends['success']} succeeded, "
            f"{self.ends['refused']} refused in one line), {len(self.broken)} not fine",
        )
        assert not self.broken, "\n".join([f"{len(self.broken)} of {self.ends.total()} cases", *self.broken])


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    former = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def generator(what: str) -> random.Random:
    """The generator of one fuzz."""
    return random.Random(f"{what}|{SEED}")


NASTY: tuple[Any, ...] = (
    "abc", "", " ", "12", "Größe 语言 🙂", "\ud800", "a\0b", "a\nb", "\x1b[2J", "../x", "/", "/nowhere/x", "x" * 300,
    "~nobody/x", "nan", "true", "null", "${nope}", "???",
    -1, 0, 1, 2, 3, 7, 1000, 10**6, 10**9, 10**12, 2**63, 10**30, -(10**30), 10**4000,
    0.5, -0.5, 1.5, 2.0, 1e308, float("nan"), float("inf"), float("-inf"), None, True, False,
    [], [1], ["a"], [0.5, None], [[1]], [10**9], {}, {"a": 1}, {"_target_": "nope.Nope"}, {"_target_": "builtins.dict"},
)  # fmt: skip
"""Values that no field expects, and some that many do."""


def shown(value: object) -> str:
    """A value for a message: short and printable."""
    try:
        text = ascii(value)
    except ValueError:
        text = "an integer of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
