r"""Measure the paper's observations on a model, and draw what was measured.

python -m kvbench.analysis measure --model smollm2-135m --task passkey mini longbench/qasper --limit 4 \
        --override data.root=DIR data.official=DIR2 model.max_prompt_tokens=1500
python -m kvbench.analysis draw        # keys, compression, uniformity: CSV and figures from the measurements alone
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbench import strict_json
from kvbench.commands import command


def measure(model: str, tasks: Sequence[str], limit: int, overrides: Sequence[str], folder: Path) -> Path:
    """Measure a model on the first samples of some tasks and write `<model>.json`; returns the file.

    Raises:
        KvbenchError: if the model or data cannot be had.
    """
    from kvbench.experiments import composed
    from kvbench.models.load import load_model
    from kvbench.paths import file_stem
    from kvbench.plan import build_plan
    from kvbench.records.environment import describe_environment
    from kvbench.results.analysis import THRESHOLDS, WINDOW_QUERIES, measure_samples

    plans = [
        build_plan(composed([f"model={model}", f"task={task}", f"task.limit={limit}", *overrides])) for task in tasks
    ]
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before it is measured
    loaded = load_model(plans[0].model)
    measured: list[dict[str, Any]] = []
    for plan in plans:
        for row in measure_samples(loaded, plan.task.samples()):
            print(f"{row['dataset']} {row['sample']}: {row['n_tokens']} tokens", file=sys.stderr)
            measured.append(row)
    environment = describe_environment()
    document = {
        "model": loaded.name, "dtype": str(loaded.dtype).removeprefix("torch."), "thresholds": list(THRESHOLDS),
        "window_queries": WINDOW_QUERIES, "kvbench": environment["kvbench"], "commit": environment["commit"],
        "torch": environment["packages"]["torch"], "transformers": environment["packages"]["transformers"],
        "samples": measured,
    }  # fmt: skip
    path = folder / f"{file_stem(loaded.name)}.json"
    path.write_text(strict_json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kvbench.analysis", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("results/analysis"), help="measurements and figures")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure", help="prefill samples and measure every layer")
    command.add_argument("--model", default="smollm2-135m", help="an option of configs/model")
    command.add_argument("--task", nargs="+", default=["passkey", "fewshot", "niah", "mini"], help="of configs/task")
    command.add_argument("--limit", type=int, default=4, help="samples of each task")
    command.add_argument("--override", nargs="*", default=[], help="further settings, e.g. data.root=DIR")
    commands.add_parser("draw", help="CSV and figures from the measurements alone")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        print(measure(options.model, options.task, options.limit, options.override, options.folder))
    else:
        from kvbench.results.analysis import write_all

        for path in write_all(options.folder):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
