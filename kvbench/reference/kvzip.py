"""KVzip in plain loops and fp64: the scores of a repetition, and the three selections.

Source: arXiv 2505.23416, algorithm 1; `attention/score.py` of snu-mllab/KVzip.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvbench.reference.defensivekv import keep_of_all
from kvbench.reference.scored import keep_best


def reference_chunk_scores(
    queries: Tensor, sinks: Tensor, chunk: Tensor, own: Tensor, scaling: float, softcap: float | None = None
) -> list[list[float]]:
    """Highest softmax weight of each key of a chunk, per KV head.

    Queries `(H, R, D)` of the repetition; keys `(H_k, n, D)` of the sinks, of the chunk, and the repetition's own.
    """
    H_k, group = own.shape[0], queries.shape[0] // own.shape[0]
    S = [[0.0] * chunk.shape[1] for _ in range(H_k)]
    for head, rows in enumerate(queries.double()):
        h = head // group
        for i, q in enumerate(rows):
            seen = torch.cat([sinks[h], chunk[h], own[h, : i + 1]]).double()
            logits = [float(q @ k) * scaling for k in seen]
            if softcap is not None:
                logits = [softcap * math.tanh(z / softcap) for z in logits]
            total = sum(math.exp(z) for z in logits)
            for j in range(chunk.shape[1]):
                S[h][j] = max(S[h][j], math.exp(logits[sinks.shape[1] + j]) / total)
    return S


def twin(policy: Any, layer: Any, n_slots: int) -> list[tuple[list[int], Tensor, Tensor, None]]:
    """What a layer keeps, head by head; `n_slots` of the whole layer if the policy allocates, else per head."""
    n_first = policy.start_tokens
    S = [[math.inf] * n_first + head[n_first:] for head in layer.extras["reconstruction"].tolist()]
    if policy.selection == "uniform":
        kept = keep_best(S, layer.n_tokens, n_slots, n_first, 0)
        return [(p, layer.keys[h, p], layer.values[h, p], None) for h, p in enumerate(kept)]
    return keep_of_all(S, layer, n_slots if policy.selection == "global" else n_slots * layer.n_kv_heads)
