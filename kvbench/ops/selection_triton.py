"""Select and copy the kept slots on the GPU in two launches; the same operations as `kvbench.ops.selection`.

The first kernel has one program per head, which bisects for the best ranks (see `segments_triton.largest`) and writes
the positions in order; the second copies keys, values and scores, each read once. Nothing is sorted or read back to
the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.ops.segments_triton import MAX_ROW_BLOCK, largest, ordered_bits

BLOCK_SLOTS = 16


@triton.jit
def _select_kernel(
    ranks, positions, n_tokens, heavy, recent,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
    """Positions of the kept tokens; see `kvbench.ops.selection.heavy_and_recent`."""
    n_heads, n_tokens = ranks.shape
    ranks = ranks.contiguous()
    positions = torch.empty(n_heads, heavy + recent, dtype=torch.int64, device=ranks.device)
    block = min(triton.next_power_of_2(n_tokens), MAX_ROW_BLOCK)
    _select_kernel[(n_heads,)](
        ranks, positions, n_tokens, heavy, recent, BLOCK=block, num_warps=16 if block >= 4096 else 4
    )
    return positions


def keep_slots(keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the kept slots; see `kvbench.ops.selection.keep_slots`."""
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
