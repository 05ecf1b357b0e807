"""Memory over a long run: many samples of a tiny model through the fused engine, resident memory watched.

    python scripts/long_run.py --samples 1000

Prints the resident set after every tenth of the run; the last line of standard output is one JSON document. Memory is
flat if the last reading exceeds the one after the first tenth by no more than a few percent.
"""

from __future__ import annotations

import argparse
import json
import time

import psutil
import torch

from kvbench.methods.registry import build_policy
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.requests import Answer, Arm, Request

ARMS = (("full", {}), ("h2o", {"budget": 0.5}), ("cam", {"budget": 0.35}), ("kvmerger_bias", {"budget": 0.5}))


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--model", default="tiny-random")
    arguments = parser.parse_args()
    loaded = load_model(named_config(arguments.model))
    arms = tuple(Arm.of(build_policy(name, options)) for name, options in ARMS)
    generator = torch.Generator().manual_seed(0)

    def job(index: int) -> Request:
        n_tokens = 60 + index % 97
        ids = torch.randint(3, 250, (n_tokens + 3,), generator=generator).tolist()
        return Request(
            index=index, input_ids=tuple(ids[:n_tokens]), compress_at=n_tokens, gold_ids=tuple(ids[n_tokens:]),
            arms=arms, reference=arms[0], stop_ids=(2,), max_new_tokens=4, seed=index,
        )  # fmt: skip

    process, readings, start = psutil.Process(), [], time.perf_counter()
    for done, result in enumerate(FusedEngine().run(loaded, [job(i) for i in range(arguments.samples)]), 1):
        assert isinstance(result, Answer), result
        if done % (len(arms) * max(1, arguments.samples // 10)) == 0:
            readings.append(process.memory_info().rss)
            print(f"{done // len(arms):6d} samples  {readings[-1] / 2**20:8.1f} MiB")
    growth = readings[-1] / readings[0] - 1
    print(
        json.dumps(
            {
                "model": arguments.model,
                "device": str(loaded.device),
                "samples": arguments.samples,
                "arms": [arm.key for arm in arms],
                "resident_bytes": readings,
                "growth_ratio_after_first_tenth": round(growth, 5),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
