"""Check and time the GPU kernels one by one, without a model.

    python scripts/bench_kernels.py                          # checks, then timings
    python scripts/bench_kernels.py --only column_sums       # one kernel
    python scripts/bench_kernels.py --sweep column_sums      # time alternative tile sizes instead

A check compares a kernel with a slow twin in fp64 over a grid of dtypes, head dimensions, groups and lengths, and has a
limit on the relative RMS error. A timing is the median over repeated runs with the median absolute deviation. Tables
go to the screen; the last line of standard output is one JSON document. The exit code is 1 if a check fails.

To add a kernel, write a function that yields rows and register it with `@check(name)`, `@timing(name)` or
`@sweep(name)`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import decode_kernels
import torch
from torch import Tensor

from kvbench.ops.column_sums_triton import KernelConfig, column_sums_triton, default_config
from kvbench.ops.observe import forward_with_log_sum_exp, observe

Row = dict[str, Any]
Producer = Callable[[torch.device], Iterator[Row]]

CHECKS: dict[str, Producer] = {}
TIMINGS: dict[str, Producer] = {}
SWEEPS: dict[str, Producer] = {}


def check(name: str) -> Callable[[Producer], Producer]:
    """Register a function that yields rows with `case`, `error` and `limit`."""
    return lambda function: CHECKS.setdefault(name, function)


def timing(name: str) -> Callable[[Producer], Producer]:
    """Register a function that yields rows with `case` and times in milliseconds (`*_ms`)."""
    return lambda function: TIMINGS.setdefault(name, function)


def sweep(name: str) -> Callable[[Producer], Producer]:
    """Register a function that yields rows for alternative launch configurations."""
    return lambda function: SWEEPS.setdefault(name, function)


def relative_rms_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values; NaN in `got` gives NaN."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


def time_ms(function: Callable[[], Any], runs: int = 15, warmup: int = 3) -> tuple[float, float]:
    """Time a GPU function with CUDA events.

    Args:
        function: launches the work.
        runs: measured calls.
        warmup: calls before them.

    Returns:
        Median and median absolute deviation, in milliseconds.
    """
    for _ in range(warmup):
        function()
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    median = statistics.median(times)
    return median, statistics.median(abs(t - median) for t in times)


def random_states(
    n_query_heads: int, n_kv_heads: int, n_tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Query `(H, T, D)`, keys and values `(H_k, T, D)`, laid out as a model's projections are: token before head."""
    generator = torch.Generator(device).manual_seed(n_tokens * 1009 + head_dim)

    def draw(n_heads: int) -> Tensor:
        states = torch.randn(n_tokens, n_heads, head_dim, generator=generator, device=device) * 1.5
        return states.to(dtype).transpose(0, 1)

    return draw(n_query_heads), draw(n_kv_heads), draw(n_kv_heads)


