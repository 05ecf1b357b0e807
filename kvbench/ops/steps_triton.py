"""Decoding steps of all rows of a layer in one launch: the same as `H2O.step` and `CaM.step`, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from kvbench.ops.counter_rng import INCREMENT, MASK, MULTIPLIERS
from kvbench.ops.ragged_decode import Blocks, DecodePlan, StateKey
from kvbench.ops.steps import GROUP_REDUCTIONS, RowsStepper

BLOCK_SLOTS = 1024
BLOCK_TARGETS = 32
SCORES: StateKey = ("scores", torch.float32, ())
COUNTS: StateKey = ("counts", torch.float32, ())


@triton.jit
def group_attention(attention, stride, slots, mask, GROUP: tl.constexpr):
    """Sum, maximum and first of the group's attention at some slots (0 where masked)."""
    first = tl.load(attention + slots, mask=mask, other=0.0)
    total = first
    maximum = first
    for member in tl.static_range(1, GROUP):
        weights = tl.load(attention + member * stride + slots, mask=mask, other=0.0)
        total += weights
        maximum = tl.maximum(maximum, weights)
    return total, maximum, first


@triton.jit
def _h2o_kernel(
    table, keys, values, scores, counts, offsets, lengths, attention, attention_offsets, step_index,
    N_COLUMNS: tl.constexpr, N_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    """One row and KV head: count the attention, find the weakest heavy slot, move leaving and new token."""
    entry = table + (tl.program_id(0) // N_KV_HEADS) * N_COLUMNS
    head = tl.program_id(0) % N_KV_HEADS
    row = tl.load(entry)
    heavy = tl.load(entry + 1)
    recent = tl.load(entry + 2)
    reduction = tl.load(entry + 3)
    n_slots = tl.load(lengths + row * N_KV_HEADS + head)
    scores += tl.load(entry + 4) + head * (n_slots + 1)
    counted = False
    if HAS_COUNTS:
        counts_offset = tl.load(entry + 5)
        counted = counts_offset >= 0
        counts += counts_offset + head * (n_slots + 1)
    attention += tl.load(attention_offsets + row) + head * GROUP * (n_slots + 1)
    leaving = heavy + tl.load(step_index + row) % tl.maximum(recent, 1)  # without a window the new token, n_slots

    weakest_rank = float("inf")
    weakest = 0
    leaving_score = 0.0
    leaving_count = 0.0
    leaving_rank = 0.0
    for start in range(0, n_slots, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        valid = slots < n_slots
        total, maximum, first = group_attention(attention, n_slots + 1, slots, valid, GROUP)
        fresh = tl.where(reduction == 0, total / GROUP, tl.where(reduction == 1, maximum, first))
        updated = tl.load(scores + slots, mask=valid, other=0.0) + fresh
        tl.store(scores + slots, updated, mask=valid)
        ranks = updated
        is_leaving = slots == leaving
        if HAS_COUNTS:
            seen = tl.load(counts + slots, mask=valid & counted, other=0.0) + 1.0
            tl.store(counts + slots, seen, mask=valid & counted)
            ranks = tl.where(counted, updated / seen, updated)
            leaving_count += tl.sum(tl.where(is_leaving, seen, 0.0), axis=0)
        leaving_score += tl.sum(tl.where(is_leaving, updated, 0.0), axis=0)
        leaving_rank += tl.sum(tl.where(is_leaving, ranks, 0.0), axis=0)
        candidates = tl.where(slots < heavy, ranks, float("inf"))
        lowest = tl.min(candidates, axis=0)
        position = start + tl.argmin(candidates, axis=0)
        weakest = tl.where(lowest < weakest_rank, position, weakest)
        weakest_rank = tl.minimum(weakest_rank, lowest)
    total, maximum, first = group_attention(attention, n_slots + 1, n_slots, True, GROUP)
    new_score = tl.where(reduction == 0, total / GROUP, tl.where(reduction == 1, maximum, first))
    if recent == 0:
        leaving_score = new_score
        leaving_rank = new_score
        leaving_count = 1.0

    dims = tl.arange(0, BLOCK_DIM)
    mask = dims < HEAD_DIM
    block = tl.load(offsets + row * N_KV_HEADS + head)
    from_leaving = (block + leaving) * HEAD_DIM + dims
    from_new = (block + n_slots) * HEAD_DIM + dims
    leaving_key = tl.load(keys + from_leaving, mask=mask)
    leaving_value = tl.load(values + from_leaving, mask=mask)
    new_key = tl.load(keys + from_new, mask=mask)
    new_value = tl.load(values + from_new, mask=mask)
    tl.debug_barrier()  # the loop's stores and these loads come before the moves, whichever thread did them
    if (heavy > 0) & (leaving_rank >= weakest_rank):
        to_weakest = (block + weakest) * HEAD_DIM + dims
        tl.store(keys + to_weakest, leaving_key, mask=mask)
        tl.store(values + to_weakest, leaving_value, mask=mask)
        tl.store(scores + weakest, leaving_score)
        if HAS_COUNTS:
            tl.store(counts + weakest, leaving_count, mask=counted)
    tl.store(keys + from_leaving, new_key, mask=mask)
    tl.store(values + from_leaving, new_value, mask=mask)
    tl.store(scores + leaving, new_score)
    if HAS_COUNTS:
        tl.store(counts + leaving, 1.0, mask=counted)


class H2ORowsStepper(RowsStepper):
    """Steps all H2O rows of a layer, options differing from row to row included."""

    n_columns: ClassVar[int] = 5

    def columns(self, policy: Any, blocks: Blocks) -> list[int]:
        """Heavy and recent slots, code of the reduction, offsets of scores and counts (-1 without counts)."""
        reduction, states = GROUP_REDUCTIONS.index(policy.group_reduce), blocks.states
        return [*policy.split(blocks.lengths[0]), reduction, states[SCORES], states.get(COUNTS, -1)]

    def step(self, plan: DecodePlan, rows: Sequence[int]) -> None:
        """One launch: a program per row and KV head."""
        scores, head_dim = plan.states[SCORES], plan.keys.shape[1]
        _h2o_kernel[(len(rows) * self.n_kv_heads,)](
            self.table[plan.layer_index], plan.keys, plan.values, scores, plan.states.get(COUNTS, scores),
            plan.offsets, plan.lengths, plan.attention, plan.attention_offsets, plan.step_index,
            N_COLUMNS=self.table.shape[2], N_KV_HEADS=self.n_kv_heads, GROUP=self.group_size, HEAD_DIM=head_dim,
            BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK=BLOCK_SLOTS, HAS_COUNTS=COUNTS in plan.states,
            num_warps=4,
        )  # fmt: skip


@triton.jit
def absorb(state, word, INCREMENT: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """One round of `counter_rng.counter_hash` on int64 scalars: bit for bit the same."""
    state = ((state ^ (word.to(tl.int64) & MASK)) + INCREMENT) & MASK
    state = state ^ (state >> 16)
    state = (state * FIRST) & MASK
    state = state ^ (state >> 15)
    state = (state * SECOND) & MASK
    return state ^ (state >> 16)


@triton.jit
def _cam_kernel(
    table, hashes, keys, values, scores, offsets, lengths, attention, attention_offsets, step_index,
    INCREMENT: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    N_COLUMNS: tl.constexpr, N_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
    HAS_SCORES: tl.constexpr,
):  # fmt: skip
    """One row and KV head: count the attention, put the new token in the leaving one's place, merge the latter."""
    entry = table + (tl.program_id(0) // N_KV_HEADS) * N_COLUMNS
    head = tl.program_id(0) % N_KV_HEADS
    row = tl.load(entry)
    first_recent = tl.load(entry + 1)
    recent = tl.load(entry + 2)
    n_targets = tl.load(entry + 3)
    n_slots = tl.load(lengths + row * N_KV_HEADS + head)
    n_mean = tl.load(entry + 4)
    summed = False
    if HAS_SCORES:
        scores_offset = tl.load(entry + 5)
        summed = scores_offset >= 0
        scores += scores_offset + head * (n_slots + 1)
    attention += tl.load(attention_offsets + row) + head * GROUP * (n_slots + 1)
    step = tl.load(step_index + row)
    phase = step % recent
    leaving = first_recent + phase

    leaving_score = 0.0
    score_sum = 0.0
    for start in range(0, n_slots, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        valid = slots < n_slots
        total, _, _ = group_attention(attention, n_slots + 1, slots, valid, GROUP)
        updated = total / GROUP
        if HAS_SCORES:
            updated += tl.load(scores + slots, mask=valid & summed, other=0.0)
            tl.store(scores + slots, updated, mask=valid & summed)
        ahead = (slots - leaving + recent) % recent
        counts = valid & (slots >= first_recent) & (ahead >= 1) & (ahead <= n_mean)
        score_sum += tl.sum(tl.where(counts, updated, 0.0), axis=0)
        leaving_score += tl.sum(tl.where(slots == leaving, updated, 0.0), axis=0)
    total, _, _ = group_attention(attention, n_slots + 1, n_slots, True, GROUP)
    new_score = total / GROUP

    dims = tl.arange(0, BLOCK_DIM)
    mask = dims < HEAD_DIM
    block = tl.load(offsets + row * N_KV_HEADS + head)
    from_leaving = (block + leaving) * HEAD_DIM + dims
    from_new = (block + n_slots) * HEAD_DIM + dims
    leaving_value = tl.load(values + from_leaving, mask=mask, other=0.0).to(tl.float32)
    new_key = tl.load(keys + from_new, mask=mask)
    new_value = tl.load(values + from_new, mask=mask)
    tl.debug_barrier()  # the loop's stores and these loads come before the moves, whichever thread did them
    tl.store(keys + from_leaving, new_key, mask=mask)
    tl.store(values + from_leaving, new_value, mask=mask)
    if HAS_SCORES:
        tl.store(scores + leaving, new_score, mask=summed)
    if n_targets > 0:
        if n_mean == recent:  # the new token counts, too
            score_sum += new_score
        bits = tl.load(hashes + (tl.program_id(0) // N_KV_HEADS) * N_KV_HEADS + head)
        bits = absorb(bits, step, INCREMENT, MASK, FIRST, SECOND)
        uniform = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2 ** -24
        if uniform * (score_sum / n_mean) < leaving_score:
            share = leaving_value / n_targets
            tl.debug_barrier()  # the new token's value may be read below by other threads than wrote it
            for nearest in range(1, n_targets + 1, TARGETS):
                distance = nearest + tl.arange(0, TARGETS)
                targets = first_recent + (phase + distance) % recent
                at = (block + targets)[:, None] * HEAD_DIM + dims[None, :]
                there = (distance <= n_targets)[:, None] & mask[None, :]
                merged = tl.load(values + at, mask=there, other=0.0).to(tl.float32) + share[None, :]
                tl.store(values + at, merged.to(values.dtype.element_ty), mask=there)


class CaMRowsStepper(RowsStepper):
    """Steps all CaM rows of a layer, options differing from row to row included.

    Attributes:
        hashes: `(n_layers, max_rows, H_k)` int64, the rows' `head_hashes` in the order of the table.
    """

    n_columns: ClassVar[int] = 5

    def __init__(self, n_layers: int, max_rows: int, n_query_heads: int, n_kv_heads: int, device: torch.device):
        super().__init__(n_layers, max_rows, n_query_heads, n_kv_heads, device)
        with torch.inference_mode(False):
            self.hashes = torch.zeros(n_layers, max_rows, n_kv_heads, dtype=torch.int64, device=device)

    def prepare(self, plan: DecodePlan, rows: Sequence[int]) -> None:
        """As the base class, and gather the hashes on the device."""
        super().prepare(plan, rows)
        hashes = torch.stack([plan.blocks[row].constants["head_hashes"].view(-1) for row in rows])
        self.hashes[plan.layer_index, : len(rows)].copy_(hashes)

    def columns(self, policy: Any, blocks: Blocks) -> list[int]:
        """Start and recent slots, targets (0 without merging), tokens of the mean, offset of the scores or -1."""
        start, recent = policy.split(blocks.lengths[0])
        n_targets, n_mean = policy.gated(recent)
        return [start, recent, n_targets if policy.merge else 0, n_mean, blocks.states.get(SCORES, -1)]

    def step(self, plan: DecodePlan, rows: Sequence[int]) -> None:
        """One launch: a program per row and KV head."""
        head_dim = plan.keys.shape[1]
        _cam_kernel[(len(rows) * self.n_kv_heads,)](
            self.table[plan.layer_index], self.hashes[plan.layer_index], plan.keys, plan.values,
            plan.states.get(SCORES, plan.attention),
            plan.offsets, plan.lengths, plan.attention, plan.attention_offsets, plan.step_index,
            INCREMENT=INCREMENT, MASK=MASK, FIRST=MULTIPLIERS[0], SECOND=MULTIPLIERS[1],
            N_COLUMNS=self.table.shape[2], N_KV_HEADS=self.n_kv_heads, GROUP=self.group_size, HEAD_DIM=head_dim,
            BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK=BLOCK_SLOTS, TARGETS=BLOCK_TARGETS,
            HAS_SCORES=SCORES in plan.states, num_warps=4,
        )  # fmt: skip
