"""Speed against the targets: one table to read and, as the last line of the output, one JSON document.

    python scripts/bench_speed.py                                   # the rows that suit this machine
    python scripts/bench_speed.py --rows 1,4 --peer --peer-site DIR # with kvpress timed beside
    python scripts/bench_speed.py --quick --model tiny-random --cpu-model tiny-random --rows 1,2,3,4,5,6,7

The targets were set for Llama-2-7B shapes in bf16 on one H100 (row 6: SmolLM2-135M on two CPU cores). Arms are the
seven of the KVMerger paper: the full cache, and H2O, CaM and KVMerger at 50 % and 35 %. The rows:

1  Prefill through `Observer` with exact column sums, over the same model's plain SDPA prefill (`use_cache=False`,
   `logits_to_keep=1`), at 3.5k, 8k, 16k, 32k; 131,072 tokens have to run without going out of memory.
2  Forking one prefill into the arms: (prefill that compresses every layer for all arms and writes it into the cache,
   less the same observed prefill without that) over plain prefill, at 3.5k.
3  Decode step of all arms over its bandwidth floor: weight bytes (without the embedding table, of which a step reads a
   few rows) plus the arms' cache bytes at the end of the prompt, over the bandwidth of a copy timed in the same run,
   bytes read and written both counted. The step is timed in the engine's own loop, with graph replay on a GPU.
4  kvpress's runs over ours for one 3.5k sample, all arms, 128 new tokens each, whole wall time. Ours: `FusedEngine`,
   after one sample that captures the graphs (its time is under `first_seconds`). kvpress's: one run per arm as its
   pipeline does it, by `peer_kvpress.py`; full: no press; H2O: ObservedAttentionPress; CaM: StreamingLLMPress, its
   cheapest eviction at the prompt's end, since CAMPress acts every 512 new tokens only; KVMerger:
   MergingPress(KnormPress). Beside it, without a target: seconds a sample takes in batches as large as memory allows.
5  Bytes allocated for an arm's part of the cache over budget x full bytes; the worst arm counts.
6  On two CPU cores, 2,048 prompt tokens, 64 new ones: all arms over the full arm alone, through `FusedEngine`; and row
   1's quantity there, for which no target was set.
7  Cost of one more arm at 3.5k with 128 new tokens: (all arms - full alone) / further arms / full alone.

Value: of the medians. Spread: 20th and 80th percentile of the value over the repeats. Every raw time is in the JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from speed_rows import Setting, bytes_row, fork_row, parse_arms, prefill_row, step_row
from speed_samples import EngineTimes, batched_row, cpu_rows, further_arm_row, sample_row, time_engine, time_peer
from speed_timing import Row, say

from kvbench.errors import KvbenchError
from kvbench.models.config import ModelConfig, named_config
from kvbench.models.load import load_model, resolve_device

ARMS = "full,h2o@0.5,h2o@0.35,cam@0.5,cam@0.35,kvmerger@0.5,kvmerger@0.35"
LENGTHS = "3500,8192,16384,32768,131072"
SAMPLE = (3500, 128)  # prompt and new tokens
CPU_SAMPLE = (2048, 64)
QUICK_SAMPLE = (256, 8)
PEER_LENGTH = 32_768  # longest prompt whose prefill kvpress is asked for, tokens
PREFILL_TARGETS = {3500: 1.12, 32768: 1.40}
HOW_TO_INSTALL = (
    "pip install --no-deps --target DIR kvpress==0.5.5 transformers==5.2.0 tokenizers==0.22.2 'huggingface_hub<2' "
    "'cachetools<6' fire datasets typer-slim  (plus what they need and your environment lacks), then --peer-site DIR"
)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; what was left out depends on the machine."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        default="random-llama2-7b" if on_gpu else "smollm2-135m",
        help="model of the other rows: a file of configs/model; default: %(default)s",
    )
    parser.add_argument("--cpu-model", default="smollm2-135m", help="model of row 6; default: %(default)s")
    parser.add_argument("--rows", default="1,2,3,4,5,7" if on_gpu else "6", help="default: %(default)s")
    parser.add_argument("--arms", default=ARMS, help="method@budget[+option=value...]; default: %(default)s")
    parser.add_argument("--lengths", default=LENGTHS, help="prompt lengths of row 1; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=10 if on_gpu else 3, help="counted times; default: %(default)s")
    parser.add_argument("--batched-samples", type=int, default=24, help="samples timed in large batches beside row 4")
    parser.add_argument("--peer", action="store_true", help="time kvpress beside (rows 1, 4 and 6)")
    parser.add_argument("--peer-site", type=Path, help=f"folder of kvpress and its transformers: {HOW_TO_INSTALL}")
    parser.add_argument("--peer-repeats", type=int, default=1, help="counted times of each of kvpress's works")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; row 6 always runs on the CPU")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of row 6")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all runs, measures nothing")
    options = parser.parse_args(arguments)
    if options.peer and (options.peer_site is None or not (options.peer_site / "kvpress").is_dir()):
        parser.error(f"--peer needs --peer-site DIR with kvpress in it: {HOW_TO_INSTALL}")
    if options.repeats < 1 or options.peer_repeats < 1:
        parser.error("--repeats and --peer-repeats need at least 1")
    options.rows = sorted({int(number) for number in options.rows.split(",")})
    if unknown := set(options.rows) - set(range(1, 8)):
        parser.error(f"--rows {sorted(unknown)}: there are rows 1 to 7")
    options.lengths = [int(length) for length in options.lengths.split(",")]
    if options.quick:
        options.lengths, options.repeats = [256, 512], min(options.repeats, 2)
    return options


def make_setting(options: argparse.Namespace, config: ModelConfig, device: str, sample: tuple[int, int]) -> Setting:
    """Load a model and say how it is measured; `sample` is prompt tokens and new tokens."""
    say(f"loading {config.name}")
    loaded = load_model(config, device=device, report=say)
    loaded.model.set_attn_implementation("sdpa")
    fitting = tuple(length for length in options.lengths if length <= loaded.max_context_tokens)
    for length in sorted(set(options.lengths) - set(fitting)) if 1 in options.rows else []:
        say(f"row 1 leaves out {length:,} tokens: {config.name} has {loaded.max_context_tokens:,} positions")
    return Setting(loaded, parse_arms(options.arms), options.repeats, fitting, *sample)


def compare(options: argparse.Namespace, config: ModelConfig, sample: tuple[int, int], on_cpu: bool) -> dict[str, Any]:
    """What kvpress needs for the same work, if asked for; timed before our model takes memory."""
    if not options.peer:
        return {}
    return time_peer(
        config,
        parse_arms(options.arms),
        resolve_device("cpu" if on_cpu else options.device),
        sample,
        [length for length in options.lengths if length <= PEER_LENGTH] if 1 in options.rows and not on_cpu else [],
        options.peer_site,
        options.peer_repeats,
        options.threads if on_cpu else 0,
    )


def main_rows(options: argparse.Namespace, setting: Setting, peer: dict[str, Any]) -> list[Row]:
    """Rows 1 to 5 and 7; a row that fails is recorded with its error, and the others go on."""
    rows: list[Row] = []
    times: list[EngineTimes] = []  # rows 4 and 7 read the same samples

    def engine_times() -> EngineTimes:
        times[:] = times or [time_engine(setting)]
        return times[0]

    works: list[tuple[int, Callable[[], Row]]] = [
        (1, partial(prefill_row, setting, length, PREFILL_TARGETS.get(length), must_run=length == 131_072))
        for length in setting.lengths
    ]
    works += [
        (2, lambda: fork_row(setting, 0.25)),
        (3, lambda: step_row(setting, 1.5)),
        (4, lambda: sample_row(setting, engine_times(), peer)),
        (4, lambda: batched_row(setting, 2 if options.quick else options.batched_samples)),
        (5, lambda: bytes_row(setting, 1.01)),
        (7, lambda: further_arm_row(setting, engine_times())),
    ]
    for number, work in works:
        if number in options.rows:
            rows += guarded(number, partial(one_row, work))
    return rows


def one_row(work: Callable[[], Row]) -> list[Row]:
    """A measurement that makes a single row, as the list that `guarded` wants."""
    return [work()]


def guarded(number: int, work: Callable[[], list[Row]]) -> list[Row]:
    """Run one row's measurement; its failure becomes a row that says so."""
    say(f"row {number}")
    try:
        return work()
    except Exception as error:  # whatever it is, the other rows are worth having
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return [Row(number, "not measured", "", {}, lambda t: math.nan, note=f"failed: {reason}", failed=True)]
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def describe(options: argparse.Namespace, settings: dict[str, Setting]) -> dict[str, Any]:
    """Where and with what the times were taken."""
    names = ("torch", "triton", "transformers", "kvbench")
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    models = {
        part: {
            "name": setting.loaded.name,
            "source": setting.loaded.source,
            "dtype": str(setting.loaded.dtype).removeprefix("torch."),
            "device": str(setting.loaded.device),
            "repeats": setting.repeats,
            "arms": [arm.key for arm in setting.arms],
        }
        for part, setting in settings.items()
    }
    return {
        "device": gpu.name if gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in names} | {"cuda": torch.version.cuda},
        "commit": commit(),
        "models": models,
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
    }


