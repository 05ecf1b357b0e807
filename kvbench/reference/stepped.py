"""Methods that step, token by token, in plain lists and fp32: H2O, CaM, StreamingLLM and TOVA.

A cache is a list of tokens in the order of their positions, as in the official codes, so it needs no ring buffer.
Symbols of the papers: H2O's S_j is the accumulated attention score of key j; CaM's A_i the attention accumulated on
token i, or the newest query's, M_i the Bernoulli mask, m the number of kept tokens that follow i and take a share of
its value v_i (eq. 14).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Entry:
    """One cached token of one KV head: its key, its value, its accumulated attention, the queries that saw it."""

    position: int
    k: Tensor
    v: Tensor
    A: float
    n_queries: int = 0


def reduce_group(scores: list[float], reduce: str) -> float:
    """One score for the query heads of one KV head."""
    return {"mean": sum(scores) / len(scores), "max": max(scores), "first": scores[0]}[reduce]


class _Heads:
    """Entries of every KV head of one layer, at first all prompt tokens with their attention `(H, T)`."""

    def __init__(self, keys: Tensor, values: Tensor, column_sums: Tensor, reduce: str):
        n_kv_heads, n_tokens, _ = keys.shape
        group, self.reduce = column_sums.shape[0] // n_kv_heads, reduce
        self.heads: list[list[Entry]] = []
        for h in range(n_kv_heads):
            entries = []
            for j in range(n_tokens):
                A = reduce_group([float(column_sums[h * group + g, j]) for g in range(group)], reduce)
                entries.append(Entry(j, keys[h, j].float(), values[h, j].float(), A, n_tokens - j))
            self.heads.append(entries)

    def append(self, h: int, position: int, k: Tensor, v: Tensor, rows: dict[int, list[float]]) -> list[Entry]:
        """Entries of head h and the new token, its attention (per position, in each query head) added to all."""
        entries = [*self.heads[h], Entry(position, k.float(), v.float(), 0.0)]
        for entry in entries:
            entry.A += reduce_group(rows[entry.position], self.reduce)
            entry.n_queries += 1
        return entries

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `(H_k, m, D)`, values `(H_k, m, D)` and positions `(H_k, m)`, in the order of positions."""
        keys = torch.stack([torch.stack([e.k for e in entries]) for entries in self.heads])
        values = torch.stack([torch.stack([e.v for e in entries]) for entries in self.heads])
        return keys, values, torch.tensor([[e.position for e in entries] for entries in self.heads])

    def scores(self) -> Tensor:
        """Accumulated attention `(H_k, m)`."""
        return torch.tensor([[e.A for e in entries] for entries in self.heads])


class ReferenceH2O(_Heads):
    """H2O's cache of one layer: built from the prompt, then updated once per new token."""

    def __init__(
        self, keys: Tensor, values: Tensor, column_sums: Tensor, budget_tokens: int,
        recent_share: float = 0.5, normalise_by_count: bool = False, group_reduce: str = "mean",
    ):  # fmt: skip
        super().__init__(keys, values, column_sums, group_reduce)
        self.normalise = normalise_by_count
        self.recent = max(1, math.floor(recent_share * budget_tokens + 1e-9)) if recent_share else 0
        self.heavy = budget_tokens - self.recent
        self.heads = [self.select(entries) for entries in self.heads]

    def select(self, entries: list[Entry]) -> list[Entry]:
        """Keep the `heavy` best of the older entries (ties: the more recent) and the last `recent`, in order."""

        def rank(entry: Entry) -> tuple[float, int]:
            return entry.A / entry.n_queries if self.normalise else entry.A, entry.position

        n_older = len(entries) - self.recent
        older, last = entries[:n_older], entries[n_older:]
        best = sorted(older, key=rank, reverse=True)[: self.heavy]
        return sorted(best, key=lambda e: e.position) + last

    def step(self, h: int, position: int, k: Tensor, v: Tensor, attention_by_position: dict[int, list[float]]) -> None:
        """Append the new token of KV head h, add its attention row to S, evict one entry."""
        self.heads[h] = self.select(self.append(h, position, k, v, attention_by_position))


