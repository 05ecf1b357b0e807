"""Merge tokens into slots: sets of adjacent tokens around a pivot, or evicted tokens into the kept ones they resemble.

Every sum is a segment reduction in token order: no atomics, the same bits on every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.ops.segments import unit_keys

BLOCK_TOKENS = 1024  # evicted tokens compared with all kept ones at a time: bounds the table of cosines


@dataclass
class MergedSegments:
    """One slot per set.

    Attributes:
        keys: `(H, m, D)`, dtype of the keys given.
        values: `(H, m, D)`, dtype of the values given.
        counts: `(H, m)` int64, tokens of each set; 0 for sets a head does not have.
        pivots: `(H, m)` int64, token index of each set's pivot (0 for missing sets).
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    pivots: Tensor


def merge_segments(
    keys: Tensor, values: Tensor, pivot_scores: Tensor, starts: Tensor, *,
    sigma: float, mean_distance: bool, scale_values: bool, merge: bool, kernels: str = "torch",
) -> MergedSegments:  # fmt: skip
    """Average the keys and values of each set with Gaussian weights around its pivot.

    KVMerger (arXiv 2407.08454), algorithm 2: pivot p = argmax of the scores in the set (ties: the latest token),
    `g_i = exp(-||k_p - k_i||^2 / (2 sigma^2))`, `w_i = g_i / sum g`, key `sum w_i k_i`, value `sum w_i v_i`, times the
    size of the set if values are scaled. All in fp32, cast back once.

    Args:
        keys: `(H, T, D)`.
        values: `(H, T, D)`.
        pivot_scores: `(H, T)` fp32.
        starts: `(H, m + 1)` int64, from `segment_starts`.
        sigma: width of the Gaussian, in units of key distance.
        mean_distance: use `sum ||k_p - k_i|| / (sqrt(2) |S|)` of each set in place of `sigma`.
        scale_values: multiply the merged value by the size of the set.
        merge: false keeps the pivot's own key and value and drops the other tokens of the set.
        kernels: "torch" or "triton".
    """
    if kernels == "triton":
        from kvbench.ops import compress_triton  # imports triton, which a CPU may lack

        arguments = (keys, values, pivot_scores, starts, sigma, mean_distance, scale_values, merge)
        return MergedSegments(*compress_triton.merge_segments(*arguments))
    n_heads, n_tokens, head_dim = keys.shape
    counts = starts.diff(dim=1)
    marks = torch.zeros(n_heads, n_tokens + 1, dtype=torch.int64, device=keys.device).scatter_(1, starts, 1)
    segments = marks[:, :n_tokens].cumsum(1) - 1

    def reduce(data: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(data, how, offsets=starts, axis=1, unsafe=True)

    def of_segment(data: Tensor) -> Tensor:
        index = segments.reshape(segments.shape + (1,) * (data.ndim - 2)).expand(-1, -1, *data.shape[2:])
        return data.gather(1, index)

    best = of_segment(reduce(pivot_scores, "max"))
    tokens = torch.arange(n_tokens, dtype=torch.float64, device=keys.device)  # exact for any length
    pivots = reduce(torch.where(pivot_scores == best, tokens, -1.0), "max").clamp_min(0).long()
    pivot_index = pivots.unsqueeze(-1).expand(-1, -1, head_dim)
    pivot_keys = keys.gather(1, pivot_index)
    if not merge:
        return MergedSegments(pivot_keys, values.gather(1, pivot_index), counts, pivots)
    squared = (of_segment(pivot_keys).float() - keys.float()).square_().sum(-1)
    if mean_distance:
        widths = reduce(squared.sqrt(), "sum") / (math.sqrt(2.0) * counts.clamp_min(1))
        exponents = squared / (2.0 * of_segment(widths).square()).clamp_min(torch.finfo(torch.float32).tiny)
    else:
        exponents = squared / (2.0 * sigma**2)
    gaussians = torch.exp(-exponents)
    weights = (gaussians / of_segment(reduce(gaussians, "sum"))).unsqueeze(-1)
    merged_keys = reduce(weights * keys.float(), "sum")
    merged_values = reduce(weights * values.float(), "sum")
    if scale_values:
        merged_values *= counts.unsqueeze(-1)
    return MergedSegments(merged_keys.to(keys.dtype), merged_values.to(values.dtype), counts, pivots)


def tokens_at(states: Tensor, positions: Tensor) -> Tensor:
    """Rows of `(H, T, D)` states at `(H, n)` positions, in fp32."""
    return states.gather(1, positions.unsqueeze(-1).expand(-1, -1, states.shape[-1])).float()


def nearest_kept(keys: Tensor, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
    """For every token at `(H, n)` evicted positions, the kept one, of `(H, m)`, whose key has the highest cosine.

    The cosines `(H, n)` fp32, and the slots `(H, n)` int64, in 0 .. m - 1.
    """
    units = unit_keys(keys)
    kept_units = tokens_at(units, kept).transpose(1, 2)
    blocks = [(tokens_at(units, block) @ kept_units).max(-1) for block in evicted.split(BLOCK_TOKENS, dim=1)]
    return torch.cat([block.values for block in blocks], 1), torch.cat([block.indices for block in blocks], 1)


def sum_by_slot(rows: Tensor, slots: Tensor, n_slots: int) -> Tensor:
    """Add up the rows `(H, n, C)` fp32 that go to the same of m slots `(H, n)`: `(H, m, C)`, 0 where none goes."""
    by_slot = slots.sort(dim=1, stable=True)
    ordered = rows.gather(1, by_slot.indices.unsqueeze(-1).expand_as(rows))
    bounds = torch.arange(n_slots + 1, device=slots.device).expand(slots.shape[0], -1).contiguous()
    offsets = torch.searchsorted(by_slot.values, bounds)
    return torch.segment_reduce(ordered, "sum", offsets=offsets, axis=1, unsafe=True)