def installed_version(name: str) -> str | None:
    """A package's version, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def print_table(document: dict[str, Any]) -> None:
    """The rows, and kvpress's times if there are any."""
    models = ", ".join(f"{model['name']} {model['dtype']}" for model in document["models"].values())
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title=f"{models} on {document['device']}", title_justify="left")
    for column in ("#", "quantity", "case", "value", "p20 to p80", "target", "met", "median times", "peak GB", "note"):
        table.add_column(column, justify="right" if column in ("value", "target", "peak GB") else "left")
    for row in document["rows"]:
        spread, target = row["spread"], row["target"]
        table.add_row(
            str(row["row"]),
            row["quantity"],
            row["case"],
            "-" if row["value"] is None else f"{row['value']:.3f}",
            "-" if spread is None else f"{spread['p20']:.3f} to {spread['p80']:.3f}",
            target if isinstance(target, str) else "-" if target is None else f"{row['direction']} {target:g}",
            {True: "yes", False: "NO", None: "-"}[row["met"]],
            "\n".join(f"{name} {times['p50']:.4f} s" for name, times in row["seconds"].items()),
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}",
            row["note"],
        )
    console.print(table)
    for part, peer in document["peer"].items():
        for arm, run in peer.get("samples", {}).items():
            console.print(f"kvpress ({part}) {arm}: {run['press'] or 'no press'}, {min(run['seconds']):.3f} s")
        for press, lengths in peer.get("prefills", {}).items():
            times = (f"{n} tokens {raw if isinstance(raw, str) else f'{min(raw):.4f} s'}" for n, raw in lengths.items())
            console.print(f"kvpress ({part}) prefill, {press}: {', '.join(times) or '-'}")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, then the JSON document; 1 if a row or kvpress failed."""
    options = parse_arguments(arguments)
    settings: dict[str, Setting] = {}
    peers: dict[str, dict[str, Any]] = {}
    rows: list[Row] = []
    try:
        config = named_config(options.model)
        if set(options.rows) - {6}:
            sample = QUICK_SAMPLE if options.quick else SAMPLE
            peers["main"] = compare(options, config, sample, on_cpu=False)
            settings["main"] = make_setting(options, config, options.device, sample)
            rows += main_rows(options, settings["main"], peers["main"])
        if 6 in options.rows:
            sample = QUICK_SAMPLE if options.quick else CPU_SAMPLE
            config = named_config(options.cpu_model)
            peers["cpu"] = compare(options, config, sample, on_cpu=True)
            settings["cpu"] = make_setting(options, config, "cpu", sample)
            rows += guarded(6, lambda: cpu_rows(settings["cpu"], options.threads, peers["cpu"], options.peer))
    except KvbenchError as error:
        print(f"bench_speed: {error}", file=sys.stderr)
        return 2
    rows.sort(key=lambda row: row.number)
    document = {"schema": 1, **describe(options, settings), "rows": [row.record() for row in rows], "peer": peers}
    if options.quick:  # tiny sizes say nothing about the targets
        document["rows"] = [{**row, "target": None, "met": None} for row in document["rows"]]
    print_table(document)
    text = json.dumps(document)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    return int(any(row.failed for row in rows) or any("error" in peer for peer in peers.values()))


if __name__ == "__main__":
    sys.exit(main())
