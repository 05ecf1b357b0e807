"""The fused engine (Triton on a GPU) against the plain one (torch, one row at a time), for every installed method.

    python scripts/compare_engines.py                                    # a random model, fp32 and bf16
    python scripts/compare_engines.py model=smollm2-135m csv=smollm2.csv "lengths=[300,900]" "methods=[h2o,cam]"
    TRITON_INTERPRET=1 python scripts/compare_engines.py kernels=triton ...     # on a CPU, in fp32 only

Each method at its defaults and each budget answers prompts cut out of this project's own pages, and is forced along
what follows there. In fp32 both engines compute the same function up to the order of sums, so every greedy token must
be equal (exit code 1 otherwise). In bf16 another order of sums is another number, and a differing token changes all
that follow: differences are listed, not judged. A Markdown table goes to the screen, the same rows to the CSV file.
"""

from __future__ import annotations

import csv
import itertools
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from kvbench.errors import BudgetError
from kvbench.methods.full import Full
from kvbench.methods.registry import build_policy, load_policies
from kvbench.models.config import named_config
from kvbench.models.load import LoadedModel, load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Answer, Arm, Engine, Request, model_shape

OPTIONS = {  # a random model has 18 layers, so that methods that leave three whole can meet a budget of 0.2
    "model": "tiny-random", "n_layers": 18, "methods": list(load_policies()), "budgets": [0.5, 0.2],
    "lengths": [300, 900, 1500], "samples": 2, "new_tokens": 24, "gold_tokens": 8, "dtypes": ["float32", "bfloat16"],
    "device": "auto", "kernels": "auto", "csv": "engines.csv",
}  # fmt: skip
RANDOM = {"hidden_size": 256, "n_query_heads": 8, "n_kv_heads": 2, "head_dim": 64, "intermediate_size": 512}
COLUMNS = ("dtype", "arm", "kernels", "equal tokens", "tokens", "equal slots", "mean KL", "max NLL diff", "max KL diff")


def make_arms(options: DictConfig, n_layers: int) -> tuple[Arm, ...]:
    """The full cache, and every method at every budget that it takes on the shortest prompt."""
    arms = [Arm.of(Full())]
    for name, budget in itertools.product([name for name in options.methods if name != "full"], options.budgets):
        policy = build_policy(name, {"budget": budget})
        try:
            policy.layer_budgets(min(options.lengths), n_layers)
            arms.append(Arm.of(policy))
        except BudgetError as error:
            print(f"left out: {error}", file=sys.stderr)
    return tuple(arms)


def make_jobs(loaded: LoadedModel, arms: tuple[Arm, ...], options: DictConfig) -> Iterator[Request]:
    """For each length some prompts, each followed in the text by the gold answer."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(Path(__file__).parents[1].glob("docs/*.md")))
    ids = tuple(loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    lengths = [n_tokens for n_tokens in options.lengths for _ in range(options.samples)]
    stride = (len(ids) - max(lengths) - options.gold_tokens) // len(lengths)
    for index, n_tokens in enumerate(lengths):
        ours = ids[index * stride :]
        gold = ours[n_tokens : n_tokens + options.gold_tokens]
        given = {
            "seed": index,
            "demand_ids": (ours[:9], ours[:9], ours[:3]),
        }  # any words will do to demand a repetition
        yield Request(index, ours[:n_tokens], n_tokens, gold, arms, Arm.of(Full()), (), options.new_tokens, **given)


def run(engine: Engine, loaded: LoadedModel, jobs: list[Request]) -> tuple[dict[tuple[str, int], Answer], str]:
    """Answers by arm and sample, and the kernels that the engine says it used."""
    answers, kernels, start = {}, "", time.perf_counter()
    for result in engine.run(loaded, jobs):
        if isinstance(result, Answer):
            answers[result.arm.key, result.index] = result
            kernels = str(result.settings["kernels"]).strip("[']")
        else:
            print(f"failed: {[arm.key for arm in result.arms]}: {result.reason}", file=sys.stderr)
    print(f"{type(engine).__name__}, {loaded.dtype}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return answers, kernels


def gaps(pairs: list[tuple[Answer, Answer]], what: str) -> list[float]:
    """Differences between the two answers of each pair, token by token."""
    return [abs(a - b) for one, other in pairs for a, b in zip(getattr(one, what), getattr(other, what), strict=True)]


def compare(dtype: str, options: DictConfig) -> Iterator[tuple[Any, ...]]:
    """One row per arm: equal tokens and slots, and the largest differences in nats over all samples and tokens."""
    shape = {"n_layers": options.n_layers, **RANDOM} if options.model == "tiny-random" else {}
    loaded = load_model(named_config(options.model, dtype=dtype, device=options.device, **shape))
    arms = make_arms(options, model_shape(loaded)["n_layers"])
    jobs = list(make_jobs(loaded, arms, options))
    plain, _ = run(PlainEngine(), loaded, jobs)
    fused, kernels = run(FusedEngine(kernels=options.kernels), loaded, jobs)
    total = len(jobs) * options.new_tokens
    for arm in arms:
        pairs = [(plain[key], fused[key]) for key in plain if key[0] == arm.key and key in fused]
        equal = gaps(pairs, "token_ids").count(0)
        slots = sum(p.slots_per_layer == f.slots_per_layer for p, f in pairs)
        mean_kl = sum(sum(p.kl) for p, _ in pairs) / max(1, len(pairs) * options.gold_tokens)
        nats = mean_kl, *(max(gaps(pairs, name), default=0.0) for name in ("gold_nll", "kl"))
        yield dtype, arm.key, kernels, equal, total, slots, *(f"{x:.1e}" for x in nats)


def main() -> int:
    """Compare, write, print, and fail if an fp32 token differs or is missing."""
    options = OmegaConf.create(OPTIONS, flags={"struct": True})
    options.merge_with_dotlist(sys.argv[1:])
    if not options.methods:
        raise SystemExit("0 methods are installed, 1 is needed: pip install -e .")
    rows: list[Any] = []
    for dtype in options.dtypes:
        rows += compare(dtype, options)
        with open(options.csv, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "triton"))
    print(f"{options.model}, {device}, {packages}; KL and NLL in nats\n")
    for line in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print("|", " | ".join(map(str, line)), "|")
    return int(any(row[0] == "float32" and row[3] < row[4] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
