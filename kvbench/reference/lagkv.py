"""LagKV token by token, in plain loops and fp64; S sinks, partitions of L tokens, the next one is the lag reference."""

from __future__ import annotations

import math
import statistics

from torch import Tensor

from kvbench.methods.base import LayerStates
from kvbench.methods.lagkv import LEAST_RANGE, LagKV
from kvbench.reference.scored import keep_best


def spreads(partition: Tensor, following: Tensor) -> list[float]:
    """Softmax over the partition of std over channels of (x - min) / (max - min), by the following partition."""
    low, high = following.min(0).values, following.max(0).values
    ranges = [max(float(b - a), LEAST_RANGE) for a, b in zip(low, high, strict=True)]
    deviations = [
        statistics.stdev([float(x - a) / r for x, a, r in zip(token, low, ranges, strict=True)]) for token in partition
    ]
    highest = max(deviations)
    exponentials = [math.exp(deviation - highest) for deviation in deviations]
    return [exponential / sum(exponentials) for exponential in exponentials]


def twin(policy: LagKV, layer: LayerStates, n_slots: int) -> list[tuple[list[int], Tensor, Tensor, None]]:
    """For each head positions, keys, values and no bias."""
    S, L, n_tokens = policy.start_tokens, policy.lag_tokens, layer.n_tokens
    scores = []
    for k, v in zip(layer.keys.double(), layer.values.double(), strict=True):
        head = [1.0] * n_tokens
        for start in range(S, n_tokens - 2 * L + 1, L):
            own, lag = slice(start, start + L), slice(start + L, start + 2 * L)
            found = [(a + b) / 2 for a, b in zip(spreads(k[own], k[lag]), spreads(v[own], v[lag]), strict=True)]
            for rank, i in enumerate(sorted(range(L), key=lambda i: (found[i], i))):
                head[start + i] = found[i] if policy.cross_scoring else rank / L
        scores.append(head)
    kept = keep_best(scores, n_tokens, n_slots, S, 0)
    return [(head, layer.keys[h, head], layer.values[h, head], None) for h, head in enumerate(kept)]
