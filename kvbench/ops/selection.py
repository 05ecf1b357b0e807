"""Which prompt tokens an evicting method keeps, and their keys and values, in torch.

The twin of `kvbench.ops.selection_triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def heavy_and_recent(ranks: Tensor, heavy: int, recent: int) -> Tensor:
    """Positions of the best older tokens and of the last tokens.

    Args:
        ranks: `(H, T)` fp32; higher is better, ties go to the more recent token.
        heavy: tokens kept for their rank, among all but the last `recent`.
        recent: last tokens kept.

    Returns:
        `(H, heavy + recent)` int64, ascending.
    """
    n_heads, n_tokens = ranks.shape
    older = n_tokens - recent
    order = older - 1 - ranks[:, :older].flip(1).sort(dim=1, descending=True, stable=True).indices
    last = torch.arange(older, n_tokens, device=ranks.device).expand(n_heads, -1)
    return torch.cat([order[:, :heavy].sort(dim=1).values, last], dim=1)


def keep_slots(keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the kept slots.

    Args:
        keys: `(H, T, D)`.
        values: `(H, T, D)`.
        scores: `(H, T)`.
        positions: `(H, m)` int64.

    Returns:
        Keys `(H, m, D)`, values `(H, m, D)` and scores `(H, m)` at those positions.
    """
    rows = positions.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
    return keys.gather(1, rows), values.gather(1, rows), scores.gather(1, positions)