class ReferenceCaM(_Heads):
    """CaM's cache of one layer: first and most recent tokens of the prompt, then updated once per new token."""

    def __init__(
        self, keys: Tensor, values: Tensor, column_sums: Tensor, budget_tokens: int,
        start_share: float = 0.5, merge_tokens: int | None = None, gate: str = "current", gate_mean: str | None = None,
        merge: bool = True,
    ):  # fmt: skip
        super().__init__(keys, values, column_sums if gate == "accumulated" else column_sums * 0, "mean")
        self.gate, self.merge = gate, merge
        self.merge_tokens = merge_tokens or {"current": 32, "accumulated": 16, "decoding": 32}[gate]
        self.gate_mean = gate_mean or {"current": "window"}.get(gate, "targets")
        self.start = min(budget_tokens - 1, math.floor(start_share * budget_tokens + 1e-9))
        recent = budget_tokens - self.start
        self.heads = [entries[: self.start] + entries[-recent:] for entries in self.heads]

    def step(
        self, h: int, position: int, k: Tensor, v: Tensor, attention_by_position: dict[int, list[float]],
        draw: Callable[[], float],
    ) -> bool:  # fmt: skip
        """Append the new token of KV head h, add its attention row to A (or let it be A), drop the oldest recent token.

        `draw` gives a uniform number in [0, 1). Returns whether the dropped token's value was merged.
        """
        for entry in self.heads[h] if self.gate == "current" else ():
            entry.A = 0.0
        entries = self.append(h, position, k, v, attention_by_position)
        dropped = entries.pop(self.start)
        self.heads[h] = entries
        if not self.merge:
            return False
        targets = entries[self.start : self.start + self.merge_tokens]
        m = len(targets)
        compared = targets if self.gate_mean == "targets" else entries[self.start :]
        mean_A = sum(t.A for t in compared) / len(compared)
        probability = min(max(dropped.A / mean_A, 0.0), 1.0) if mean_A > 0 else float(dropped.A > 0)
        M = draw() < probability
        if M:
            for target in targets:
                target.v = target.v + dropped.v / m
        return M


class _Tokens:
    """Tokens of one layer, the same in every head: (position, keys of all heads, values of all heads)."""

    tokens: list[tuple[int, Tensor, Tensor]]

    def stacked(self) -> tuple[Tensor, Tensor, list[int]]:
        """Keys `(H_k, m, D)`, values `(H_k, m, D)` and positions, in the order of positions."""
        positions, keys, values = zip(*self.tokens, strict=True)
        return torch.stack(keys, 1), torch.stack(values, 1), list(positions)


class ReferenceStreamingLLM(_Tokens):
    """StreamingLLM's rolling cache of one layer."""

    def __init__(self, keys: Tensor, values: Tensor, budget_tokens: int, start_size: int = 4):
        self.start_size, self.cache_size, self.tokens = start_size, budget_tokens, []
        for j in range(keys.shape[1]):
            self.append(j, keys[:, j], values[:, j])

    def append(self, position: int, k: Tensor, v: Tensor) -> None:
        """Add one token; evict the oldest that is no start token once the cache is full."""
        self.tokens.append((position, k, v))
        if len(self.tokens) > self.cache_size:
            del self.tokens[self.start_size]


class ReferenceTOVA(_Tokens):
    """TOVA's multi-state of one layer, at most k tokens; `last_row` is `(H, T)` attention of the last prompt query."""

    def __init__(self, keys: Tensor, values: Tensor, last_row: Tensor, k: int, keep_newest: bool = False):
        self.k, self.keep_newest = k, keep_newest
        self.tokens = [(j, keys[:, j], values[:, j]) for j in range(keys.shape[1])]
        self.evict({j: last_row[:, j].tolist() for j in range(keys.shape[1])})

    def evict(self, attention_by_position: dict[int, list[float]]) -> None:
        """Drop the tokens with the lowest mean attention over all query heads until k are left."""
        mean = {j: sum(attention_by_position[j]) / len(attention_by_position[j]) for j, _, _ in self.tokens}
        while len(self.tokens) > self.k:
            candidates = self.tokens[:-1] if self.keep_newest else self.tokens
            weakest = min((j for j, _, _ in candidates), key=lambda j: (mean[j], j))
            self.tokens = [token for token in self.tokens if token[0] != weakest]

    def step(self, position: int, k: Tensor, v: Tensor, attention_by_position: dict[int, list[float]]) -> None:
        """Append the new token and evict."""
        self.tokens.append((position, k, v))
        self.evict(attention_by_position)
