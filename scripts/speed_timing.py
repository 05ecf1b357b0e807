"""How `bench_speed.py` takes times, and the shape of one line of its table.

Works that are compared are timed in turns, so that a drifting clock or a neighbour's load hits all of them alike; the
device is idle at both ends of every time taken.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Row:
    """One line of the table.

    Attributes:
        number: the target's number.
        quantity: what is measured.
        case: at which size.
        seconds: raw times by what was timed, seconds; all lists of one length.
        formula: the row's value as a function of one time of each kind.
        target: the limit, or None where none was set.
        at_least: whether the value has to reach the target instead of staying below it.
        must_run: whether the target is met by not running out of memory.
        failed: whether it could not be measured, for another reason than the memory's end.
        peak_bytes: peak memory while it was measured: of the device on a GPU, of the process on a CPU.
        details: anything else worth keeping.
        note: a remark for the table.
    """

    number: int
    quantity: str
    case: str
    seconds: dict[str, list[float]]
    formula: Callable[[Mapping[str, float]], float]
    target: float | None = None
    at_least: bool = False
    must_run: bool = False
    failed: bool = False
    peak_bytes: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def record(self) -> dict[str, Any]:
        """The row as plain types: value of the medians, spread of the value over the repeats, raw times."""
        medians = {name: statistics.median(raw) for name, raw in self.seconds.items()}
        value = self.formula(medians)
        repeats = [dict(zip(self.seconds, times, strict=True)) for times in zip(*self.seconds.values(), strict=True)]
        spread = quantiles([self.formula(times) for times in repeats]) if repeats else None
        met = math.isfinite(value) if self.must_run else None
        if self.target is not None and math.isfinite(value):
            met = value >= self.target if self.at_least else value <= self.target
        return {
            "row": self.number,
            "quantity": self.quantity,
            "case": self.case,
            "value": value if math.isfinite(value) else None,
            "spread": spread if spread is None or all(map(math.isfinite, spread.values())) else None,
            "target": "runs" if self.must_run else self.target,
            "direction": ">=" if self.at_least else "<=",
            "met": met,
            "seconds": {name: {**quantiles(raw), "raw": raw} for name, raw in self.seconds.items()},
            "failed": self.failed,
            "peak_bytes": self.peak_bytes,
            "details": self.details,
            "note": self.note,
        }


def say(message: str) -> None:
    """Tell the person what goes on, beside the output proper."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, interpolated linearly."""
    points = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    return dict(zip(("p20", "p50", "p80"), points.tolist(), strict=True))


def take_turns(
    works: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Time works in turns.

    Args:
        works: what to time.
        device: synchronised before and after each time.
        repeats: times to take of each work after one that does not count.

    Returns:
        The uncounted first times and the counted ones, seconds.
    """
    on_gpu = device.type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            if on_gpu:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: raw[0] for name, raw in seconds.items()}, {name: raw[1:] for name, raw in seconds.items()}


def peak_bytes(device: torch.device) -> int:
    """Peak memory: allocated on the GPU since the last reset, or of this process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: torch.device) -> None:
    """Start counting the GPU's peak memory anew; a process's peak on a CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def copy_bandwidth(device: torch.device) -> tuple[float, list[float]]:
    """Bytes per second of a large copy, read and write both counted, and the raw times."""
    size = (1 << 31) if device.type == "cuda" else (1 << 27)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    _, seconds = take_turns({"copy": lambda: target.copy_(source)}, device, repeats=10)
    return 2 * size / statistics.median(seconds["copy"]), seconds["copy"]
