"""KVMerger Plus in plain loops and fp64: the yardstick for `kvbench.methods.kvmerger_plus`.

Corrections are solved here in the space of the slots (the other end of the identity
`(X'X + l)^-1 X' r = X' (XX' + l)^-1 r`), one KV head at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvbench.methods.base import LayerStates
from kvbench.reference.criticalkv import best
from kvbench.reference.expected_attention import rope

LIMITS = (0.0, 1e-4, 1e-4)


def twin(policy: Any, layer: LayerStates, n_slots: int) -> list[tuple[list[int], Tensor, Tensor, Tensor | None]]:
    """Positions, keys, values and bias of every KV head of a layer that keeps `n_slots` in all."""
    T, H_k = layer.n_tokens, layer.n_kv_heads
    if n_slots >= H_k * T:
        return [(list(range(T)), layer.keys[h], layer.values[h], None) for h in range(H_k)]
    N = min(policy.reach_queries, T)
    t = [(i * T // N + (i + 1) * T // N - 1) // 2 for i in range(N)]
    everywhere = [attention(layer, h, [(i, T - 1 - i) for i in t]) for h in range(H_k)]
    n_last = min(T, max(policy.question_queries, policy.text_queries, policy.refit_queries))
    last = [attention(layer, h, [(i, 0) for i in range(T - n_last, T)]) for h in range(H_k)]
    r = [reach(rows) for rows in everywhere]
    kept = []
    for h, n in enumerate(head_slots(r, n_slots, certain_slots(policy, T))):
        recent = min(n // 2, policy.recent_tokens)
        chosen = set(range(T - recent, T))
        asked, text = question(policy, last[h]), mean_attention(policy, layer, h, last[h])
        for s, share in ((asked, policy.question_share), (r[h], policy.reach_share), (text, 1.0)):
            scores = [-math.inf if j in chosen else s[j] for j in range(T)]
            chosen |= set(best(scores, min(n - len(chosen), math.floor(share * (n - recent) + 1e-9))))
        kept.append(sorted(chosen))
    if policy.refit == "none":
        return [(p, layer.keys[h, p], layer.values[h, p], None) for h, p in enumerate(kept)]
    found = []
    for h, p in enumerate(kept):
        rows = torch.cat([last[h][:, -policy.refit_queries :], everywhere[h][:, 1::4]], 1).flatten(0, 1)
        values, bias = refit(rows, layer.values[h].double(), p, policy.ridge, policy.refit == "both")
        found.append((p, layer.keys[h, p], values, bias if policy.refit == "both" else None))
    return found


def attention(layer: LayerStates, h: int, asked: list[tuple[int, int]]) -> Tensor:
    """Softmax rows `(G, N, T)` of KV head h's group, for queries by position and how far each is turned on."""
    K, T = layer.keys[h].double(), layer.n_tokens
    rows = torch.zeros(layer.group_size, len(asked), T, dtype=torch.float64)
    for g in range(layer.group_size):
        for n, (i, turn) in enumerate(asked):
            q = layer.extras["queries"][h * layer.group_size + g, i].double()
            q = rope(q, turn, layer.extras["rotary_frequencies"].double()) * layer.extras["scaling"].double()
            seen = T if turn else i + 1
            rows[g, n, :seen] = (K[:seen] @ q).softmax(0)
    return rows


def reach(rows: Tensor) -> list[float]:
    """The most that any row gives a token, at least the mean of that."""
    most = [float(rows[:, :, j].max()) for j in range(rows.shape[2])]
    return [max(r, sum(most) / len(most)) for r in most]


def certain_slots(policy: Any, T: int) -> int:
    """Slots that every head has for certain."""
    return max(1, math.floor(policy.floor_share * math.floor(policy.budget * T + 1e-9) + 1e-9))


def head_slots(r: list[list[float]], n_slots: int, certain: int) -> list[int]:
    """How many of the best of all heads' reaches are in each, the certain ones first."""
    pool = []
    for h, head in enumerate(r):
        sure = set(best(head, certain))
        pool += [(math.inf if j in sure else reach, j, -h) for j, reach in enumerate(head)]
    return [sum(1 for *_, minus in sorted(pool, reverse=True)[:n_slots] if minus == -h) for h in range(len(r))]


def question(policy: Any, last: Tensor) -> list[float]:
    """The question's highest attention per query head, reduced over the group, then the highest near by."""
    most = last[:, -policy.question_queries :].amax(1)
    heads = {"mean": most.mean(0), "max": most.amax(0), "first": most[0]}[policy.group_reduce].tolist()
    half = policy.kernel_tokens // 2
    return [max(heads[max(0, j - half) : j + half + 1]) for j in range(len(heads))]


def mean_attention(policy: Any, layer: LayerStates, h: int, last: Tensor) -> list[float]:
    """Mean attention over all queries that see a token and over the last ones, averaged."""
    G, T = layer.group_size, layer.n_tokens
    sums = layer.observed("column_sums")[h * G : (h + 1) * G].double() / torch.arange(T, 0, -1)
    late = last[:, -policy.text_queries :].mean(1)
    both = [{"mean": x.mean(0), "max": x.amax(0), "first": x[0]}[policy.group_reduce] for x in (sums, late)]
    return ((both[0] + both[1]) / 2).tolist()


def refit(A: Tensor, V: Tensor, kept: list[int], ridge: float, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Refitted values `(m, D)` and bias `(m,)`, zero without, for rows `(N, T)` over all values `(T, D)`."""
    factors = torch.ones(len(kept), dtype=torch.float64)
    if with_bias:
        lost = 1.0 - A[:, kept].sum(1)
        factors = (1.0 + _ridge(A[:, kept], lost[:, None], ridge)[:, 0]).clamp(torch.e**-2, torch.e**3)
    X = A[:, kept] * factors
    X = X / X.sum(1, keepdim=True)
    return V[kept] + _ridge(X, A @ V - X @ V[kept], ridge), factors.log()


def _ridge(X: Tensor, r: Tensor, ridge: float) -> Tensor:
    strength = ridge * X.square().sum(1).mean()
    return torch.linalg.solve(X.T @ X + strength * torch.eye(X.shape[1], dtype=X.dtype), X.T @ r)
