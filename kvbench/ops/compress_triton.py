"""What `selection`, `segments` and `merging` do with `kernels="triton"`, on the GPU: same arguments, same results.

Selecting is a bisection over the 32 bits of an order-preserving integer: count the entries at or above a candidate,
keep the bit if there are enough. A row stays in the cache of its multiprocessor, nothing is sorted, nothing is read
back to the host. Merging walks over the tokens of one set per program, in fp32 registers and token order; keys and
values are read once. There are no atomics, so all results are deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_PAIRS = 32
MAX_ROW_BLOCK = 8192
BLOCK_SLOTS = 16
BLOCK_TOKENS = 4
BLOCK_SCORES = 32
TINY = 1.1754943508222875e-38  # smallest normal fp32


@triton.jit
def _adjacent_cosines_kernel(
    keys, cosines, stride_head, stride_token, n_tokens,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of tokens of one head: cosine with the token before, -inf for token 0."""
    head = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_DIM)
    here = keys + head.to(tl.int64) * stride_head + tokens[:, None].to(tl.int64) * stride_token + dims[None, :]
    inside = (tokens[:, None] < n_tokens) & (dims[None, :] < HEAD_DIM)
    later = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    earlier = tl.load(here - stride_token, mask=inside & (tokens[:, None] > 0), other=0.0).to(tl.float32)
    length_later = tl.maximum(tl.sqrt(tl.sum(later * later, axis=1)), 1e-12)
    length_earlier = tl.maximum(tl.sqrt(tl.sum(earlier * earlier, axis=1)), 1e-12)
    cosine = tl.sum((later / length_later[:, None]) * (earlier / length_earlier[:, None]), axis=1)
    cosine = tl.where(tokens > 0, cosine, float("-inf"))
    tl.store(cosines + head.to(tl.int64) * n_tokens + tokens, cosine, mask=tokens < n_tokens)


@triton.jit
def ordered_bits(x):
    """Integers that compare like the floats (both zeros alike)."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def largest(row, n, k, BLOCK: tl.constexpr):
    """Bits of the k-th largest of `row[:n]`, and where, among its equals, the later ones that belong begin."""
    kth = tl.full([], -2147483648, tl.int64)
    for step in range(32):
        candidate = kth + (tl.full([], 1, tl.int64) << (31 - step))
        count = tl.full([], 0, tl.int32)
        for start in range(0, n, BLOCK):
            index = start + tl.arange(0, BLOCK)
            bits = ordered_bits(tl.load(row + index, mask=index < n, other=0.0))
            count += tl.sum(((bits >= candidate.to(tl.int32)) & (index < n)).to(tl.int32), axis=0)
        kth = tl.where(count >= k, candidate, kth)
    kth = kth.to(tl.int32)
    n_above = tl.full([], 0, tl.int32)
    n_equal = tl.full([], 0, tl.int32)
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        bits = ordered_bits(tl.load(row + index, mask=index < n, other=0.0))
        n_above += tl.sum(((bits > kth) & (index < n)).to(tl.int32), axis=0)
        n_equal += tl.sum(((bits == kth) & (index < n)).to(tl.int32), axis=0)
    skipped = n_equal - (k - n_above)
    cut = n
    seen = tl.full([], 0, tl.int32)
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        bits = ordered_bits(tl.load(row + index, mask=index < n, other=0.0))
        equal = ((bits == kth) & (index < n)).to(tl.int32)
        rank = seen + tl.cumsum(equal, axis=0)
        cut = tl.minimum(cut, tl.min(tl.where((equal > 0) & (rank > skipped), index, n), axis=0))
        seen += tl.sum(equal, axis=0)
    return kth, cut


@triton.jit
def _chain_starts_kernel(cosines, scores, starts, n_tokens, n_recent, n_top, n_slots, BLOCK: tl.constexpr):
    """One head: protected tokens, closest pairs, first token of every set."""
    head = tl.program_id(0).to(tl.int64)
    cosines += head * n_tokens
    scores += head * n_tokens
    starts += head * (n_slots + 1)
    older = n_tokens - n_recent
    top_bits, top_cut = largest(scores, older, n_top, BLOCK)
    for start in range(0, n_tokens, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < n_tokens
        here = ordered_bits(tl.load(scores + index, mask=inside, other=0.0))
        before = ordered_bits(tl.load(scores + index - 1, mask=inside & (index > 0), other=0.0))
        protected = (index >= older) | (here > top_bits) | ((here == top_bits) & (index >= top_cut))
        protected |= (before > top_bits) | ((before == top_bits) & (index - 1 >= top_cut))
        tl.store(cosines + index, float("-inf"), mask=inside & (protected | (index == 0)))
    tl.debug_barrier()  # what one thread forbids, another may read below
    link_bits, link_cut = largest(cosines, n_tokens, n_tokens - n_slots, BLOCK)
    seen = tl.full([], 0, tl.int32)
    for start in range(0, n_tokens, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < n_tokens
        bits = ordered_bits(tl.load(cosines + index, mask=inside, other=0.0))
        linked = (bits > link_bits) | ((bits == link_bits) & (index >= link_cut))
        begins = (inside & (linked == 0)).to(tl.int32)
        slots = seen + tl.cumsum(begins, axis=0) - 1
        tl.store(starts + slots, index.to(tl.int64), mask=begins > 0)
        seen += tl.sum(begins, axis=0)
    tl.store(starts + n_slots, n_tokens.to(tl.int64))


def exact_chain_starts(
    keys: Tensor, scores: Tensor, n_recent: int, n_top: int, n_slots: int, share_heads: bool
) -> Tensor:
    """Chained sets in two launches: all cosines, then a program per head; see `kvbench.ops.segments`."""
    n_heads, n_tokens, head_dim = keys.shape
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    cosines = torch.empty(n_heads, n_tokens, dtype=torch.float32, device=keys.device)
    _adjacent_cosines_kernel[(triton.cdiv(n_tokens, BLOCK_PAIRS), n_heads)](
        keys, cosines, keys.stride(0), keys.stride(1), n_tokens,
        HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK=BLOCK_PAIRS,
    )  # fmt: skip
    if share_heads:
        cosines = cosines.mean(0, keepdim=True)
    scores = scores.contiguous()
    starts = torch.empty(scores.shape[0], n_slots + 1, dtype=torch.int64, device=keys.device)
    block = min(triton.next_power_of_2(n_tokens), MAX_ROW_BLOCK)
    sizes = {"BLOCK": block, "num_warps": 16 if block >= 4096 else 4}
    _chain_starts_kernel[(scores.shape[0],)](cosines, scores, starts, n_tokens, n_recent, n_top, n_slots, **sizes)
    return starts.expand(n_heads, -1)


@triton.jit
def _select_kernel(ranks, positions, n_tokens, heavy, recent, BLOCK: tl.constexpr):
    """One head: positions of the `heavy` best of the older tokens, then of the last `recent`."""
    head = tl.program_id(0).to(tl.int64)
    ranks += head * n_tokens
    positions += head * (heavy + recent)
    older = n_tokens - recent
    bits, cut = largest(ranks, older, heavy, BLOCK)
    seen = tl.full([], 0, tl.int32)
    for start in range(0, n_tokens, BLOCK):
        index = start + tl.arange(0, BLOCK)
        here = ordered_bits(tl.load(ranks + index, mask=index < older, other=0.0))
        chosen = (index < older) & ((here > bits) | ((here == bits) & (index >= cut)))
        chosen = (chosen | (index >= older)) & (index < n_tokens)
        kept = chosen.to(tl.int32)
        tl.store(positions + seen + tl.cumsum(kept, axis=0) - 1, index.to(tl.int64), mask=chosen)
        seen += tl.sum(kept, axis=0)


@triton.jit
def _keep_kernel(
    keys, values, scores, positions, kept_keys, kept_values, kept_scores,
    key_stride_head, key_stride_token, value_stride_head, value_stride_token, n_tokens, n_slots,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of slots of one head: copy key, value and score."""
    head = tl.program_id(1).to(tl.int64)
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_DIM)
    valid = slots < n_slots
    tokens = tl.load(positions + head * n_slots + slots, mask=valid, other=0)
    inside = valid[:, None] & (dims[None, :] < HEAD_DIM)
    out = (head * n_slots + slots)[:, None] * HEAD_DIM + dims[None, :]
    key_rows = keys + head * key_stride_head + tokens[:, None] * key_stride_token + dims[None, :]
    value_rows = values + head * value_stride_head + tokens[:, None] * value_stride_token + dims[None, :]
    tl.store(kept_keys + out, tl.load(key_rows, mask=inside), mask=inside)
    tl.store(kept_values + out, tl.load(value_rows, mask=inside), mask=inside)
    score = tl.load(scores + head * n_tokens + tokens, mask=valid)
    tl.store(kept_scores + head * n_slots + slots, score, mask=valid)


