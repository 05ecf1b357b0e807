"""Which prompt tokens a method keeps, and their keys and values; ties always go to the more recent token.

With `kernels="triton"` (see `LayerStates.kernels`) the same is done by `kvbench.ops.compress_triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest_by_recency(scores: Tensor, n_largest: int | Tensor) -> Tensor:
    """Mark the largest of each row of `(H, T)` scores, `n_largest` (a number or `(H, 1)`) of them; `(H, T)` bool."""
    n_tokens = scores.shape[1]
    order = n_tokens - 1 - scores.flip(1).sort(dim=1, descending=True, stable=True).indices
    chosen = torch.arange(n_tokens, device=scores.device) < n_largest
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, chosen.expand_as(order))


def largest_of_all(scores: Tensor, n_largest: int) -> Tensor:
    """Mark the `n_largest` of all rows of `(H, T)` scores together, `(H, T)` bool; ties: by recency, then lower row."""
    n_rows = scores.shape[0]
    order = scores.flip(1).T.flatten().sort(descending=True, stable=True).indices[:n_largest]
    marks = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    return marks.index_fill_(0, order, True).view(-1, n_rows).flip(0).T


def heavy_and_recent(ranks: Tensor, heavy: int, recent: int, kernels: str = "torch") -> Tensor:
    """Positions of the last `recent` tokens and of the `heavy` best of the older ones by `(H, T)` fp32 ranks.

    `(H, heavy + recent)` int64, ascending.
    """
    if kernels == "triton":
        from kvbench.ops import compress_triton  # imports triton, which a CPU may lack

        return compress_triton.heavy_and_recent(ranks, heavy, recent)
    n_heads, n_tokens = ranks.shape
    older = n_tokens - recent
    order = older - 1 - ranks[:, :older].flip(1).sort(dim=1, descending=True, stable=True).indices
    last = torch.arange(older, n_tokens, device=ranks.device).expand(n_heads, -1)
    return torch.cat([order[:, :heavy].sort(dim=1).values, last], dim=1)


def keep_slots(
    keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, kernels: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy keys `(H, T, D)`, values `(H, T, D)` and scores `(H, T)` at `(H, m)` int64 positions."""
    if kernels == "triton":
        from kvbench.ops import compress_triton

        return compress_triton.keep_slots(keys, values, scores, positions)
    rows = positions.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
    return keys.gather(1, rows), values.gather(1, rows), scores.gather(1, positions)


def marked_positions(marks: Tensor, n_marked: int) -> Tensor:
    """Ascending positions of what is marked in `(H, T)` bool, `(H, n_marked)` int64; T where a head has fewer."""
    n_tokens = marks.shape[1]
    tokens = torch.arange(n_tokens, device=marks.device)
    return torch.where(marks, tokens, n_tokens).sort(dim=1).values[:, :n_marked]


def other_positions(positions: Tensor, n_tokens: int) -> Tensor:
    """Ascending positions `(H, T - m)` of the tokens that are not at `(H, m)` positions, distinct in each row."""
    tokens = torch.arange(n_tokens, device=positions.device).expand(positions.shape[0], -1)
    marked = tokens.scatter(1, positions, n_tokens)
    return marked.sort(dim=1).values[:, : n_tokens - positions.shape[1]].contiguous()
