"""Run a plan: ask every sample of every arm that is not recorded yet, score the answers, append the records."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvbench.commands import interruptible
from kvbench.errors import DataError, failure_reason, printable
from kvbench.metrics import get_metric
from kvbench.metrics.base import check_environment
from kvbench.models.load import LoadedModel, PreparedModel, load_weights, prepare_model
from kvbench.models.prompt import EncodedPrompt, encode_demands, encode_sample, encode_text
from kvbench.plan import Plan
from kvbench.records.environment import environments, refuse_mixture
from kvbench.records.folder import RunFolder
from kvbench.records.provenance import Making, making_of
from kvbench.records.read import read_calls
from kvbench.records.schema import Record
from kvbench.runtime.requests import Answer, Arm, Request, SampleFailure
from kvbench.tasks.base import Sample

_SAME_IN_RECORDS = (
    "token_ids", "finish", "compressed_tokens", "slots_per_layer", "full_slots", "cache_bytes", "full_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What running one plan did: a value that can be pickled, since a worker cannot reach the process that sent it."""

    error: str = ""  # one line if the job was refused; the fields below then mean nothing
    folder: Path = Path()  # the run folder
    model: str = ""
    task: str = ""
    compress: str = ""
    shard: str | None = None  # "2/8", or None without shards
    table: bool = True  # whether one is wanted
    gate: float = 60.0  # what the table greys: see `kvbench.results.summary.fails_gate`
    limits: dict[str, int] = field(default_factory=dict)  # of samples, by the setting's name
    settings: dict[str, Any] = field(default_factory=dict)  # the composed configuration
    samples: dict[int, tuple[str, str]] = field(default_factory=dict)  # (dataset, id) by position; the shard's only
    n_failed: int = 0  # samples that failed in this call
    n_new: int = 0  # answers (of one sample and arm) that this call computed
    n_reused: int = 0  # answers that were recorded before
    mix_environments: bool = False
    started_at: float = 0.0  # seconds since 1970
    ended_at: float = 0.0


def run_plan(plan: Plan, console: Console) -> Outcome:
    """Compute what is missing, and what was made by another question, model or method; append it to the run folder.

    KeyboardInterrupt if Ctrl-C ended the run before its last sample. Whatever is raised, what was recorded stays.
    """
    started_at = time.time()
    with console.status("reading the prompts") as status:
        prepare = cache(lambda: prepare_model(plan.model, report=status.update))
        samples = plan.task.samples(lambda: prepare().tokenizer)
        if not samples:
            raise DataError(f"task {plan.task.name} has no samples: check its parameters and its data files")
        check_environment()  # what cannot be scored ends the run before a weight is loaded
        for sample in samples:
            get_metric(sample.metric)
        if plan.max_new_tokens:
            samples = [replace(sample, max_new_tokens=plan.max_new_tokens) for sample in samples]
        positions = range(len(samples)) if plan.shard is None else plan.shard.positions(samples)
        prepared = prepare()
        encoded = {index: encode_sample(samples[index], prepared) for index in positions}
        requests = {index: _request(plan, prepared, index, samples[index], prompt) for index, prompt in encoded.items()}
        status.update("hashing the weights")
        making = making_of(plan, prepared, samples, requests)
    shard = None if plan.shard is None else plan.shard.folder_name
    folder = RunFolder(plan.output_root, f"{plan.task.name}-{plan.model.name}", plan.identity, shard)
    folder.describe(plan.config)
    todo = _missing(plan, samples, making, folder, console)
    failed: set[int] = set()
    if todo:
        folder.note_call(_call(plan, len(samples), todo, making))
        folder.keep_prompts(
            {"dataset": samples[i].dataset, "sample": samples[i].id, "prompt": encoded[i].prompt_text} for i in todo
        )
        with console.status("loading the model") as status:
            loaded = load_weights(plan.model, prepared, report=status.update)
        wanted = [replace(requests[index], arms=arms) for index, arms in todo.items()]
        waiting = {index: len(arms) for index, arms in todo.items()}
        with _progress(console, len(wanted), plan) as advance, interruptible() as interrupts:
            for result in plan.engine.run(loaded, wanted, interrupts.asked):
                sample, prompt = samples[result.index], encoded[result.index]
                if isinstance(result, SampleFailure):
                    same: dict[str, Any] = {"status": "failed", "reason": result.reason}
                    records = [Record(**_identity(sample, arm, result.index, making), **same) for arm in result.arms]
                else:
                    records = [_scored(loaded, sample, prompt, result, making)]
                with interrupts.held():
                    folder.append(records)
                if broken := [record for record in records if record.status == "failed"]:
                    failed.add(result.index)
                    arms = ", ".join(record.arm for record in broken)
                    text = printable(f"sample {sample.id} failed for {arms}: {broken[0].reason}")
                    console.print(text, style="red", markup=False, highlight=False)
                waiting[result.index] -= len(records)
                if not waiting[result.index]:
                    advance()
        if n_left := sum(n > 0 for n in waiting.values()):
            raise KeyboardInterrupt(f"{len(wanted) - n_left} of {len(wanted)} samples were finished, {n_left} are left")
    n_new = sum(map(len, todo.values()))
    keys = {position: (samples[position].dataset, samples[position].id) for position in positions}
    return Outcome(
        folder=folder.path, model=plan.model.name, task=plan.task.name, compress=plan.compress,
        shard=None if plan.shard is None else str(plan.shard), samples=keys, n_failed=len(failed),
        n_new=n_new, n_reused=len(positions) * len(plan.arms) - n_new,
        mix_environments=plan.mix_environments, started_at=started_at, ended_at=time.time(),
    )  # fmt: skip


