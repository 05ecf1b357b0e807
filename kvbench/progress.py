"""Watch runs from their folders, on any machine that sees them: samples done per arm, rate, time left, failures.

    python -m kvbench.progress                      all runs below ./runs, until they are complete or Ctrl-C
    python -m kvbench.progress runs/qasper-*        some of them
    python -m kvbench.progress --once               one look; the last line is JSON for scripts

Exit codes: 0 done, 2 nothing to watch, 3 (with --once) some samples failed.

Any number of processes may append while it looks, and every look reads only what is new. Times are those of the
machines that wrote; clocks that differ by minutes make the rate wrong by as much.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvbench.arguments import parse
from kvbench.commands import EXIT_FAILED_SAMPLES, command, strict_json
from kvbench.errors import RecordError, printable
from kvbench.records.read import consistent, keep_newest, parsed, parts, read_calls
from kvbench.records.schema import HASHES, checked

RATE_WINDOW_S = 600.0  # the rate is that of the last so many seconds
QUIET_S = 300.0  # a call whose last answer is older is shown in yellow: it may be gone
KEPT = ("dataset", "sample", "arm", "status", "reason", "recorded_at", *HASHES)  # fields that are remembered
Progress = dict[str, Any]
"""How far a run is: per arm the samples recorded (failed ones included), failed, and of the task as far as any call has
said; per shard its latest call's answers recorded, answers it set out to record, and seconds since its last answer or
its start; samples a minute over the window; seconds until the last arm is complete at that rate, None if unknown; the
latest failures as sample, arm, reason; whether every arm has all samples."""


@dataclass
class RunWatch:
    """One run folder, and what has been read of it so far."""

    run: Path
    _offsets: dict[Path, int] = field(default_factory=dict)
    _found: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    _times: dict[str, list[float]] = field(default_factory=dict)

    def look(self, now: float) -> Progress:
        """Read what is new; how far the run is at `now`, seconds since 1970."""
        for part in parts(self.run):
            shard = "all" if part == self.run else part.name.replace("-of-", "/")
            for record in (r for path in sorted((part / "records").glob("*.jsonl")) for r in self._new_records(path)):
                self._times.setdefault(shard, []).append(record["recorded_at"])
                keep_newest(self._found, record)
        calls, records = read_calls(self.run), consistent(self._found.values())
        latest = {call.get("shard") or "all": call for call in calls}
        arms = _arms(calls, records)
        answers_per_s = self._rate(latest, now)
        n_left = sum(max(0, arm["n_samples"] - arm["n_done"]) for arm in arms)
        n_arms = max((len(call["arms"]) for call in latest.values()), default=1)
        return {
            "name": self.run.name, "arms": arms,
            "calls": [self._call(shard, call, now) for shard, call in sorted(latest.items(), key=_by_number)],
            "samples_per_minute": 60 * answers_per_s / max(1, n_arms),
            "left_s": 0.0 if n_left == 0 else n_left / answers_per_s if answers_per_s else None,
            "failures": [[r["sample"], r["arm"], r["reason"]] for r in records if r["status"] != "ok"][-3:],
            "complete": bool(arms) and n_left == 0,
        }  # fmt: skip

    def _new_records(self, path: Path) -> Iterator[dict[str, Any]]:
        """Records in the lines completed since the last look."""
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            whole = b"".join(file.read().rpartition(b"\n")[:2])
        self._offsets[path] = self._offsets.get(path, 0) + len(whole)
        for line in whole.split(b"\n"):
            if record := checked(parsed(line)):
                yield {name: record[name] for name in KEPT}

    def _rate(self, latest: dict[str, dict[str, Any]], now: float) -> float:
        """Answers per second over the window, or since the calls began if that is less."""
        begun = min((float(call["started_at"]) for call in latest.values()), default=now)
        start = max(now - RATE_WINDOW_S, begun)
        recent = sum(time > start for times in self._times.values() for time in times)
        return recent / (now - start) if now > start else 0.0

    def _call(self, shard: str, call: dict[str, Any], now: float) -> dict[str, Any]:
        started, host, n_answers = float(call["started_at"]), str(call.get("host", "")), int(call["missing_answers"])
        times = [time for time in self._times.get(shard, []) if time >= started]
        done = {"n_done": len(times), "n_answers": n_answers, "last_s": now - max([started, *times])}
        return {"shard": shard, "host": host, **done}


def _arms(calls: list[dict[str, Any]], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    n_samples: dict[str, int] = {}
    for call in calls:
        for arm in call["arms"]:
            n_samples[arm] = max(n_samples.get(arm, 0), int(call["task_samples"]))
    done: dict[str, list[str]] = {arm: [] for arm in n_samples}
    for record in records:
        done.setdefault(record["arm"], []).append(record["status"])
    return [
        {"arm": arm, "n_done": len(own), "n_failed": sum(status != "ok" for status in own),
         "n_samples": max(n_samples.get(arm, 0), len(own))}
        for arm, own in sorted(done.items())
    ]  # fmt: skip


def _by_number(item: tuple[str, dict[str, Any]]) -> tuple[int, int]:
    number, _, count = item[0].partition("/")
    return (int(count), int(number)) if number.isdigit() and count.isdigit() else (0, 0)


def find_runs(folders: list[Path]) -> list[Path]:
    """Run folders among `folders` and directly below them, sorted."""
    found = [run for folder in folders for run in [folder, *sorted(folder.glob("*"))] if (run / "records").is_dir()]
    return list(dict.fromkeys(found))


def _drawn(run: Progress) -> list[RenderableType]:
    arms = Table(title=run["name"], title_justify="left", box=None, padding=(0, 1))
    arms.add_column("arm", overflow="fold")
    for heading in ("samples", "failed", ""):
        arms.add_column(heading, justify="right", no_wrap=True)
    for arm in run["arms"]:
        failed = Text(str(arm["n_failed"]), style="red" if arm["n_failed"] else "")
        bar = ProgressBar(total=max(1, arm["n_samples"]), completed=arm["n_done"], width=24)
        arms.add_row(arm["arm"], f"{arm['n_done']}/{arm['n_samples']}", failed, bar)
    calls = Table(box=None, padding=(0, 1))
    for heading in ("shard", "host", "answers", "last one"):
        calls.add_column(heading, justify="left" if heading == "host" else "right")
    for call in run["calls"]:
        quiet = call["last_s"] > QUIET_S and call["n_done"] < call["n_answers"]
        ago = Text(f"{_time(call['last_s'])} ago", style="yellow" if quiet else "")
        calls.add_row(call["shard"], printable(call["host"]), f"{call['n_done']}/{call['n_answers']}", ago)
    left = "time left unknown" if run["left_s"] is None else f"time left {_time(run['left_s'])}"
    rate = Text(f" {run['samples_per_minute']:.2f} samples a minute, {'complete' if run['complete'] else left}")
    failures = (f" failed: {sample} for {key}: {reason}" for sample, key, reason in run["failures"])
    return [arms, calls, rate, *(Text(printable(line), style="red") for line in failures), Text("")]


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))


def draw(runs: Sequence[Progress]) -> RenderableType:
    """What all runs look like in a terminal, one below the other."""
    return Group(*(part for run in runs for part in _drawn(run)))


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse("progress", arguments)
    watches = {run: RunWatch(run) for run in find_runs(options.run)}
    if not watches:
        named = ", ".join(map(str, options.run))
        raise RecordError(f"no run folder at or below {named}: name a run folder, or output.root")

    def look() -> list[Progress]:
        now = time.time()
        return [watch.look(now) for watch in watches.values()]

    if options.once:
        found = look()
        Console(width=None if sys.stdout.isatty() else 120).print(draw(found))
        print(strict_json(found, ensure_ascii=False))
        return EXIT_FAILED_SAMPLES if any(arm["n_failed"] for run in found for arm in run["arms"]) else 0
    try:
        with Live(draw(look()), console=Console(), refresh_per_second=4) as live:
            while True:
                found = look()
                live.update(draw(found))
                if all(run["complete"] for run in found):
                    break
                time.sleep(options.every)
                watches.update({run: RunWatch(run) for run in find_runs(options.run) if run not in watches})
    except KeyboardInterrupt:
        pass  # the way to end a look
    return 0


if __name__ == "__main__":
    sys.exit(main())
