"""Refit kept slots so that the attention of the prompt's last queries comes out as with the whole cache.

Dropping keys from softmax attention makes two errors: the mass of the dropped keys is shared out among the kept ones,
and the kept values do not add up to the same output. Both are linear in small corrections of the kept slots, so ridge
regression on a few observed queries mends them in closed form. The keys stay as they are; hence attention that was
observed over all keys gives attention over the kept ones by selecting columns, and no query has to be stored.

After "attention matching" (Zweiger et al., arXiv 2602.16284), which fits a bias per slot and its value to a sample of
queries. Ours differs: corrections are shrunk towards zero instead of unregularised (there are fewer queries than slots)
and everything is solved in the space of the queries, whose number does not grow with the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST_FACTOR, HIGHEST_FACTOR = math.exp(-2.0), math.exp(3.0)  # of a slot's weight in the softmax


def ridge_correction(design: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """Solve `min |residual - design x|^2 + lambda |x|^2`, lambda being `ridge` times the mean squared row of `design`.

    For N equations in m unknowns, design `(H, N, m)` and residual `(H, N, C)` fp32, it gives `(H, m, C)` fp32 from
    `x = design^T (design design^T + lambda)^-1 residual`.
    """
    gram = torch.bmm(design, design.transpose(1, 2))
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += ridge * diagonal.mean(1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    factor = torch.linalg.cholesky_ex(gram).L  # positive definite by the ridge; the check would wait for the device
    return torch.bmm(design.transpose(1, 2), torch.cholesky_solve(residual, factor))


def kept_mass(rows: Tensor, positions: Tensor) -> Tensor:
    """Attention of N observed queries on the keys kept at `(H_k, m)` positions, `(H_k, N, m)` fp32.

    `rows`, `(H_k, N, T)` fp32, are softmax rows over all keys, those of a group's query heads one below the other.
    """
    return rows.gather(2, positions.unsqueeze(1).expand(-1, rows.shape[1], -1))


def refit_bias(mass: Tensor, ridge: float) -> Tensor:
    """Bias `(H_k, m)` fp32 with which the kept keys attract all the mass that the observed queries have to give.

    It is between log `LOWEST_FACTOR` and log `HIGHEST_FACTOR`; the larger `ridge`, the closer to none.
    """
    lost = 1.0 - mass.sum(-1, keepdim=True)
    factors = 1.0 + ridge_correction(mass, lost, ridge).squeeze(-1)
    return factors.clamp(LOWEST_FACTOR, HIGHEST_FACTOR).log()


def refit_values(
    rows: Tensor, mass: Tensor, all_values: Tensor, kept_values: Tensor, bias: Tensor | None, ridge: float
) -> Tensor:
    """Values `(H_k, m, D)` with which the observed queries get the output they had over all `(H_k, T, D)` values.

    `rows` and `mass` are those of `kept_mass`; the larger `ridge`, the closer to the kept values themselves.
    """
    weights = mass if bias is None else mass * bias.exp().unsqueeze(1)
    attention = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    residual = torch.bmm(rows, all_values.float()) - torch.bmm(attention, kept_values.float())
    return (kept_values.float() + ridge_correction(attention, residual, ridge)).to(kept_values.dtype)
