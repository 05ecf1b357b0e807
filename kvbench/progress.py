"""Watch runs from their folders, on any machine that sees them: samples done per arm, rate, time left, failures.

    python -m kvbench.progress                      all runs below ./runs, until they are complete or Ctrl-C
    python -m kvbench.progress runs/qasper-*        some of them
    python -m kvbench.progress --once               one look; the last line is JSON for scripts

Exit codes: 0 done, 2 nothing to watch, 3 (with --once) some samples failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.live import Live

from kvbench import strict_json
from kvbench.commands import EXIT_FAILED_SAMPLES, command
from kvbench.errors import RecordError
from kvbench.results.progress_view import draw
from kvbench.results.progress_watch import RunProgress, RunWatch, find_runs


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    watches = {run: RunWatch(run) for run in find_runs(options.run)}
    if not watches:
        named = ", ".join(map(str, options.run))
        raise RecordError(f"no run folder at or below {named}: name a run folder, or output.root")
    if options.once:
        found = _look(watches)
        Console(width=None if sys.stdout.isatty() else 120).print(draw(found))
        print(strict_json.dumps([{**asdict(run), "complete": run.complete} for run in found], ensure_ascii=False))
        return EXIT_FAILED_SAMPLES if any(arm.n_failed for run in found for arm in run.arms) else 0
    try:
        with Live(draw(_look(watches)), console=Console(), refresh_per_second=4) as live:
            while True:
                found = _look(watches)
                live.update(draw(found))
                if all(run.complete for run in found):
                    break
                time.sleep(options.every)
                watches.update({run: RunWatch(run) for run in find_runs(options.run) if run not in watches})
    except KeyboardInterrupt:
        pass  # the way to end a look
    return 0


def _look(watches: dict[Path, RunWatch]) -> list[RunProgress]:
    now = time.time()
    return [watch.look(now) for watch in watches.values()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvbench.progress", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, nargs="*", default=[Path("runs")], help="run folders, or folders of them")
    parser.add_argument("--once", action="store_true", help="one look, then JSON as the last line")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between looks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
