"""Exact chained sets on the GPU in two launches; the same result as `kvbench.ops.segments.exact_chain_starts`.

The first kernel computes the adjacent cosines. The second has one program per head, which finds the protected tokens,
forbids the pairs that touch one, selects the closest pairs and numbers the sets. Both selections are a bisection over
the 32 bits of an order-preserving integer: count the entries at or above a candidate, keep the bit if there are enough.
A row stays in the cache of its multiprocessor, nothing is sorted, nothing is read back to the host, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_PAIRS = 32
MAX_ROW_BLOCK = 8192


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
def _chain_starts_kernel(
    cosines, scores, starts, n_tokens, n_recent, n_top, n_slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
    """Chained sets that are exactly `n_slots` per head; see the torch twin for arguments and result."""
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
    _chain_starts_kernel[(scores.shape[0],)](
        cosines, scores, starts, n_tokens, n_recent, n_top, n_slots,
        BLOCK=block, num_warps=16 if block >= 4096 else 4,
    )  # fmt: skip
    return starts.expand(n_heads, -1)
