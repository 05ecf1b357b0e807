"""KVMerger Plus in plain loops: the yardstick for `kvbench.methods.kvmerger_plus`.

Corrections are solved here in the space of the slots, in fp64 (the other end of the identity
`(X'X + l)^-1 X' r = X' (XX' + l)^-1 r`), one KV head at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.reference.scored import keep_best, pooled_votes


def reference_positions(
    column_sums: Tensor, window_attention: Tensor, n_kv_heads: int, n_slots: int, *,
    recent: int, question_share: float, question_queries: int, kernel: int, text_queries: int,
) -> list[list[int]]:  # fmt: skip
    """Positions each KV head keeps, ascending, from `(H, T)` sums and `(H, L, T)` softmax rows of the last queries."""
    n_query_heads, n_rows, n_tokens = window_attention.shape
    group, n_older = n_query_heads // n_kv_heads, n_tokens - recent
    question, text = min(question_queries, n_rows), min(text_queries, n_rows)
    n_question = int(question_share * (n_slots - recent) + 1e-9)
    kept = []
    for h in range(n_kv_heads):
        heads = range(h * group, (h + 1) * group)
        older_rows = window_attention[list(heads), :, :n_older]
        padded = torch.cat([older_rows, torch.zeros(group, n_rows, question)], dim=2)  # its window is never pooled
        votes = pooled_votes(padded, 1, question, kernel)[0]
        [asked] = keep_best([votes], n_older, n_question, 0, 0)
        scores = []
        for j in range(n_older):
            seen = sum(float(column_sums[q, j]) / (n_tokens - j) for q in heads) / group
            late = sum(float(window_attention[q, -text:, j].mean()) for q in heads) / group
            scores.append(-1.0 if j in asked else (seen + late) / 2)
        [told] = keep_best([scores], n_older, n_slots - recent - n_question, 0, 0)
        kept.append(sorted({*asked, *told, *range(n_older, n_tokens)}))
    return kept


def reference_refit(
    window_attention: Tensor, values: Tensor, positions: list[list[int]], queries: int, ridge: float, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """Refitted values `(H_k, m, D)` and bias `(H_k, m)` (zero without), fp64, fitted to the last `queries` rows."""
    n_kv_heads = values.shape[0]
    group = window_attention.shape[0] // n_kv_heads
    new_values, biases = [], []
    for h in range(n_kv_heads):
        A = torch.cat([window_attention[h * group + g, -queries:] for g in range(group)]).double()
        V, kept = values[h].double(), positions[h]
        factors = torch.ones(len(kept), dtype=torch.float64)
        if with_bias:
            lost = 1.0 - A[:, kept].sum(1)
            factors = (1.0 + _ridge(A[:, kept], lost[:, None], ridge)[:, 0]).clamp(torch.e**-2, torch.e**3)
        X = A[:, kept] * factors
        X /= X.sum(1, keepdim=True)
        new_values.append(V[kept] + _ridge(X, A @ V - X @ V[kept], ridge))
        biases.append(factors.log())
    return torch.stack(new_values), torch.stack(biases)


def _ridge(X: Tensor, r: Tensor, ridge: float) -> Tensor:
    strength = ridge * X.square().sum(1).mean()
    return torch.linalg.solve(X.T @ X + strength * torch.eye(X.shape[1], dtype=X.dtype), X.T @ r)
