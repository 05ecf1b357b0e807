"""Whole samples for `bench_speed.py`: through the fused engine, and done by kvpress in a process of its own."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from speed_rows import Setting, prefill_row
from speed_timing import Row, peak_bytes, say, take_turns

from kvbench.errors import KvbenchError
from kvbench.models.config import ModelConfig
from kvbench.models.fetch import LOCATORS
from kvbench.models.load import resolve_dtype
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.requests import Answer, Arm

PRESSES = {
    "full": None,
    "h2o": "ObservedAttentionPress",
    "cam": "StreamingLLMPress",
    "kvmerger": "MergingPress(KnormPress)",
}
"""kvpress's nearest equivalent of each method, see `bench_speed.py`."""


@dataclass
class EngineTimes:
    """Wall times of whole samples through the fused engine.

    Attributes:
        first: time of the first sample, graph captures included, seconds.
        seconds: times of the samples after it.
        peak_bytes: peak memory of the batch of all arms.
        settings: what the engine says it used.
    """

    first: dict[str, float]
    seconds: dict[str, list[float]]
    peak_bytes: int
    settings: dict[str, Any]

    @property
    def details(self) -> dict[str, Any]:
        """What goes into a row's details."""
        return {"first_seconds": self.first, "settings": self.settings}


def time_engine(setting: Setting) -> EngineTimes:
    """Time one sample a batch through the engine, with all arms ("arms") and with the full arm alone ("full").

    Raises:
        KvbenchError: if a sample fails or an arm generates fewer tokens than asked for.
    """
    works: dict[str, Callable[[], object]] = {}
    settings: dict[str, Any] = {}
    works_arms = {"arms": setting.arms, "full": (setting.full,)}
    for name, arms in works_arms.items():
        jobs = [setting.job(arms, setting.sample_tokens, setting.new_tokens, i) for i in range(setting.repeats + 1)]
        results = FusedEngine(max_rows=len(arms)).run(setting.loaded, jobs)

        def work(name: str = name, results: Any = results) -> None:
            for answer in islice(results, len(works_arms[name])):
                if not isinstance(answer, Answer):
                    raise KvbenchError(f"sample {answer.index} failed: {answer.reason}")
                if (n_tokens := len(answer.token_ids)) != setting.new_tokens:
                    raise KvbenchError(f"{answer.arm.key} generated {n_tokens} tokens, {setting.new_tokens} are timed")
                settings[name] = answer.settings

        works[name] = work
    first, seconds = take_turns(works, setting.loaded.device, setting.repeats)
    peak = settings["arms"]["peak_bytes"] or peak_bytes(setting.loaded.device)
    return EngineTimes(first, seconds, peak, settings)


def sample_row(setting: Setting, times: EngineTimes, peer: dict[str, Any], target: float | None = 30.0) -> Row:
    """Row 4: kvpress's runs over ours."""
    samples = peer.get("samples", {})
    theirs = sum(statistics.median(run["seconds"]) for run in samples.values()) if samples else math.nan
    return Row(
        4,
        f"kvpress, {len(setting.arms)} runs / ours, one sample",
        _case(setting),
        {"ours": times.seconds["arms"]},
        lambda t: theirs / t["ours"],
        target,
        at_least=True,
        peak_bytes=times.peak_bytes,
        details={"peer_seconds": theirs if samples else None, **times.details},
        note=peer.get("error", "" if samples else "kvpress was not timed: give --peer"),
    )


