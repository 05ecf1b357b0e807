"""The environment an answer was made in (versions, device, commit), and whether answers of several may be one table.

Bug reports paste it: `python -m kvbench.records.environment`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvbench import __version__
from kvbench.commands import strict_json
from kvbench.errors import RecordError

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "accelerate", "datasets", "hydra-core", "numpy", "pandas", "scipy",
    "rouge", "rouge-score", "rouge-chinese", "fuzzywuzzy", "python-Levenshtein", "jieba", "gguf",
)  # fmt: skip
COMPARED = ("kvbench", "commit", "device", "engine", "kernels", "packages")
"""What of an environment can move a number although question, model and method are the same."""

UNVERIFIED = "from before records said what made them"
Environments = list[tuple[int, dict[str, Any]]]
"""Number of answers and their environment's fields of `COMPARED`; no fields for answers that do not say."""


def describe_environment() -> dict[str, Any]:
    """Versions of everything that can move a number (None if not installed), device, commit of a source checkout."""
    return {
        "kvbench": __version__, "commit": _commit(), "python": platform.python_version(),
        "platform": platform.platform(), "processor": platform.machine(), "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda, "packages": {name: _version(name) for name in PACKAGES},
    }  # fmt: skip


def environments(records: Iterable[Mapping[str, Any]], calls: Iterable[Mapping[str, Any]]) -> Environments:
    """The environments that records were made in, by `calls` (see `read_calls`); the one of most answers first."""
    by_id = {call.get("id"): call["environment"] for call in calls if isinstance(call.get("environment"), dict)}
    counts: Counter[str] = Counter()
    for record in records:
        environment = by_id.get(record["call"])
        fields = {} if environment is None else {name: environment.get(name) for name in COMPARED}
        counts[json.dumps(fields, sort_keys=True)] += 1
    return [(n, json.loads(key)) for key, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def mixture(found: Environments) -> str:
    """How environments differ, in one line; empty if there is one at most."""
    if len(found) < 2:
        return ""
    flat = [(n, {**fields, **(fields.get("packages") or {}), "packages": None}) for n, fields in found if fields]
    names = sorted({name for _, fields in flat for name in fields})
    differing = [name for name in names if len({str(fields.get(name)) for _, fields in flat}) > 1]
    said = [(n, ", ".join(f"{name} {fields.get(name)}" for name in differing) or "that say it") for n, fields in flat]
    said += [(n, UNVERIFIED) for n, fields in found if not fields]
    return "; ".join(f"{n} answers: {text}" for n, text in said)


def doubts(records: Sequence[Mapping[str, Any]], calls: Iterable[Mapping[str, Any]], n_left_out: int) -> list[str]:
    """What a reader of a table has to know of its records' making, a line each; `n_left_out` is of `read_answers`."""
    found = environments(records, calls)
    lines = []
    if text := mixture(found):
        lines.append(f"Answers of several environments stand side by side: {text}.")
    if n_unverified := sum(n for n, fields in found if not fields):
        lines.append(f"{n_unverified} of {len(records)} answers are unverified: {UNVERIFIED}.")
    if n_left_out:
        lines.append(f"{n_left_out} answers of an earlier text, model or method are left out.")
    return lines


def refuse_mixture(found: Environments, where: object, remedy: str) -> None:
    """Refuse answers of several environments in one place; `remedy` is how to say that they may be one table."""
    if text := mixture(found):
        raise RecordError(f"{where} would mix answers of several environments ({text}): {remedy}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    words = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    print(strict_json(describe_environment(), indent=2))
