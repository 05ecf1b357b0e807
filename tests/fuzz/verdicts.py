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
from typing import Any

from kvbench.commands import mendable

CASES = int(os.environ.get("KVBENCH_FUZZ_CASES", "200"))
SEED = int(os.environ.get("KVBENCH_FUZZ_SEED", "0"))
HANG_S = 20

QASPER = {"_id": "r1", "dataset": "qasper", "context": "Some text. " * 30, "input": "What is it?", "answers": ["text"],
          "all_classes": None, "length": 3, "language": "en"}  # fmt: skip
QUALITY = {"id": "z1", "input": "A document. " * 30 + "A question?", "output": "yes", "document_start_index": 0,
           "document_end_index": 360, "query_start_index": 360, "query_end_index": 371,
           "truncation_seperator": "... [cut] ..."}  # fmt: skip
NASTY: tuple[Any, ...] = (
    "abc", "", " ", "12", "Größe 语言 🙂", "\ud800", "a\0b", "a\nb", "\x1b[2J", "../x", "/", "/nowhere/x", "x" * 300,
    "~nobody/x", "nan", "true", "null", "${nope}", "???",
    -1, 0, 1, 2, 3, 7, 1000, 10**6, 10**9, 10**12, 2**63, 10**30, -(10**30), 10**4000,
    0.5, -0.5, 1.5, 2.0, 1e308, float("nan"), float("inf"), float("-inf"), None, True, False,
    [], [1], ["a"], [0.5, None], [[1]], [10**9], {}, {"a": 1}, {"_target_": "nope.Nope"}, {"_target_": "builtins.dict"},
)  # fmt: skip
"""Values that no field expects, and some that many do."""


class Hang(BaseException):
    """A case took so long that a user would think it hangs."""


class Tally:
    """How the cases of one fuzz ended, its generator, and a line for each case that is not fine."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.random = random.Random(f"{what}|{SEED}")
        self.ends: Counter[str] = Counter()
        self.broken: list[str] = []

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
                end = f"{type(error).__name__} in {traceback.extract_tb(error.__traceback__)[-1].name}"
                case = f"{case}: {' '.join(str(error).split())[:120]}"
        self.ends[end] += 1
        if end not in ("success", "refused"):
            self.broken.append(f"{end}: {case}")

    def check(self, record_property: Callable[[str, object], None]) -> None:
        """Report the counts, and fail if any case is not fine."""
        n_tried, succeeded, refused = self.ends.total(), self.ends["success"], self.ends["refused"]
        fine = f"{succeeded + refused} fine ({succeeded} succeeded, {refused} refused in one line)"
        record_property("faults", f"{self.what}: {n_tried} tried, {fine}, {len(self.broken)} not fine")
        assert not self.broken, "\n".join([f"{len(self.broken)} of {n_tried} cases", *self.broken])


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise Hang

    former = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def damaged(content: bytes, random: random.Random) -> bytes:
    """The content cut short, or with bytes flipped, replaced, doubled or left out."""
    found = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(found)) if random.random() < 0.5 else max(0, len(found) - 1 - random.randrange(120))
        kind = random.randrange(5)
        if kind == 0:
            found[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            found[at] = random.randrange(256)
        elif kind == 2:
            found[at : at + 4] = random.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"))
        elif kind == 3:
            found[at:at] = found[at : at + random.randrange(40)]
        else:
            del found[at : at + random.randrange(1, 40)]
        if not found:
            return b""
    return bytes(found)
