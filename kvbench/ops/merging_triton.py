"""Merge each set of adjacent tokens in one pass on the GPU; the same operation as `kvbench.ops.merging`.

One program per (head, slot) walks over its own tokens: it finds the pivot, weighs every key by its distance to it,
adds up keys and values in fp32 registers in token order, and writes one key and one value. Keys and values are read
once, there is no temporary of the size of the cache and no atomic, so the result is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.ops.merging import MergedSegments

BLOCK_TOKENS = 4
BLOCK_SCORES = 32
TINY = 1.1754943508222875e-38  # smallest normal fp32


@triton.jit
def _squared_distances(key, pivot_key):
    """Squared distance of each row of a `(tokens, D)` tile from the pivot's key."""
    difference = pivot_key[None, :] - key
    return tl.sum(difference * difference, axis=1)


@triton.jit
def _merge_kernel(
    keys, values, scores, starts, merged_keys, merged_values, counts, pivots,
    key_stride_head, key_stride_token, value_stride_head, value_stride_token, score_stride_head, start_stride_head,
    n_slots, sigma,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, SCORES: tl.constexpr, SMALLEST: tl.constexpr,
    MEAN_DISTANCE: tl.constexpr, SCALE_VALUES: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """One set of one head."""
    slot = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(starts + head * start_stride_head + slot).to(tl.int32)
    end = tl.load(starts + head * start_stride_head + slot + 1).to(tl.int32)
    size = end - first
    keys += head * key_stride_head
    values += head * value_stride_head
    scores += head * score_stride_head
    out = head * n_slots + slot
    dims = tl.arange(0, BLOCK_DIM)
    in_dim = dims < HEAD_DIM

    best = tl.full([], float("-inf"), tl.float32)
    pivot = tl.full([], 0, tl.int32)
    for start in range(first, end, SCORES):
        tokens = start + tl.arange(0, SCORES)
        score = tl.load(scores + tokens, mask=tokens < end, other=float("-inf"))
        highest = tl.max(score, axis=0)
        latest = tl.max(tl.where((score == highest) & (tokens < end), tokens, -1), axis=0)
        pivot = tl.where(highest >= best, latest, pivot)
        best = tl.maximum(best, highest)
    tl.store(counts + out, size.to(tl.int64))
    tl.store(pivots + out, pivot.to(tl.int64))

    used = in_dim & (size > 0)
    pivot_row = pivot.to(tl.int64)
    pivot_key = tl.load(keys + pivot_row * key_stride_token + dims, mask=used, other=0.0).to(tl.float32)
    if MERGE:
        if MEAN_DISTANCE:
            distances = tl.full([], 0.0, tl.float32)
            for start in range(first, end, BLOCK):
                tokens = start + tl.arange(0, BLOCK)
                inside = (tokens[:, None] < end) & in_dim[None, :]
                rows = tokens[:, None].to(tl.int64)
                key = tl.load(keys + rows * key_stride_token + dims[None, :], mask=inside, other=0.0).to(tl.float32)
                distance = tl.sqrt(_squared_distances(key, pivot_key))
                distances += tl.sum(tl.where(tokens < end, distance, 0.0), axis=0)
            width = distances / (1.4142135623730951 * tl.maximum(size, 1).to(tl.float32))
            denominator = tl.maximum(2.0 * width * width, SMALLEST)
        else:
            denominator = 2.0 * sigma * sigma
        total = tl.full([], 0.0, tl.float32)
        key_sum = tl.zeros([BLOCK_DIM], tl.float32)
        value_sum = tl.zeros([BLOCK_DIM], tl.float32)
        for start in range(first, end, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            inside = (tokens[:, None] < end) & in_dim[None, :]
            rows = tokens[:, None].to(tl.int64)
            key = tl.load(keys + rows * key_stride_token + dims[None, :], mask=inside, other=0.0).to(tl.float32)
            value = tl.load(values + rows * value_stride_token + dims[None, :], mask=inside, other=0.0).to(tl.float32)
            squared = tl.where(tokens < end, _squared_distances(key, pivot_key), 0.0)
            gaussian = tl.where(tokens < end, tl.exp(-squared / denominator), 0.0)
            total += tl.sum(gaussian, axis=0)
            key_sum += tl.sum(gaussian[:, None] * key, axis=0)
            value_sum += tl.sum(gaussian[:, None] * value, axis=0)
        total = tl.where(size > 0, total, 1.0)
        key_sum = key_sum / total
        value_sum = value_sum / total
        if SCALE_VALUES:
            value_sum = value_sum * size.to(tl.float32)
    else:
        key_sum = pivot_key
        value_sum = tl.load(values + pivot_row * value_stride_token + dims, mask=used, other=0.0).to(tl.float32)
    tl.store(merged_keys + out * HEAD_DIM + dims, key_sum.to(merged_keys.dtype.element_ty), mask=in_dim)
    tl.store(merged_values + out * HEAD_DIM + dims, value_sum.to(merged_values.dtype.element_ty), mask=in_dim)


def merge_segments(
    keys: Tensor,
    values: Tensor,
    pivot_scores: Tensor,
    starts: Tensor,
    *,
    sigma: float,
    mean_distance: bool,
    scale_values: bool,
    merge: bool,
) -> MergedSegments:
    """Merge each set into one slot; see `kvbench.ops.merging.merge_segments` for arguments and result."""
    n_heads, _, head_dim = keys.shape
    n_slots = starts.shape[1] - 1
    keys, values, pivot_scores, starts = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (keys, values, pivot_scores, starts)
    )
    merged_keys = torch.empty(n_heads, n_slots, head_dim, dtype=keys.dtype, device=keys.device)
    merged_values = torch.empty(n_heads, n_slots, head_dim, dtype=values.dtype, device=keys.device)
    counts = torch.empty(n_heads, n_slots, dtype=torch.int64, device=keys.device)
    pivots = torch.empty_like(counts)
    _merge_kernel[(n_slots, n_heads)](
        keys, values, pivot_scores, starts, merged_keys, merged_values, counts, pivots,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), pivot_scores.stride(0), starts.stride(0),
        n_slots, sigma,
        HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK=BLOCK_TOKENS, SCORES=BLOCK_SCORES,
        SMALLEST=TINY, MEAN_DISTANCE=mean_distance, SCALE_VALUES=scale_values, MERGE=merge, num_warps=1,
    )  # fmt: skip
    return MergedSegments(merged_keys, merged_values, counts, pivots)