def heavy_and_recent(ranks: Tensor, heavy: int, recent: int) -> Tensor:
    """Positions of the kept tokens, a program per head; see `kvbench.ops.selection`."""
    n_heads, n_tokens = ranks.shape
    ranks = ranks.contiguous()
    positions = torch.empty(n_heads, heavy + recent, dtype=torch.int64, device=ranks.device)
    block = min(triton.next_power_of_2(n_tokens), MAX_ROW_BLOCK)
    n_warps = 16 if block >= 4096 else 4
    _select_kernel[(n_heads,)](ranks, positions, n_tokens, heavy, recent, BLOCK=block, num_warps=n_warps)
    return positions


def keep_slots(keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the kept slots, each read once; see `kvbench.ops.selection`."""
    n_heads, n_tokens, head_dim = keys.shape
    n_slots = positions.shape[1]
    keys, values = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (keys, values))
    scores, positions = scores.contiguous(), positions.contiguous()
    kept_keys = torch.empty(n_heads, n_slots, head_dim, dtype=keys.dtype, device=keys.device)
    kept_values = torch.empty(n_heads, n_slots, head_dim, dtype=values.dtype, device=keys.device)
    kept_scores = torch.empty(n_heads, n_slots, dtype=scores.dtype, device=keys.device)
    _keep_kernel[(triton.cdiv(n_slots, BLOCK_SLOTS), n_heads)](
        keys, values, scores, positions, kept_keys, kept_values, kept_scores,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), n_tokens, n_slots,
        HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK=BLOCK_SLOTS,
    )  # fmt: skip
    return kept_keys, kept_values, kept_scores


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
    keys: Tensor, values: Tensor, pivot_scores: Tensor, starts: Tensor,
    sigma: float, mean_distance: bool, scale_values: bool, merge: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Merge each set into one slot, a program per set; the fields of `kvbench.ops.merging.MergedSegments`."""
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
    return merged_keys, merged_values, counts, pivots