def batched_row(setting: Setting, n_samples: int) -> Row:
    """Beside row 4: seconds a sample takes when a batch holds as many samples as rows and memory allow.

    Raises:
        KvbenchError: if a sample fails.
    """
    jobs = [setting.job(setting.arms, setting.sample_tokens, setting.new_tokens, i) for i in range(n_samples)]
    per_sample: list[float] = []
    settings: dict[str, Any] = {}
    left_of_batch = 0
    start = time.perf_counter()
    for result in FusedEngine().run(setting.loaded, jobs):
        if not isinstance(result, Answer):
            raise KvbenchError(f"sample {result.index} failed: {result.reason}")
        if left_of_batch == 0:  # the answers of a batch come together, when it is done
            settings = result.settings
            left_of_batch = settings["batch_samples"] * len(setting.arms)
            per_sample.append((time.perf_counter() - start) / settings["batch_samples"])
            start = time.perf_counter()
        left_of_batch -= 1
    counted = per_sample[1:] or per_sample
    return Row(
        4,
        f"seconds a sample, {len(setting.arms)} arms, batches as large as memory allows",
        _case(setting),
        {"sample": counted},
        lambda t: t["sample"],
        peak_bytes=settings["peak_bytes"] or peak_bytes(setting.loaded.device),
        details={"first_seconds_per_sample": per_sample[0], "samples": n_samples, "settings": settings},
        note=f"{settings['batch_samples']} samples in the last batch"
        + ("" if len(per_sample) > 1 else "; one batch only: captures included"),
    )


def further_arm_row(setting: Setting, times: EngineTimes) -> Row:
    """Row 7: cost of one more arm over the full arm alone."""
    more = max(1, len(setting.arms) - 1)
    return Row(
        7,
        "one more arm / full arm alone",
        _case(setting),
        times.seconds,
        lambda t: (t["arms"] / t["full"] - 1) / more,
        0.08,
        peak_bytes=times.peak_bytes,
        details=times.details,
    )


def cpu_rows(setting: Setting, threads: int, peer: dict[str, Any], with_peer: bool) -> list[Row]:
    """Row 6 in as many threads as asked for, with kvpress's ratio beside if it was timed."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = time_engine(setting)
        column_sums = prefill_row(setting, setting.sample_tokens, None, number=6)
    finally:
        torch.set_num_threads(before)
    arms = Row(
        6,
        f"{len(setting.arms)} arms / full arm alone",
        _case(setting),
        times.seconds,
        lambda t: t["arms"] / t["full"],
        2.0,
        peak_bytes=times.peak_bytes,
        details=times.details,
    )
    rows = [arms, column_sums]
    if with_peer:
        rows.append(sample_row(setting, times, peer, target=None))
        rows[-1].number = 6
    for row in rows:
        row.quantity = f"CPU, {threads} threads: {row.quantity}"
    return rows


def _case(setting: Setting) -> str:
    return f"{setting.sample_tokens:,} tokens, {setting.new_tokens} new"


def time_peer(
    config: ModelConfig,
    arms: Sequence[Arm],
    device: torch.device,
    sample: tuple[int, int],
    prefill_lengths: Sequence[int],
    site: Path,
    repeats: int,
    threads: int,
) -> dict[str, Any]:
    """Let kvpress do the same work in its own process.

    Args:
        config: the model.
        arms: arms of which each becomes one run.
        device: where.
        sample: prompt tokens and new tokens of a run.
        prefill_lengths: prompt lengths at which prefills alone are timed, tokens.
        site: folder with kvpress and its transformers.
        repeats: counted times of each work.
        threads: CPU threads, or 0 for the default.

    Returns:
        What `peer_kvpress.py` prints, or "error" with the reason.
    """
    random = config.effective_source == "random"
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_query_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context_tokens,
    }
    missing = [arm.key for arm in arms if arm.policy.name not in PRESSES]
    if missing:
        return {"error": f"kvpress has no equivalent of {', '.join(missing)}"}
    work = {
        "device": device.type,
        "dtype": str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        "folder": None if random else str(LOCATORS[config.effective_source](config, say).folder),
        "shape": shape if random else {},
        "arms": {arm.key: (PRESSES[arm.policy.name], arm.policy.budget) for arm in arms},
        "sample_tokens": sample[0],
        "new_tokens": sample[1],
        "prefill_lengths": list(prefill_lengths),
        "prefill_presses": [None, "ObservedAttentionPress", "SnapKVPress"],
        "repeats": repeats,
        "threads": threads,
    }
    paths = [str(site.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(Path(__file__).with_name("peer_kvpress.py")), json.dumps(work)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    say("timing kvpress in its own process")
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"error": f"kvpress failed with exit code {done.returncode}, see its messages above"}
    return dict(json.loads(done.stdout.splitlines()[-1]))