def _missing(
    plan: Plan, samples: list[Sample], making: Making, folder: RunFolder, console: Console
) -> dict[int, tuple[Arm, ...]]:
    """The arms to compute, by position of the sample; refused if answers of two environments would mix."""
    recorded, stale = folder.recorded(), 0
    missing: dict[int, tuple[Arm, ...]] = {}
    beside: list[dict[str, Any]] = []
    for index in making.questions:
        dataset, sample = samples[index].dataset, samples[index].id
        arms = []
        for arm in plan.arms:
            record = recorded.pop((dataset, sample, arm.key), None)
            accepted = record is not None and making.accepts(record, index, plan.mix_environments)
            stale += record is not None and not accepted
            if record is None or not accepted or (record["status"] != "ok" and plan.retry_failed):
                arms.append(arm)
            else:
                beside.append(record)
        if arms:
            missing[index] = tuple(arms)
    if stale:
        console.print(f"{stale} recorded answers are of another text, model or method than today's: computed again")
    if not plan.mix_environments:
        asked = {(samples[index].dataset, samples[index].id) for index in making.questions}
        beside += [record for key, record in recorded.items() if key[:2] in asked]
        beside += [{"call": making.call} for arms in missing.values() for _ in arms]
        today = {"id": making.call, "environment": making.environment}
        found = environments(beside, [*read_calls(folder.path), today])
        refuse_mixture(found, folder.path, "give output.root=DIR for a run of its own, or mix_environments=true")
    return missing


def _call(plan: Plan, task_samples: int, todo: dict[int, tuple[Arm, ...]], making: Making) -> dict[str, Any]:
    """What this call sets out to do, and in what environment; see `kvbench.records.read.read_calls`."""
    return {
        "id": making.call, "started_at": round(time.time(), 3), "host": platform.node(), "process": os.getpid(),
        "shard": None if plan.shard is None else str(plan.shard), "arms": [arm.key for arm in plan.arms],
        "task_samples": task_samples, "missing_answers": sum(map(len, todo.values())),
        "environment": making.environment, "hashes": {"model": making.model, "methods": making.methods},
    }  # fmt: skip


