"""`ragged_decode` on a GPU: every block is read once, cut into splits of its own length, and the splits are merged.

Grid of the first kernel: (row x KV head, split). A split's program reads a fixed number of slots and leaves a partial
softmax (maximum, sum, weighted values); programs beyond a block's length end at once. The grid follows from
`DecodePlan.max_slots` alone, so that a step can be captured in a CUDA graph and replayed while rows grow. The second
kernel merges the partial results in a fixed order, hence deterministically, and turns stored logits into attention rows
where a policy asked for them. The query heads of a group share the loads of their keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.ops.ragged_decode import DecodePlan

LOG2_E = 1.0 / math.log(2.0)
MAX_SPLITS = 128
ATTENTION_CHUNK = 1024
TARGET_PROGRAMS = 1024  # several for each of 132 multiprocessors


@triton.jit(do_not_specialize=["n_splits"])
def _split_kernel(
    query, keys, values, bias, offsets, lengths, bias_offsets, attention, attention_offsets,
    partial_values, partial_max, partial_sum,
    logit_scale, query_row_stride, query_head_stride, n_splits,
    N_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_SLOTS: tl.constexpr, SPLIT_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ATTENTION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one row and KV head; logits are kept in base 2 (`logit_scale` and the bias include log2 e)."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    n_slots = tl.load(lengths + block) + 1
    first = split * SPLIT_SLOTS
    if first >= n_slots:
        return
    row = block // N_KV_HEADS
    kv_head = block % N_KV_HEADS
    last = tl.minimum(first + SPLIT_SLOTS, n_slots)
    offset = tl.load(offsets + block)
    dims = tl.arange(0, BLOCK_DIM)
    in_dims = dims < HEAD_DIM
    members = tl.arange(0, BLOCK_GROUP)
    in_group = members < GROUP
    heads = kv_head * GROUP + members
    bias_offset = -1
    if HAS_BIAS:
        bias_offset = tl.load(bias_offsets + block)
    attention_offset = -1
    if HAS_ATTENTION:
        attention_offset = tl.load(attention_offsets + row)

    query_rows = query + row * query_row_stride + heads * query_head_stride
    if BLOCK_GROUP == 1:
        queries = tl.load(query + row * query_row_stride + kv_head * query_head_stride + dims, mask=in_dims, other=0.0)
        queries = queries.to(tl.float32) * logit_scale
        running_values = tl.zeros([BLOCK_DIM], tl.float32)
        running_max = float("-inf")
        running_sum = 0.0
    else:
        queries = tl.load(query_rows[:, None] + dims[None, :], mask=in_group[:, None] & in_dims[None, :], other=0.0)
        running_values = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
        running_max = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
        running_sum = tl.zeros([BLOCK_GROUP], tl.float32)

    for start in tl.range(first, last, BLOCK_SLOTS, num_stages=STAGES):
        slots = start + tl.arange(0, BLOCK_SLOTS)
        valid = slots < last
        at = (offset + slots)[:, None] * HEAD_DIM + dims[None, :]
        mask = valid[:, None] & in_dims[None, :]
        tile_keys = tl.load(keys + at, mask=mask, other=0.0)
        tile_values = tl.load(values + at, mask=mask, other=0.0)
        shift = tl.zeros([BLOCK_SLOTS], tl.float32)
        if bias_offset >= 0:
            shift = tl.load(bias + bias_offset + slots, mask=valid, other=0.0) * 1.4426950408889634
        if BLOCK_GROUP == 1:
            logits = tl.sum(tile_keys.to(tl.float32) * queries[None, :], axis=1) + shift
            logits = tl.where(valid, logits, float("-inf"))
            if attention_offset >= 0:
                tl.store(attention + attention_offset + kv_head * n_slots + slots, logits, mask=valid)
            new_max = tl.maximum(running_max, tl.max(logits, axis=0))
            decay = tl.exp2(running_max - new_max)
            weights = tl.exp2(logits - new_max)
            running_sum = running_sum * decay + tl.sum(weights, axis=0)
            running_values = running_values * decay + tl.sum(weights[:, None] * tile_values.to(tl.float32), axis=0)
            running_max = new_max
        else:
            logits = tl.dot(queries, tl.trans(tile_keys), input_precision="ieee") * logit_scale + shift[None, :]
            logits = tl.where(valid[None, :], logits, float("-inf"))
            if attention_offset >= 0:
                where = attention + attention_offset + heads[:, None] * n_slots + slots[None, :]
                tl.store(where, logits, mask=in_group[:, None] & valid[None, :])
            new_max = tl.maximum(running_max, tl.max(logits, axis=1))
            decay = tl.exp2(running_max - new_max)
            weights = tl.exp2(logits - new_max[:, None])
            running_sum = running_sum * decay + tl.sum(weights, axis=1)
            running_values = running_values * decay[:, None] + tl.dot(
                weights.to(tile_values.dtype), tile_values, input_precision="ieee"
            )
            running_max = new_max

    if BLOCK_GROUP == 1:
        at_split = block * n_splits + split
        tl.store(partial_max + at_split, running_max)
        tl.store(partial_sum + at_split, running_sum)
        tl.store(partial_values + at_split * HEAD_DIM + dims, running_values, mask=in_dims)
    else:
        at_splits = (row * N_KV_HEADS * GROUP + heads) * n_splits + split
        tl.store(partial_max + at_splits, running_max, mask=in_group)
        tl.store(partial_sum + at_splits, running_sum, mask=in_group)
        where = partial_values + at_splits[:, None] * HEAD_DIM + dims[None, :]
        tl.store(where, running_values, mask=in_group[:, None] & in_dims[None, :])


@triton.jit(do_not_specialize=["n_splits"])
def _merge_kernel(
    output, lengths, attention, attention_offsets, partial_values, partial_max, partial_sum, n_splits,
    N_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, SPLIT_SLOTS: tl.constexpr, HAS_ATTENTION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row and query head; further programs along axis 1 normalise the row's attention."""
    row_head = tl.program_id(0)
    chunk = tl.program_id(1)
    row = row_head // (N_KV_HEADS * GROUP)
    head = row_head % (N_KV_HEADS * GROUP)
    n_slots = tl.load(lengths + row * N_KV_HEADS + head // GROUP) + 1
    attention_offset = -1
    if HAS_ATTENTION:
        attention_offset = tl.load(attention_offsets + row)
        if (chunk > 0) & ((attention_offset < 0) | (chunk * CHUNK >= n_slots)):
            return
    n_used = tl.cdiv(n_slots, SPLIT_SLOTS)
    splits = tl.arange(0, BLOCK_SPLITS)
    used = splits < n_used
    maxima = tl.load(partial_max + row_head * n_splits + splits, mask=used, other=float("-inf"))
    sums = tl.load(partial_sum + row_head * n_splits + splits, mask=used, other=0.0)
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(tl.exp2(maxima - maximum) * sums, axis=0)
    if chunk == 0:
        dims = tl.arange(0, BLOCK_DIM)
        in_dims = dims < HEAD_DIM
        merged = tl.zeros([BLOCK_DIM], tl.float32)
        for first in range(0, n_used, 16):
            some = first + tl.arange(0, 16)
            there = some < n_used
            some_maxima = tl.load(partial_max + row_head * n_splits + some, mask=there, other=float("-inf"))
            weights = tl.exp2(some_maxima - maximum)
            at = (row_head * n_splits + some)[:, None] * HEAD_DIM + dims[None, :]
            tile = tl.load(partial_values + at, mask=there[:, None] & in_dims[None, :], other=0.0)
            merged += tl.sum(weights[:, None] * tile, axis=0)
        merged = merged / total
        tl.store(output + row_head * HEAD_DIM + dims, merged.to(output.dtype.element_ty), mask=in_dims)
    if attention_offset >= 0:
        slots = chunk * CHUNK + tl.arange(0, CHUNK)
        where = attention + attention_offset + head * n_slots + slots
        logits = tl.load(where, mask=slots < n_slots, other=float("-inf"))
        tl.store(where, tl.exp2(logits - maximum) / total, mask=slots < n_slots)


@triton.jit
def _write_kernel(
    new_keys, new_values, keys, values, offsets, lengths,
    key_row_stride, key_head_stride, value_row_stride, value_head_stride,
    N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Copy the new token's key and value of one row and KV head to slot `length` of its block."""
    block = tl.program_id(0)
    row = block // N_KV_HEADS
    kv_head = block % N_KV_HEADS
    dims = tl.arange(0, BLOCK_DIM)
    mask = dims < HEAD_DIM
    at = (tl.load(offsets + block) + tl.load(lengths + block)) * HEAD_DIM + dims
    key = tl.load(new_keys + row * key_row_stride + kv_head * key_head_stride + dims, mask=mask)
    value = tl.load(new_values + row * value_row_stride + kv_head * value_head_stride + dims, mask=mask)
    tl.store(keys + at, key, mask=mask)
    tl.store(values + at, value, mask=mask)


class Launch(NamedTuple):
    """How the first kernel is cut: slots per split, slots per iteration within it, warps, stages of pipelining."""

    split_slots: int
    tile_slots: int
    warps: int
    stages: int


def default_launch(n_blocks: int, max_slots: int, group_size: int, dtype: torch.dtype) -> Launch:
    """How to cut the work of rows times KV heads; `scripts/bench_kernels.py --sweep ragged_decode` times alternatives.

    Matrix products in fp32 need small tiles, or registers spill.
    """
    slots = split_slots(n_blocks, max_slots)
    if dtype == torch.float32:
        return Launch(slots, 16 if group_size > 1 else 64, 4, 3)
    # Many programs of one warp each, on an H100 (copy there: 2.43 TB/s): for 32 and 40 KV heads within 1 % of the best
    # of seven ways to cut seven arms of 3,500 or 8,192 tokens, or fourteen rows: 2.45 to 2.65 TB/s, where tiles of 32
    # slots and two warps reached 2.2 to 2.5; for 8 KV heads 1.84 instead of 1.73.
    return Launch(slots, 16, 1, 3 if group_size > 1 else 2)


def split_slots(n_blocks: int, max_slots: int) -> int:
    """Slots per split: a power of two from 64 up, enough for many programs, but at most `MAX_SPLITS` a block."""
    by_programs = n_blocks * max_slots // TARGET_PROGRAMS
    by_limit = -(-max_slots // MAX_SPLITS)
    wanted = max(64, min(512, by_programs), by_limit)
    return 1 << (wanted - 1).bit_length()


def ragged_decode(
    query: Tensor, plan: DecodePlan, scaling: float, attention_rows: Sequence[int] = (), launch: Launch | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Attention of one new token per row, as the torch version; in two launches, cut by `default_launch` unless told.

    Attention rows are formed in `plan.attention` for the rows whose `attention_offsets` are not negative, and returned
    as views of it for `attention_rows`: valid until the next call that uses the same buffer. The last dimension of
    `query` is contiguous, and so is the output.
    """
    n_rows, n_heads, head_dim = query.shape
    n_kv_heads = plan.offsets.shape[1]
    group = n_heads // n_kv_heads
    block_group = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    block_dim = max(16, triton.next_power_of_2(head_dim))
    launch = launch or default_launch(n_rows * n_kv_heads, plan.max_slots, group, query.dtype)
    n_splits = -(-plan.max_slots // launch.split_slots)
    output = torch.empty((n_rows, n_heads, head_dim), dtype=query.dtype, device=query.device)
    partial_values = torch.empty((n_rows, n_heads, n_splits, head_dim), dtype=torch.float32, device=query.device)
    partial_max, partial_sum = torch.empty((2, n_rows, n_heads, n_splits), dtype=torch.float32, device=query.device)
    attention = plan.attention
    dummy = partial_max  # never read: stands in for tensors that the constant flags switch off
    _split_kernel[(n_rows * n_kv_heads, n_splits)](
        query, plan.keys, plan.values, dummy if plan.bias is None else plan.bias,
        plan.offsets, plan.lengths, plan.bias_offsets,
        dummy if attention is None else attention, plan.attention_offsets,
        partial_values, partial_max, partial_sum,
        scaling * LOG2_E, query.stride(0), query.stride(1), n_splits,
        N_KV_HEADS=n_kv_heads, GROUP=group, BLOCK_GROUP=block_group, HEAD_DIM=head_dim, BLOCK_DIM=block_dim,
        BLOCK_SLOTS=launch.tile_slots, SPLIT_SLOTS=launch.split_slots,
        HAS_BIAS=plan.bias is not None, HAS_ATTENTION=attention is not None, STAGES=launch.stages,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    n_chunks = 1 if attention is None else -(-plan.max_slots // ATTENTION_CHUNK)
    _merge_kernel[(n_rows * n_heads, n_chunks)](
        output, plan.lengths, dummy if attention is None else attention, plan.attention_offsets,
        partial_values, partial_max, partial_sum, n_splits,
        N_KV_HEADS=n_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_DIM=block_dim,
        BLOCK_SPLITS=triton.next_power_of_2(n_splits), SPLIT_SLOTS=launch.split_slots,
        HAS_ATTENTION=attention is not None, CHUNK=ATTENTION_CHUNK,
        num_warps=4,
    )  # fmt: skip
    return output, {row: plan.attention_views[row] for row in attention_rows}


def write_token(new_keys: Tensor, new_values: Tensor, plan: DecodePlan) -> None:
    """As the torch version, in one launch; any strides, but the last dimension is contiguous."""
    n_rows, n_kv_heads, _, head_dim = new_keys.shape
    _write_kernel[(n_rows * n_kv_heads,)](
        new_keys, new_values, plan.keys, plan.values, plan.offsets, plan.lengths,
        new_keys.stride(0), new_keys.stride(1), new_values.stride(0), new_values.stride(1),
        N_KV_HEADS=n_kv_heads, HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip
