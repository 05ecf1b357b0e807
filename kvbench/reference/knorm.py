"""Knorm in plain loops and fp32: the yardstick for `kvbench.methods.knorm`."""

from __future__ import annotations

import math

from torch import Tensor

from kvbench.reference.snapkv import keep_best


def reference_knorm(keys: Tensor, n_slots: int, n_recent: int = 0) -> list[list[int]]:
    """Positions each KV head keeps: the recent tokens, and the others of smallest norm.

    Args:
        keys: `(H_k, T, D)`.
        n_slots: slots per KV head.
        n_recent: last tokens kept.
    """
    norms = [[math.sqrt(sum(x * x for x in k)) for k in head] for head in keys.float().tolist()]
    return keep_best([[-norm for norm in head] for head in norms], keys.shape[1], n_slots, 0, n_recent)
