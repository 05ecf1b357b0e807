"""The live view of `kvbench.progress`: what a `RunProgress` looks like in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvbench.errors import printable
from kvbench.results.progress_watch import RunProgress

QUIET_S = 300.0
"""A call whose last answer is older is shown in yellow: it may be gone."""


def draw(runs: Sequence[RunProgress]) -> RenderableType:
    """All runs, one below the other."""
    return Group(*(part for run in runs for part in _run(run)))


def _run(run: RunProgress) -> list[RenderableType]:
    arms = Table(title=run.name, title_justify="left", box=None, padding=(0, 1))
    arms.add_column("arm", overflow="fold")
    for heading in ("samples", "failed", ""):
        arms.add_column(heading, justify="right", no_wrap=True)
    for arm in run.arms:
        failed = Text(str(arm.n_failed), style="red" if arm.n_failed else "")
        bar = ProgressBar(total=max(1, arm.n_samples), completed=arm.n_done, width=24)
        arms.add_row(arm.arm, f"{arm.n_done}/{arm.n_samples}", failed, bar)
    calls = Table(box=None, padding=(0, 1))
    for heading in ("shard", "host", "answers", "last one"):
        calls.add_column(heading, justify="left" if heading == "host" else "right")
    for call in run.calls:
        quiet = call.last_s > QUIET_S and call.n_done < call.n_answers
        ago = Text(f"{_time(call.last_s)} ago", style="yellow" if quiet else "")
        calls.add_row(call.shard, printable(call.host), f"{call.n_done}/{call.n_answers}", ago)
    left = "complete" if run.complete else "time left " + ("unknown" if run.left_s is None else _time(run.left_s))
    shown: list[RenderableType] = [arms, calls, Text(f" {run.samples_per_minute:.2f} samples a minute, {left}")]
    failures = (f" failed: {sample} for {key}: {reason}" for sample, key, reason in run.failures)
    return [*shown, *(Text(printable(line), style="red") for line in failures), Text("")]


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))
