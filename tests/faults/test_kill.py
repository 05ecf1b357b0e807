"""kill -9 at 50 random moments, the same command again each time: the tables are those of an undisturbed run."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path

from commands import RUN, Command, Server, complete_lines, rows, wait_until

from kvbench.records.read import read_prompts, read_records
from kvbench.results.cells import ExpectedArm, ExpectedColumn, TableSpec, build_table
from kvbench.results.summary import summarise
from kvbench.results.tables import write_table

KILLS = 50
SEED = 20261124
N_SAMPLES, N_ARMS = 8, 9
PHASES = ("start", "prompts", "decode", "records")


def written_tables(root: Path, target: Path) -> dict[str, bytes]:
    """All table files of the one run below `root`, by name, without what differs for good reason.

    That is, in the Markdown file, the lines that say how long it took and that name commit and versions.
    """
    (run,) = [path for path in root.iterdir() if (path / "records").is_dir()]
    arms = tuple(ExpectedArm(s.arm, s.method, s.budget, True) for s in summarise(read_records(run)))
    spec = TableSpec("faults", "tiny-random", "faults", arms, (ExpectedColumn("passkey", run, "none"),))
    files = {path.name: path.read_bytes() for path in write_table(build_table(spec), target)}
    lines = files["faults-tiny-random.md"].split(b"\n")
    lines = [line for line in lines if b", torch " not in line and b"together took" not in line]
    assert any(line.endswith(b"| ROUGE-L to full |") for line in lines)
    return {**files, "faults-tiny-random.md": b"\n".join(lines)}


def size(root: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in root.glob(pattern))


def counts(root: Path) -> Counter[str]:
    """What lies in the folder of runs: bytes, and lines that a reader may count on."""
    records, prompts = list(root.glob("*/records/*.jsonl")), list(root.glob("*/prompts.jsonl"))
    return Counter(
        call_bytes=size(root, "*/calls.jsonl"),
        prompt_bytes=size(root, "*/prompts.jsonl"),
        prompts=sum(len(complete_lines(path)) for path in prompts),
        record_bytes=size(root, "*/records/*.jsonl"),
        rows=sum(len(complete_lines(path)) for path in records),
        half_lines=sum(not path.read_bytes().endswith(b"\n") for path in records + prompts),
    )


def wait_for_the_moment(
    generator: random.Random, aim: str, command: Command, root: Path, usual_s: tuple[float, float]
) -> None:
    """Wait until the moment of the kill, random within the phase aimed at; the command may end before."""
    before = counts(root)
    if aim == "start":
        time.sleep(generator.uniform(0.0, 0.9 * usual_s[0]))
    elif aim == "prompts":
        wait_until(lambda: False, command)  # it kills itself: all are written within a millisecond or so
    elif aim == "decode":
        wait_until(lambda: size(root, "*/calls.jsonl") > before["call_bytes"], command)
        left = 1.0 - before["rows"] / (N_SAMPLES * N_ARMS)  # a resumed run takes less time
        time.sleep(generator.uniform(0.0, 0.6 * usual_s[1] * left))
    else:
        more = generator.randrange(4000)
        wait_until(lambda: size(root, "*/records/*.jsonl") > before["record_bytes"] + more, command)
        time.sleep(generator.uniform(0.0, 0.002))


def phase(before: Counter[str], after: Counter[str]) -> str:
    """What a killed command had been doing, told by what it left behind: a call is noted right before the prompts."""
    if after["call_bytes"] == before["call_bytes"]:
        return "start"
    if after["prompts"] < N_SAMPLES:
        return "prompts"
    grown = after["record_bytes"] > before["record_bytes"]
    return "records" if grown and (after["rows"] % N_ARMS or after["half_lines"]) else "decode"


def test_killed_at_50_random_moments_and_resumed(cli: Server, tmp_path: Path, record_property) -> None:
    undisturbed = tmp_path / "undisturbed"
    cli.run([*RUN, f"output.root={tmp_path / 'first'}"], tmp_path)  # reads files that the next ones find in memory
    began = time.monotonic()
    plain = cli.start([*RUN, f"output.root={undisturbed}"], tmp_path)
    assert wait_until(lambda: size(undisturbed, "*/calls.jsonl"), plain), plain.stderr
    called = time.monotonic()
    assert plain.wait() == 0, plain.stderr
    usual_s = called - began, time.monotonic() - called  # until the call is noted, and from there to the end
    expected_rows = rows(undisturbed)
    expected_files = written_tables(undisturbed, tmp_path / "tables")
    assert len(expected_rows) == N_SAMPLES * N_ARMS
    assert len(expected_files) == 4

    generator = random.Random(SEED)
    kills: Counter[str] = Counter(dict.fromkeys(PHASES, 0))
    n_runs = n_half_lines = 0
    lost: set[tuple[str, str, str]] = set()
    while kills.total() < KILLS or not all(kills.values()):
        root, seen = tmp_path / f"run{n_runs}", dict[tuple[str, str, str], dict]()
        while True:
            assert kills.total() < 4 * KILLS, kills
            before = counts(root)
            possible = [name for name in PHASES if name != "prompts" or before["prompts"] < N_SAMPLES]
            rarest = min(kills[name] for name in possible)
            aim = generator.choice([name for name in possible if kills[name] <= rarest + 9])
            going_on = kills.total() < KILLS or not all(kills.values())
            prompt = generator.randint(1, max(1, N_SAMPLES - before["prompts"]))
            limits = {"dies_at_open": ("prompts.jsonl", prompt)} if going_on and aim == "prompts" else {}
            command = cli.start([*RUN, f"output.root={root}"], tmp_path, **limits)
            if going_on:
                wait_for_the_moment(generator, aim, command, root, usual_s)
                command.send(signal.SIGKILL)
            code = command.wait()
            now = rows(root)
            lost |= {key for key, record in seen.items() if now.get(key) != record}
            seen = now
            if code != -signal.SIGKILL:  # it had ended before the kill came
                break
            after = counts(root)
            kills[phase(before, after)] += 1
            n_half_lines += after["half_lines"]
        assert code == 0, command.stderr
        n_runs += 1
        lost |= expected_rows.keys() - seen.keys()
        assert command.tables == plain.tables
        assert written_tables(root, tmp_path / f"tables{n_runs}") == expected_files
        (run,) = [path for path in root.iterdir() if path.is_dir()]
        assert len(read_prompts(run)) == N_SAMPLES
    by_phase = ", ".join(f"{name} {kills[name]}" for name in PHASES)
    record_property(
        "faults",
        f"kills survived: {kills.total()} ({by_phase}) over {n_runs} runs, half-written lines left behind: "
        f"{n_half_lines}, rows lost: {len(lost)}",
    )
    assert not lost
