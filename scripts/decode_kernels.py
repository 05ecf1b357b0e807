"""Checks and timings of the decode kernels, run by bench_kernels.py: ragged attention and the one-launch steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, Policy
from kvbench.methods.cam import CaM, CaMState
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O, H2OState
from kvbench.ops import ragged_decode as decode
from kvbench.ops import ragged_decode_triton as decode_triton
from kvbench.ops.ragged_decode import DecodePlan
from kvbench.runtime.cache import RaggedCache

Row = dict[str, Any]
LIMITS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def random_compressed(policy: Policy, n_kv_heads: int, n_slots: int, head_dim: int, like: Tensor) -> CompressedLayer:
    """Random kept slots with the state and constants that the policy's step needs; `like` gives dtype and device."""
    keys, values = (torch.randn(n_kv_heads, n_slots, head_dim, device=like.device).to(like.dtype) for _ in range(2))
    positions = torch.arange(n_slots, device=like.device).expand(n_kv_heads, -1)
    scores = torch.rand(n_kv_heads, n_slots, device=like.device).pow(8)
    return CompressedLayer(
        keys,
        values,
        positions,
        state=CaMState(scores, torch.arange(n_kv_heads, device=like.device).unsqueeze(1))
        if isinstance(policy, CaM)
        else (H2OState(scores) if policy.steps else None),
    )


def make_cache(
    rows: Sequence[tuple[Policy, int]], n_layers: int, heads: tuple[int, int], head_dim: int, like: Tensor, backend: str
) -> RaggedCache:
    """A cache with rows of given policies and slots, filled at random."""
    cache = RaggedCache(n_layers, *heads, head_dim, like.dtype, backend)
    slots = sum(heads[1] * (n_slots + (1 if policy.steps else 128)) for policy, n_slots in rows)
    cache.reserve([slots] * n_layers)
    for policy, n_slots in rows:
        row = cache.add_row(policy, n_slots, 128)
        for index in range(n_layers):
            cache.write(index, row, random_compressed(policy, heads[1], n_slots, head_dim, like))
    cache.prepare()
    return cache


def reference(query: Tensor, layer: DecodePlan, scaling: float) -> Tensor:
    """Output `(B, H, D)` in fp64, one block at a time."""
    grouped = query.double().unflatten(1, (layer.offsets.shape[1], -1))
    output = torch.empty_like(grouped)
    for row, offsets in enumerate(layer.offsets.tolist()):
        for head, first in enumerate(offsets):
            slots = slice(first, first + int(layer.lengths[row, head]) + 1)
            logits = grouped[row, head] @ layer.keys[slots].double().T * scaling
            if (shift := int(layer.bias_offsets[row, head])) >= 0 and layer.bias is not None:
                logits += layer.bias[shift : shift + logits.shape[-1]].double()
            output[row, head] = logits.softmax(-1) @ layer.values[slots].double()
    return output.flatten(1, 2)


