"""The figures of a run where people look: a line of CSV for each run, and W&B, MLflow or TensorBoard with `log=`.

`runs.csv` lies beside the folder of run folders and has one line a run, the newest call's: what was run, then
`ARM/FIGURE` for every arm. `log=wandb`, `mlflow`, `tensorboard` send the same figures there once the run is done;
`log=module:function`, or an entry point in the group `kvbench.trackers`, names a tracker of one's own: a function of
one `RunFigures`. A tracker's package is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from kvbench.errors import ConfigError, RecordError, nearest

GROUP = "kvbench.trackers"
PROJECT = "kvbench"  # of W&B, and MLflow's experiment
FIGURES = ("n", "n_failed", "score", "gold_nll", "kl", "budget_measured", "cache_bytes")
"""Of each arm, as in the last line of standard output."""


@dataclass(frozen=True)
class RunFigures:
    """What a tracker is told."""

    folder: Path  # the run folder; its name is the run's
    facts: Mapping[str, Any]  # model, task, protocol, samples, answers new and reused, seconds, time of the end
    settings: Mapping[str, Any]  # the composed configuration
    figures: Mapping[str, float]  # "h2o@0.5/score" and the like

    @classmethod
    def of(
        cls, folder: Path, facts: Mapping[str, Any], settings: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]
    ) -> RunFigures:
        """From the arms of a run's JSON document; what was not measured is left out."""
        found = {f"{arm['arm']}/{name}": arm[name] for arm in arms for name in FIGURES if arm.get(name) is not None}
        return cls(folder, facts, settings, found)


Tracker = Callable[[RunFigures], None]


def write_csv(run: RunFigures) -> Path:
    """Put the run's line into the CSV file beside the folder of run folders, in place of an earlier one; its path."""
    root = run.folder.resolve().parent
    path = root.with_name(f"{root.name}.csv")
    try:
        _put_line(path, root / ".csv.lock", run)
    except OSError as error:
        raise RecordError(f"{path} cannot be written ({error.strerror}): leave it out with output.csv=false") from error
    return path


def _put_line(path: Path, lock: Path, run: RunFigures) -> None:
    import pandas as pd

    row = pd.DataFrame([{"run": run.folder.name, **run.facts, **run.figures}], dtype=object)
    with FileLock(lock):
        if path.is_file():
            known = pd.read_csv(path, dtype=object, encoding="utf-8")
            if "run" not in known:
                raise RecordError(f"{path} has no column run: move it away, or set output.csv=false")
            row = pd.concat([known[known["run"] != run.folder.name], row])
        temporary = path.with_name(f".{path.name}.partial")
        row.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)


def to_wandb(run: RunFigures) -> None:
    """One W&B run for each run folder, gone on with by later calls."""
    import wandb

    name = run.folder.name
    with wandb.init(
        project=PROJECT, name=name, id=re.sub(r"\W", "-", name), resume="allow", config={**run.settings}
    ) as tracked:
        tracked.log({**run.figures})
        tracked.summary.update({**run.facts})


def to_mlflow(run: RunFigures) -> None:
    """One MLflow run for each call, in the experiment "kvbench"; characters that MLflow refuses become "_"."""
    import mlflow

    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=run.folder.name):
        mlflow.log_params({name: str(value)[:500] for name, value in {**_flat(run.settings), **run.facts}.items()})
        mlflow.log_metrics({re.sub(r"[^\w./ -]", "_", name): float(value) for name, value in run.figures.items()})


def to_tensorboard(run: RunFigures) -> None:
    """Scalars and the configuration as text, in the folder `tensorboard` of the run folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(run.folder / "tensorboard"))
    for name, value in run.figures.items():
        writer.add_scalar(name, value)
    writer.add_text("settings", json.dumps(run.settings, indent=2, default=str, allow_nan=False))
    writer.close()


TRACKERS: dict[str, Tracker] = {"wandb": to_wandb, "mlflow": to_mlflow, "tensorboard": to_tensorboard}
"""By the name of the package that each needs."""


def check_tracker(name: str | None) -> None:
    """Refuse (`ConfigError`) a tracker that is unknown or whose package is not installed; nothing is imported."""
    if name is None or ":" in str(name):
        return
    known = [*TRACKERS, *(entry_point.name for entry_point in entry_points(group=GROUP))]
    if name not in known:
        said = nearest(str(name), known) or f" choose one of {', '.join(known)}, or module:function"
        raise ConfigError(f"log={name} is unknown:{said}")
    if name in TRACKERS and find_spec(name) is None:
        raise ConfigError(f"log={name} needs the package {name}, which is not installed: pip install {name}")


def track(name: str, run: RunFigures) -> None:
    """Send a run's figures to a tracker; whatever it raises ends in one line, for the records are complete."""
    check_tracker(name)
    try:
        _tracker(name)(run)
    except Exception as error:  # the tracker's service, network or settings
        problem = f"log={name} failed ({type(error).__name__}: {error})"
        raise RecordError(f"{problem}: the records are complete, the same command logs again") from error


def _tracker(name: str) -> Tracker:
    if name in TRACKERS:
        return TRACKERS[name]
    module, colon, attribute = name.partition(":")
    if colon:
        made: Tracker = getattr(importlib.import_module(module), attribute)
        return made
    (found,) = entry_points(group=GROUP, name=name)
    loaded: Tracker = found.load()
    return loaded


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return found
