"""Greedy tokens of the fused engine against the plain engine's: how many prompts and tokens are equal.

    python scripts/equal_tokens.py                                  # tiny random models, fp32 and bf16
    python scripts/equal_tokens.py --models smollm2-135m --prompts 8

Random prompts, one of the arms each in turn. In fp32 both engines compute the same function up to the order of sums,
and every token must be equal (exit code 1 otherwise). In bf16 a sum in another order is another number, and once two
logits nearly tie, one differing token changes all that follow: the share is reported, not judged. KVMerger's threshold
mode keeps as many slots as its data say, so the arm's slots are compared, too.

A table goes to the screen, one JSON document to the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from speed_rows import parse_arms

from kvbench.engine.base import Arm, ArmResult, Engine, Job, JobResult
from kvbench.engine.fused import FusedEngine
from kvbench.engine.plain import PlainEngine
from kvbench.models.config import named_config
from kvbench.models.load import LoadedModel, load_model

ENDS_WHOLE = "+whole_first_layers=1+whole_last_layers=0"
ARMS = (
    "full,h2o@0.5,h2o@0.35+group_reduce=max,cam@0.5,cam@0.35,"
    f"kvmerger@0.5{ENDS_WHOLE},kvmerger@0.5{ENDS_WHOLE}+budget_mode=threshold+threshold=0.2,kvmerger_bias@0.35"
)
SHORTEST, LONGEST = 40, 400  # prompt tokens


def make_jobs(loaded: LoadedModel, arms: tuple[Arm, ...], count: int, new_tokens: int) -> list[Job]:
    """Random prompts of `SHORTEST` to `LONGEST` tokens, one arm each; the same for every run."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = min(250, loaded.model.config.get_text_config().vocab_size)
    jobs = []
    for index in range(count):
        n_tokens = int(torch.randint(SHORTEST, LONGEST + 1, (1,), generator=generator))
        ids = tuple(torch.randint(3, vocabulary, (n_tokens,), generator=generator).tolist())
        jobs.append(
            Job(
                index=index, input_ids=ids, compress_at=n_tokens, gold_ids=(), arms=(arms[index % len(arms)],),
                reference=arms[0], stop_ids=(), max_new_tokens=new_tokens, seed=index,
            )
        )  # fmt: skip
    return jobs


def generate(engine: Engine, loaded: LoadedModel, jobs: list[Job]) -> tuple[list[ArmResult], float, dict[str, Any]]:
    """Results in the order of the jobs, the wall time in seconds, and what the engine says it used."""
    start = time.perf_counter()
    results: dict[int, JobResult] = {}
    for result in engine.run(loaded, jobs):
        if not isinstance(result, JobResult):
            raise SystemExit(f"sample {result.index} failed: {result.reason}")
        results[result.index] = result
    seconds = time.perf_counter() - start
    return [results[job.index].arms[0] for job in jobs], seconds, results[jobs[-1].index].settings


def compare(model: str, dtype: str, arms: tuple[Arm, ...], options: argparse.Namespace) -> dict[str, Any]:
    """One model in one dtype: totals, and per arm prompts, equal prompts, tokens, equal tokens, equal slots."""
    loaded = load_model(named_config(model, dtype=dtype, device=options.device))
    jobs = make_jobs(loaded, arms, options.prompts, options.new_tokens)
    plain, plain_seconds, _ = generate(PlainEngine(), loaded, jobs)
    fused, fused_seconds, settings = generate(FusedEngine(), loaded, jobs)
    per_arm: dict[str, Counter[str]] = {}
    for expected, got in zip(plain, fused, strict=True):
        pairs = list(zip(expected.token_ids, got.token_ids, strict=True))
        equal = sum(a == b for a, b in pairs)
        per_arm.setdefault(got.arm.key, Counter()).update(
            prompts=1,
            prompts_equal=equal == len(pairs),
            tokens=len(pairs),
            tokens_equal=equal,
            slots_equal=expected.slots_per_layer == got.slots_per_layer,
        )
    totals = sum(per_arm.values(), Counter())
    return {
        "model": model,
        "dtype": dtype,
        "plain_seconds": plain_seconds,
        "fused_seconds": fused_seconds,
        **totals,
        "token_share": totals["tokens_equal"] / totals["tokens"],
        "per_arm": {key: dict(counts) for key, counts in per_arm.items()},
        "settings": {key: settings[key] for key in ("kernels", "observe", "cuda_graphs", "compiled")},
    }


def main() -> int:
    """Compare, print, and fail if an fp32 token differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny-random,tiny-random-mha", help="default: %(default)s")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default: %(default)s")
    parser.add_argument("--arms", default=ARMS, help="method@budget[+option=value...]; default: %(default)s")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--prompts", type=int, default=50, help="per model and dtype; default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=8, help="per prompt; default: %(default)s")
    options = parser.parse_args()
    arms = parse_arms(options.arms)
    runs = [
        compare(model, dtype, arms, options)
        for model in options.models.split(",")
        for dtype in options.dtypes.split(",")
    ]
    table = Table(title="fused engine against plain engine, greedy tokens")
    for heading in ("model", "dtype", "kernels", "prompts equal", "tokens equal", "share", "same slots"):
        table.add_column(heading)
    for run in runs:
        table.add_row(
            run["model"],
            run["dtype"],
            ",".join(run["settings"]["kernels"]),
            f"{run['prompts_equal']} of {run['prompts']}",
            f"{run['tokens_equal']} of {run['tokens']}",
            f"{run['token_share']:.1%}",
            f"{run['slots_equal']} of {run['prompts']}",
        )
    Console().print(table)
    document = {
        "schema": 2,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "prompt_tokens": [SHORTEST, LONGEST],
        "new_tokens": options.new_tokens,
        "arms": [arm.key for arm in arms],
        "runs": runs,
    }
    print(json.dumps(document))
    return int(any(run["dtype"] == "float32" and run["token_share"] < 1.0 for run in runs))


if __name__ == "__main__":
    sys.exit(main())
