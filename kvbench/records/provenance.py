"""Hashes of what makes an answer; a recorded one counts as done only if all three are those of today.

They are of its *question* (token ids, gold answer, limits), of its *model* (the weights' files and their dtype) and of
its *method* (class and source). What else can move a number is its environment: see `kvbench.records.environment`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from kvbench.errors import RecordError
from kvbench.metrics.base import scorer_versions
from kvbench.models.config import ModelConfig
from kvbench.models.load import PreparedModel
from kvbench.ops.dispatch import choose_kernels
from kvbench.paths import cache_folder
from kvbench.plan import Plan
from kvbench.records.environment import describe_environment
from kvbench.records.schema import HASHES
from kvbench.runtime.requests import Request
from kvbench.tasks.base import Sample

WEIGHT_FILES = ("*.safetensors", "config.json")
"""What of a checkpoint folder decides on logits; the tokenizer shows in the token ids."""
OPERATIONS = "kvbench.ops."


@dataclass(frozen=True)
class Making:
    """What this call would make its answers with: its id, the hashes, the environment (see `environment.py`)."""

    call: str
    questions: dict[int, str]  # by position of the sample
    model: str
    methods: dict[str, str]  # by arm
    environment: dict[str, Any]

    def accepts(self, record: dict[str, Any], position: int, unverified: bool) -> bool:
        """Whether a recorded answer is to the same question, by the same model and method; or `unverified` will do."""
        made = self.fields(position, record["arm"])
        return all(record[name] == made[name] for name in HASHES) or (unverified and not any(map(record.get, HASHES)))

    def fields(self, position: int, arm: str) -> dict[str, str]:
        """The fields of a record that say what made it."""
        hashes = self.questions[position], self.model, self.methods[arm]
        return {"call": self.call, **dict(zip(HASHES, hashes, strict=True))}


def making_of(plan: Plan, prepared: PreparedModel, samples: Sequence[Sample], jobs: Mapping[int, Request]) -> Making:
    """What a call would make its answers with; an error if the kernels asked for cannot run on this device."""
    kernels = choose_kernels(getattr(plan.engine, "kernels", "torch"), prepared.device)
    on_gpu = prepared.device.type == "cuda"
    return Making(
        call=uuid4().hex[:12],
        questions={index: question_sha256(job, samples[index]) for index, job in jobs.items()},
        model=model_sha256(plan.model, prepared),
        methods={arm.key: method_sha256(type(arm.policy)) for arm in plan.arms},
        environment={
            **describe_environment(),
            "device": torch.cuda.get_device_name(prepared.device) if on_gpu else f"CPU {platform.machine()}",
            "dtype": str(prepared.dtype).removeprefix("torch."), "engine": type(plan.engine).__name__,
            "kernels": kernels, "scorers": scorer_versions(),
        },
    )  # fmt: skip


def question_sha256(job: Request, sample: Sample) -> str:
    """Hash of all that is put to the model for one sample, and of what its answer is scored against."""
    asked = (job.input_ids, job.compress_at, job.stop_ids, job.max_new_tokens, job.min_new_tokens, job.seed)
    return _sha256([*asked, job.gold_ids, sample.answers, sample.all_classes, sample.metric])


def model_sha256(config: ModelConfig, prepared: PreparedModel) -> str:
    """Hash of a model's weights (the content of its files, or what they are drawn from) and of their dtype."""
    if prepared.folder is None:
        drawn = {name: value for name, value in vars(config).items() if name not in ("device", "device_map")}
        return _sha256([drawn, str(prepared.dtype)])
    files = sorted({file for pattern in WEIGHT_FILES for file in prepared.folder.glob(pattern)})
    return _sha256([[file.name, file_sha256(file)] for file in files] + [str(prepared.dtype)])


def file_sha256(file: Path) -> str:
    """SHA-256 of a file; remembered in the cache folder for as long as its size, times and inode stay the same."""
    try:
        found = file.resolve().stat()
        state = [str(file.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        note = cache_folder() / "sha256" / _sha256(state)
        if note.is_file() and len(known := note.read_text()) == 64:
            return known
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        note.parent.mkdir(exist_ok=True)
        scratch = note.with_suffix(f".{uuid4().hex}")
        scratch.write_text(digest)
        os.replace(scratch, note)
    except OSError as error:
        problem = f"{file} cannot be hashed ({error.strerror})"
        raise RecordError(f"{problem}: check its permissions and free space") from error
    return digest


def method_sha256(method: type) -> str:
    """Hash of a class's path, of the source of its modules and its bases', and of what those import.

    Followed are imports from the same package and of operations, those within functions (kernels) too: they are read
    from the source, so that equal sources have equal hashes whatever a process has loaded.
    """
    sources: dict[str, str] = {}
    waiting = [base.__module__ for base in method.__mro__ if base.__module__ not in ("builtins", "abc")]
    while waiting:
        name = waiting.pop()
        if name in sources or (source := _source(name)) is None:
            continue
        sources[name] = source
        package = name.rpartition(".")[0]
        for node in ast.walk(ast.parse(source)):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parent = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                imported = [parent, *(f"{parent}.{alias.name}" for alias in node.names)]
            waiting += [other for other in imported if other.startswith((f"{package}.", OPERATIONS))]
    return _sha256([f"{method.__module__}:{method.__qualname__}", *sorted(sources.items())])


def _source(name: str) -> str | None:
    """The source of a module; empty if it was made at a prompt or compiled, None if there is no such module."""
    if name in sys.modules:
        try:
            return inspect.getsource(sys.modules[name])
        except (OSError, TypeError):
            return ""
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a name in a module
        return None
    return None if found is None or found.origin is None else Path(found.origin).read_text(encoding="utf-8")


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
