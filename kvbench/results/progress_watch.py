"""Follow a run folder while any number of processes append to it; every look reads only what is new.

A watcher needs nothing but the folder, so it can run on any machine that sees it. Times are those of the machines that
wrote; clocks that differ by minutes make the rate wrong by as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.records.read import consistent, keep_newest, parsed, parts, read_calls
from kvbench.records.schema import HASHES, checked

RATE_WINDOW_S = 600.0
"""The rate is that of the last so many seconds."""

Key = tuple[str, str, str]
"""(dataset, sample, arm)."""

KEPT = ("dataset", "sample", "arm", "status", "reason", "recorded_at", *HASHES)
"""Fields of a record that are remembered."""


@dataclass(frozen=True)
class ArmProgress:
    """How far one arm is.

    Attributes:
        arm: arm key.
        n_done: samples recorded, failed ones included.
        n_failed: of them failed.
        n_samples: samples of the task, as far as any call has said.
    """

    arm: str
    n_done: int
    n_failed: int
    n_samples: int


@dataclass(frozen=True)
class CallProgress:
    """How far the latest call of one shard is.

    Attributes:
        shard: "2/8", or "all" without shards.
        host: the machine it runs on.
        n_done: answers it has recorded.
        n_answers: answers it set out to record.
        last_s: seconds since its last answer, or since its start.
    """

    shard: str
    host: str
    n_done: int
    n_answers: int
    last_s: float


@dataclass(frozen=True)
class RunProgress:
    """How far a run is.

    Attributes:
        name: name of the run folder.
        arms: per arm, sorted by key.
        calls: the latest call of each shard.
        samples_per_minute: over the last `RATE_WINDOW_S`; 0 if nothing was recorded in it.
        left_s: seconds until the last arm is complete at that rate; None if unknown, 0 if it is.
        failures: the latest failures, as (sample, arm, reason).
    """

    name: str
    arms: tuple[ArmProgress, ...]
    calls: tuple[CallProgress, ...]
    samples_per_minute: float
    left_s: float | None
    failures: tuple[tuple[str, str, str], ...]

    @property
    def complete(self) -> bool:
        """Whether every arm has all samples."""
        return bool(self.arms) and all(arm.n_done >= arm.n_samples for arm in self.arms)


@dataclass
class RunWatch:
    """One run folder, and what has been read of it so far."""

    run: Path
    _offsets: dict[Path, int] = field(default_factory=dict)
    _found: dict[Key, dict[str, Any]] = field(default_factory=dict)
    _times: dict[str, list[float]] = field(default_factory=dict)

    def look(self, now: float) -> RunProgress:
        """Read what is new.

        Args:
            now: seconds since 1970.

        Returns:
            How far the run is.
        """
        for part in parts(self.run):
            shard = "all" if part == self.run else part.name.replace("-of-", "/")
            for path in sorted((part / "records").glob("*.jsonl")):
                for record in self._new_records(path):
                    self._take(shard, record)
        calls = read_calls(self.run)
        latest = {call.get("shard") or "all": call for call in calls}
        records = consistent(self._found.values())
        arms = _arms(calls, records)
        answers_per_s = self._rate(latest, now)
        n_left = sum(max(0, arm.n_samples - arm.n_done) for arm in arms)
        left_s = 0.0 if n_left == 0 else n_left / answers_per_s if answers_per_s else None
        n_arms = max((len(call["arms"]) for call in latest.values()), default=1)
        return RunProgress(
            name=self.run.name,
            arms=arms,
            calls=tuple(self._call(shard, call, now) for shard, call in sorted(latest.items(), key=_by_number)),
            samples_per_minute=60 * answers_per_s / max(1, n_arms),
            left_s=left_s,
            failures=tuple((r["sample"], r["arm"], r["reason"]) for r in records if r["status"] != "ok")[-3:],
        )

    def _new_records(self, path: Path) -> Iterator[dict[str, Any]]:
        """Records in the lines completed since the last look."""
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offsets[path] = self._offsets.get(path, 0) + len(whole)
        for line in whole.split(b"\n"):
            record = checked(parsed(line))
            if record is not None:
                yield {name: record[name] for name in KEPT}

    def _take(self, shard: str, record: dict[str, Any]) -> None:
        self._times.setdefault(shard, []).append(record["recorded_at"])
        keep_newest(self._found, record)

    def _rate(self, latest: dict[str, dict[str, Any]], now: float) -> float:
        """Answers per second over the window, or since the calls began if that is less."""
        begun = min((float(call["started_at"]) for call in latest.values()), default=now)
        start = max(now - RATE_WINDOW_S, begun)
        recent = sum(time > start for times in self._times.values() for time in times)
        return recent / (now - start) if now > start else 0.0

    def _call(self, shard: str, call: dict[str, Any], now: float) -> CallProgress:
        started = float(call["started_at"])
        times = [time for time in self._times.get(shard, []) if time >= started]
        n_answers = int(call["missing_answers"])
        return CallProgress(shard, str(call.get("host", "")), len(times), n_answers, now - max([started, *times]))


def _arms(calls: list[dict[str, Any]], records: list[dict[str, Any]]) -> tuple[ArmProgress, ...]:
    n_samples: dict[str, int] = {}
    for call in calls:
        for arm in call["arms"]:
            n_samples[arm] = max(n_samples.get(arm, 0), int(call["task_samples"]))
    done: dict[str, list[str]] = {}
    for record in records:
        done.setdefault(record["arm"], []).append(record["status"])
    return tuple(
        ArmProgress(
            arm,
            len(done.get(arm, [])),
            sum(status != "ok" for status in done.get(arm, [])),
            max(n_samples.get(arm, 0), len(done.get(arm, []))),
        )
        for arm in sorted({*n_samples, *done})
    )


def find_runs(folders: list[Path]) -> list[Path]:
    """Run folders among `folders` and directly below them, sorted."""
    found = [run for folder in folders for run in [folder, *sorted(folder.glob("*"))] if (run / "records").is_dir()]
    return list(dict.fromkeys(found))


def _by_number(item: tuple[str, dict[str, Any]]) -> tuple[int, int]:
    number, _, count = item[0].partition("/")
    return (int(count), int(number)) if number.isdigit() and count.isdigit() else (0, 0)