def reference_column_sums(query: Tensor, keys: Tensor, scaling: float, columns: Tensor) -> Tensor:
    """Column sums of causal softmax attention in fp64, in blocks of queries.

    Args:
        query: `(H, T, D)`.
        keys: `(H_k, T, D)`.
        scaling: factor on the logits.
        columns: `(C,)` indices of the keys wanted.

    Returns:
        `(H, C)` fp64.
    """
    n_query_heads, n_tokens, _ = query.shape
    keys = keys.double().repeat_interleave(n_query_heads // keys.shape[0], 0).transpose(1, 2)
    sums = torch.zeros(n_query_heads, len(columns), dtype=torch.float64, device=query.device)
    block = max(1, min(n_tokens, 2**27 // (n_query_heads * n_tokens)))
    for start in range(0, n_tokens, block):
        end = min(start + block, n_tokens)
        logits = torch.bmm(query[:, start:end].double() * scaling, keys[:, :, :end])
        rows = torch.arange(start, end, device=query.device)
        logits[:, :, start:].masked_fill_(rows[None, :] > rows[:, None], -math.inf)
        log_sum_exp = logits.logsumexp(-1, keepdim=True)
        seen = columns < end
        sums[:, seen] += (logits[:, :, columns[seen]] - log_sum_exp).exp().sum(1)
    return sums


@check("column_sums")
def check_column_sums(device: torch.device) -> Iterator[Row]:
    """Every dtype, head dimension and group size at short odd lengths; long lengths on 64 random columns."""
    cases = [
        (dtype, heads, n_tokens, head_dim)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for heads in ((4, 4), (4, 1), (6, 2))
        for n_tokens in (1, 17, 127, 128, 129, 1000)
        for head_dim in (64, 80, 128)
    ]
    cases += [
        (dtype, (8, 2), n_tokens, 128) for dtype in (torch.float32, torch.bfloat16) for n_tokens in (3500, 8192, 32768)
    ]
    cases += [(torch.bfloat16, (2, 1), 131072, 128), (torch.float16, (2, 1), 131072, 64)]
    for dtype, (n_query_heads, n_kv_heads), n_tokens, head_dim in cases:
        query, keys, values = random_states(n_query_heads, n_kv_heads, n_tokens, head_dim, dtype, device)
        scaling = head_dim**-0.5
        got = observe(query, keys, values, scaling, column_sums=True, window_tokens=0, kernels="triton").column_sums
        columns = torch.arange(n_tokens, device=device)
        if n_tokens > 8192:
            columns = torch.randperm(n_tokens, device=device)[:64]
        expected = reference_column_sums(query, keys, scaling, columns)
        assert got is not None
        yield {
            "case": f"{str(dtype)[6:]} H={n_query_heads}/{n_kv_heads} T={n_tokens} D={head_dim}",
            "error": relative_rms_error(got[:, columns], expected),
            "limit": 3e-6,
        }


@check("observe_torch")
def check_observe_torch(device: torch.device) -> Iterator[Row]:
    """The blockwise torch version on the GPU."""
    for n_tokens in (1, 129, 3500):
        query, keys, values = random_states(4, 2, n_tokens, 64, torch.float32, device)
        got = observe(query, keys, values, 0.125, column_sums=True, window_tokens=0, kernels="torch").column_sums
        expected = reference_column_sums(query, keys, 0.125, torch.arange(n_tokens, device=device))
        assert got is not None
        yield {"case": f"float32 T={n_tokens}", "error": relative_rms_error(got, expected), "limit": 3e-6}


def _attention_shapes() -> Iterator[tuple[str, int, int, int]]:
    """Name, query heads, KV heads, tokens: Llama-2-7B's attention and a group of 4, head dimension 128."""
    for n_tokens in (3500, 8192, 16384, 32768, 131072):
        yield f"Llama-2-7B T={n_tokens}", 32, 32, n_tokens
    yield "Llama-3-8B T=3500", 32, 8, 3500
    yield "Llama-3-8B T=32768", 32, 8, 32768


@timing("column_sums")
def time_column_sums(device: torch.device) -> Iterator[Row]:
    """One layer: the library's attention as it chooses, its flash forward with the log-sum-exp, and our kernel."""
    for name, n_query_heads, n_kv_heads, n_tokens in _attention_shapes():
        query, keys, values = random_states(n_query_heads, n_kv_heads, n_tokens, 128, torch.bfloat16, device)
        scaling = 128**-0.5
        runs = 15 if n_tokens < 65536 else 3

        def plain(q: Tensor = query, k: Tensor = keys, v: Tensor = values, s: float = scaling) -> None:
            observe(q, k, v, s, column_sums=False, window_tokens=0)

        def forward(q: Tensor = query, k: Tensor = keys, v: Tensor = values, s: float = scaling) -> None:
            forward_with_log_sum_exp(q, k, v, s)

        log_sum_exp = forward_with_log_sum_exp(query, keys, values, scaling)[1]

        def sums(q: Tensor = query, k: Tensor = keys, m: Tensor = log_sum_exp, s: float = scaling) -> None:
            column_sums_triton(q, k, m, s)

        plain_ms, _ = time_ms(plain, runs)
        forward_ms, _ = time_ms(forward, runs)
        sums_ms, deviation = time_ms(sums, runs)
        yield {
            "case": name,
            "sdpa_ms": plain_ms,
            "forward_ms": forward_ms,
            "column_sums_ms": sums_ms,
            "deviation_ms": deviation,
            "over_sdpa": (forward_ms + sums_ms) / plain_ms,
            "32_layers_s": 32 * sums_ms / 1000,
            "exp2_per_s": n_query_heads * n_tokens * (n_tokens + 1) / 2 / (sums_ms / 1000),
        }


@sweep("column_sums")
def sweep_column_sums(device: torch.device) -> Iterator[Row]:
    """Tile sizes, warps and stages at a short and a long prompt."""
    for head_dim, n_tokens in ((128, 3500), (128, 32768), (64, 3500), (64, 32768)):
        query, keys, values = random_states(32, 32, n_tokens, head_dim, torch.bfloat16, device)
        log_sum_exp = forward_with_log_sum_exp(query, keys, values, head_dim**-0.5)[1]
        chosen = default_config(head_dim, torch.bfloat16)
        for blocks in (
            (64, 64, 4),
            (128, 64, 4),
            (64, 128, 4),
            (64, 128, 8),
            (128, 128, 8),
            (64, 256, 8),
            (128, 256, 8),
        ):
            for stages in (2, 3, 4):
                config = KernelConfig(*blocks, stages)

                def sums(
                    q: Tensor = query, k: Tensor = keys, m: Tensor = log_sum_exp, c: KernelConfig = config
                ) -> None:
                    column_sums_triton(q, k, m, q.shape[-1] ** -0.5, c)

                case = f"D={head_dim} T={n_tokens} " + " ".join(map(str, config))
                try:
                    median, deviation = time_ms(sums, 7, 2)
                except Exception as error:  # a configuration may need more shared memory than the card has
                    yield {"case": case, "refused": str(error).splitlines()[0][:60]}
                    continue
                yield {"case": case, "ms": median, "deviation_ms": deviation, "default": config == chosen}


CHECKS.update(decode_kernels.CHECKS)
TIMINGS.update(decode_kernels.TIMINGS)
SWEEPS.update(decode_kernels.SWEEPS)


def run_section(title: str, producers: dict[str, Producer], only: str | None, device: torch.device) -> list[Row]:
    """Run a section's producers, print their rows as they come and return them."""
    rows = []
    for name, producer in producers.items():
        if only not in (None, name):
            continue
        print(f"\n{title}: {name}", flush=True)
        for row in producer(device):
            if "limit" in row:
                row["ok"] = row["error"] <= row["limit"]  # false for NaN
            rows.append({"kernel": name, **row})
            parts = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k != "case")
            print(f"  {row['case']:44s} {'  '.join(parts)}", flush=True)
    return rows


def main() -> int:
    """Parse the arguments, run, print the JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="one kernel's name")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--no-timings", action="store_true")
    parser.add_argument("--sweep", metavar="KERNEL", help="time alternative configurations of this kernel instead")
    arguments = parser.parse_args()
    names = {*CHECKS, *TIMINGS, *SWEEPS}
    for name in (arguments.only, arguments.sweep):
        if name is not None and name not in names:
            parser.error(f"{name!r} is not one of {', '.join(sorted(names))}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these are GPU kernels; the tests run them in Triton's interpreter instead")
    device = torch.device("cuda")
    document: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if arguments.sweep:
        document["sweep"] = run_section("sweep", SWEEPS, arguments.sweep, device)
    else:
        if not arguments.no_checks:
            document["checks"] = run_section("check", CHECKS, arguments.only, device)
        if not arguments.no_timings:
            document["timings"] = run_section("timing", TIMINGS, arguments.only, device)
    failed = sum(not row["ok"] for row in document.get("checks", []))
    document["failed_checks"] = failed
    print(json.dumps(document))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