def _request(plan: Plan, prepared: PreparedModel, index: int, sample: Sample, prompt: EncodedPrompt) -> Request:
    compress_at, demand_ids = len(prompt.input_ids), None
    if plan.compress == "before_question":
        if not prompt.question_start_token:
            raise DataError(
                f"sample {sample.id} of {sample.dataset} cannot tell context from question, which "
                "protocol.compress=before_question needs: use after_question or another task"
            )
        compress_at, demand_ids = prompt.question_start_token, encode_demands(sample, prepared)
    # A seed per sample, so that neither order nor process decides what is random.
    digest = hashlib.sha256(f"{plan.seed}|{sample.dataset}|{sample.id}".encode()).digest()
    return Request(
        index=index, input_ids=prompt.input_ids, compress_at=compress_at,
        gold_ids=_gold_ids(prepared, sample, plan.gold_tokens), arms=plan.arms, reference=plan.reference,
        stop_ids=prompt.stop_token_ids, max_new_tokens=sample.max_new_tokens, min_new_tokens=prompt.min_new_tokens,
        seed=int.from_bytes(digest[:4], "big") >> 1, demand_ids=demand_ids,
    )  # fmt: skip


def _gold_ids(prepared: PreparedModel, sample: Sample, limit: int) -> tuple[int, ...]:
    """Tokens of the first reference answer as a continuation of the prompt, at most `limit`."""
    if limit == 0 or not sample.answers or not sample.answers[0]:
        return ()
    continues_text = sample.answer_prefix and not sample.answer_prefix[-1].isspace()
    text = (" " if continues_text else "") + sample.answers[0]
    return tuple(encode_text(text, prepared)[:limit])


def _scored(loaded: LoadedModel, sample: Sample, prompt: EncodedPrompt, answer: Answer, making: Making) -> Record:
    """The answer's record; a metric that raises or gives no number is that record's failure, never a score of 0."""
    identity = _identity(sample, answer.arm, answer.index, making)
    same = {name: getattr(answer, name) for name in _SAME_IN_RECORDS}
    parts: dict[str, float] = {}
    try:
        prediction = str(loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
        if sample.answers:  # rows without references (ZeroSCROLLS' test split) are answered, not scored
            parts = get_metric(sample.metric).score(prediction, sample.answers, sample.all_classes, sample.dataset)
        record = Record(
            **identity, **same, score=parts.get("score"), parts=parts, prediction=prediction,
            gold_nll=_mean(answer.gold_nll), gold_tokens=len(answer.gold_nll),
            kl=_mean(answer.kl), kl_per_token=[round(value, 6) for value in answer.kl],
            n_prompt_tokens=len(prompt.input_ids), truncated_tokens=prompt.truncated_tokens,
            budget_measured=sum(answer.slots_per_layer) / answer.full_slots,
            seconds=round(answer.seconds, 4), engine=answer.settings,
        )  # fmt: skip
    except Exception as error:
        reason = f"metric {sample.metric} raised {failure_reason(error)}"
        return Record(**identity, status="failed", reason=reason)
    for name, value in {**record.parts, "gold_nll": record.gold_nll, "kl": record.kl}.items():
        if value is not None and not math.isfinite(value):
            reason = f"{name}={value} of metric {sample.metric} is no finite number"
            return Record(**identity, status="failed", reason=reason)
    return record


def _identity(sample: Sample, arm: Arm, position: int, making: Making) -> dict[str, Any]:
    """The fields every record of a sample has, failed or not."""
    return {
        "sample": sample.id, "dataset": sample.dataset, "length": sample.length, "meta": sample.meta,
        "metric": sample.metric, "answers": list(sample.answers), "all_classes": list(sample.all_classes),
        "arm": arm.key, "method": arm.policy.name, "budget": arm.policy.budget, "options": arm.policy.options(),
        **making.fields(position, arm.key),
    }  # fmt: skip


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@contextmanager
def _progress(console: Console, n_jobs: int, plan: Plan) -> Iterator:
    """A progress bar over samples; yields a function to call after each."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        part = "" if plan.shard is None else f", shard {plan.shard}"
        bar = progress.add_task(f"{plan.task.name}{part}: samples x {len(plan.arms)} arms", total=n_jobs)
        yield lambda: progress.advance(bar)