def relative_rms_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def check_ragged_decode(device: torch.device) -> Iterator[Row]:
    """Every dtype, group size and head dimension at odd lengths with biased and ragged rows; then long rows."""
    cases: list[tuple[torch.dtype, tuple[int, int], int, tuple[int, ...]]] = [
        (dtype, heads, head_dim, (1, 63, 1225, 700))
        for dtype in LIMITS
        for heads in ((4, 4), (9, 3), (8, 2), (8, 1))
        for head_dim in (64, 80, 128)
    ]
    cases += [(dtype, (8, 2), 128, (131072, 17)) for dtype in LIMITS]
    cases += [(dtype, (4, 4), 128, (131072, 3500)) for dtype in LIMITS]
    for dtype, heads, head_dim, lengths in cases:
        cache = RaggedCache(1, *heads, head_dim, dtype, "triton")
        like = torch.empty(0, dtype=dtype, device=device)
        for row, length in enumerate(lengths):
            policy: Policy = H2O(budget=0.5) if row == 2 else Full()
            layer = random_compressed(policy, heads[1], length, head_dim, like)
            if row == 1:
                layer.bias = torch.randn(heads[1], length, device=device)
            if row == 3:
                layer.lengths = torch.tensor([length - 13 * head for head in range(heads[1])], device=device)
            cache.write(0, cache.add_row(policy, length, 5), layer)
        cache.prepare()
        plan = cache._plans[0]
        query, new_keys, new_values = (
            torch.randn(len(lengths), n, 1, head_dim, device=device).to(dtype) for n in (heads[0], heads[1], heads[1])
        )
        decode_triton.write_token(new_keys, new_values, plan)
        got, _ = decode_triton.ragged_decode(query.squeeze(2), plan, head_dim**-0.5)
        name = f"{str(dtype)[6:]} H={heads[0]}/{heads[1]} D={head_dim} slots={','.join(map(str, lengths))}"
        expected = reference(query.squeeze(2), plan, head_dim**-0.5)
        yield {"case": name, "error": relative_rms_error(got, expected), "limit": LIMITS[dtype]}
        if len(lengths) > 2:
            assert plan.attention is not None
            weights = plan.attention[: heads[0] * (lengths[2] + 1)].view(heads[0], -1)
            _, twin = decode.ragged_decode(query.squeeze(2), plan, head_dim**-0.5, (2,))
            error = relative_rms_error(weights, twin[2])
            yield {"case": name + " attention row", "error": error, "limit": LIMITS[dtype]}


def check_rows_steps(device: torch.device) -> Iterator[Row]:
    """Caches of H2O and CaM rows after many steps, one launch per layer against the policies' own `step`."""
    policies = (H2O(budget=0.5), H2O(budget=0.35, group_reduce="max"), CaM(budget=0.5), CaM(budget=0.35), Full())
    slots = (700, 1225, 300, 64, 50)
    for heads in ((4, 4), (9, 3), (8, 1)):
        like = torch.empty(0, dtype=torch.float32, device=device)
        caches = []
        for backend in ("torch", "triton"):
            torch.manual_seed(3)
            caches.append(make_cache(list(zip(policies, slots, strict=True)), 2, heads, 64, like, backend))
        for _ in range(100):
            for index in range(2):
                query = torch.randn(len(slots), heads[0], 1, 64, device=device)
                new = torch.randn(2, len(slots), heads[1], 1, 64, device=device)
                for cache in caches:
                    cache.attend(index, query, new[0], new[1], 0.125)
            for cache in caches:
                cache.advance()
        for row, policy in enumerate(policies[:4]):
            parts = [cache._layers[1].decode_slots(cache._blocks(row)[1], torch.tensor(0)) for cache in caches]
            for name in ("keys", "values"):
                got, expected = (getattr(part, name)[:, :-1] for part in reversed(parts))
                error = relative_rms_error(got, expected)
                yield {"case": f"{policy.name} H={heads[0]}/{heads[1]} row {row} {name}", "error": error, "limit": 1e-5}


def graph_ms(function: Callable[[], Any], runs: int = 30) -> tuple[float, float]:
    """Median and median absolute deviation, in milliseconds, of a function captured in a CUDA graph and replayed."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    median = statistics.median(times[5:])
    return median, statistics.median(abs(t - median) for t in times[5:])


def copy_gb_per_s(device: torch.device) -> float:
    """Ceiling: bytes read and written per second by a large device-to-device copy."""
    source = torch.empty(2**30, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    milliseconds, _ = graph_ms(lambda: target.copy_(source))
    return 2 * source.numel() * 4 / milliseconds / 1e6


def seven_arms(n_tokens: int) -> list[tuple[Policy, int]]:
    """The paper's arms on one sample: full, and H2O, CaM and a growing method at 50 % and at 35 %."""
    rows: list[tuple[Policy, int]] = [(Full(), n_tokens)]
    for budget in (0.5, 0.35):
        kept = int(budget * n_tokens)
        rows += [(H2O(budget=budget), kept), (CaM(budget=budget), kept), (Full(), kept)]
    return rows


def time_decode(device: torch.device) -> Iterator[Row]:
    """All layers' cache work of one decode step, bf16: attention alone, then with writing and the policies' steps."""
    ceiling = copy_gb_per_s(device)
    yield {"case": "copy", "gb_per_s": ceiling}
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    cases: list[tuple[str, list[tuple[Policy, int]], tuple[int, int], int]] = [
        ("Llama-2-7B seven arms 3500", seven_arms(3500), (32, 32), 32),
        ("Llama-2-7B seven arms twice 3500", seven_arms(3500) * 2, (32, 32), 32),
        ("Llama-2-7B full 3500", [(Full(), 3500)], (32, 32), 32),
        ("Llama-3-8B seven arms 3500", seven_arms(3500), (32, 8), 32),
        ("Llama-3-8B seven arms 32768", seven_arms(32768), (32, 8), 32),
        ("Llama-3-8B full 131072", [(Full(), 131072)], (32, 8), 8),
    ]
    for name, rows, heads, n_layers in cases:
        cache = make_cache(rows, n_layers, heads, 128, like, "triton")
        query = torch.randn(len(rows), heads[0], 1, 128, device=device).bfloat16()
        new = torch.randn(2, len(rows), heads[1], 1, 128, device=device).bfloat16()

        def attention(cache: RaggedCache = cache, query: Tensor = query) -> None:
            for plan in cache._plans:
                decode_triton.ragged_decode(query.squeeze(2), plan, 128**-0.5)

        def everything(cache: RaggedCache = cache, query: Tensor = query, new: Tensor = new) -> None:
            for index in range(cache.n_layers):
                cache.attend(index, query, new[0], new[1], 128**-0.5)

        read_bytes = n_layers * heads[1] * sum(n_slots for _, n_slots in rows) * 128 * 2 * 2
        attention_ms, deviation = graph_ms(attention)
        everything_ms, _ = graph_ms(everything)
        floor_ms = read_bytes / ceiling / 1e6
        yield {
            "case": name,
            "attention_ms": attention_ms,
            "deviation_ms": deviation,
            "gb_per_s": read_bytes / attention_ms / 1e6,
            "over_floor": attention_ms / floor_ms,
            "with_write_and_steps_ms": everything_ms,
            "all_over_floor": everything_ms / floor_ms,
        }


def sweep_decode(device: torch.device) -> Iterator[Row]:
    """Slots per split, tile sizes and warps, seven arms of a 3,500-token sample, 8 layers."""
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    for heads in ((32, 32), (32, 8)):
        cache = make_cache(seven_arms(3500), 8, heads, 128, like, "triton")
        query = torch.randn(7, heads[0], 128, device=device).bfloat16()
        read_bytes = 8 * heads[1] * sum(n_slots for _, n_slots in seven_arms(3500)) * 512
        for slots in (256, 512):
            for tile in (16, 32, 64):
                for warps in (1, 2, 4, 8):
                    for stages in (3,) if heads[0] == heads[1] else (2, 4):
                        launch = decode_triton.Launch(slots, tile, warps, stages)

                        def attention(cache: RaggedCache = cache, query: Tensor = query, launch: Any = launch) -> None:
                            for plan in cache._plans:
                                decode_triton.ragged_decode(query, plan, 128**-0.5, launch=launch)

                        milliseconds, deviation = graph_ms(attention, 15)
                        yield {
                            "case": f"H={heads[0]}/{heads[1]} slots={slots} tile={tile} warps={warps} stages={stages}",
                            "ms": milliseconds,
                            "deviation_ms": deviation,
                            "gb_per_s": read_bytes / milliseconds / 1e6,
                        }


CHECKS = {"ragged_decode": check_ragged_decode, "rows_steps": check_rows_steps}
TIMINGS = {"ragged_decode": time_decode}
SWEEPS = {"ragged_decode": sweep_decode}
