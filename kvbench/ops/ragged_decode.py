"""Attention of one new token per row over caches of different lengths: what a decode step needs, and nothing padded.

The rows of a decode batch are arms and samples whose caches differ in length, per layer and sometimes per head. All
keys of a layer lie in one flat pool; a row and KV head own one contiguous block of it. `ragged_decode` reads each
block exactly once, up to its own length. This module holds the torch version, which runs anywhere and is the reference
of the Triton version in `ragged_decode_triton.py`; both take the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbench.ops.observe import cap_logits

StateKey = tuple[str, torch.dtype, tuple[int, ...]]
"""Per-slot states of the same name, element type and slot shape share a pool."""


class Rectangle(NamedTuple):
    """Consecutive KV heads of one row that keep equally many slots: where they begin, in keys and in biases."""

    first: int
    first_bias: int
    n_heads: int
    length: int


@dataclass(slots=True)
class Blocks:
    """Where one row lies in one layer: a block of slots per KV head, one after the other, as the host knows it.

    Attributes:
        first: first slot of the first block, in the pools of keys and values.
        lengths: slots kept of the prompt, per KV head.
        room: slots after those: 1 (scratch) for a row that steps, the number of new tokens for a row that grows.
        ragged: whether the heads' lengths may differ; then each block has its own capacity.
        first_bias: first bias of the row, -1 without bias; its blocks follow each other like those of the keys.
        states: per pool of per-slot state, the first slot of the row; its H_k blocks have equal capacity.
        state_class: class of the policy's state, None without any.
        constants: the row's own copies of that state's constants, by field.
    """

    first: int
    lengths: list[int]
    room: int
    ragged: bool = False
    first_bias: int = -1
    states: dict[StateKey, int] = field(default_factory=dict)
    state_class: type[Any] | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rectangles(self) -> list[Rectangle]:
        """One for all heads, or one per head if they are ragged."""
        if not self.ragged:
            return [Rectangle(self.first, self.first_bias, len(self.lengths), self.lengths[0])]
        found, first, first_bias = [], self.first, self.first_bias
        for length in self.lengths:
            found.append(Rectangle(first, first_bias, 1, length))
            first += length + self.room
            first_bias += length + self.room if self.first_bias >= 0 else 0
        return found

    def view(self, pool: Tensor, first: int, rectangle: Rectangle, n_slots: int) -> Tensor:
        """`(heads, n_slots, ...)` view of a pool from slot `first` on."""
        width = pool.stride(0)  # numbers in a slot
        strides = (width * (rectangle.length + self.room), *pool.stride())
        return pool.as_strided(
            (rectangle.n_heads, n_slots, *pool.shape[1:]), strides, pool.storage_offset() + first * width
        )


@dataclass
class DecodePlan:
    """One layer's share of a decode step: pools, and where each row's blocks lie in them.

    The tensors serve the Triton version, `blocks` and `grown` the torch version; they describe the same slots. Every
    block already holds the new token's key and value at slot `lengths[row, head]`, so attention covers `lengths + 1`.

    Attributes:
        keys: `(N, D)` pool, model dtype.
        values: `(N, D)` pool.
        offsets: `(B, H_k)` int64, first slot of each block.
        lengths: `(B, H_k)` int32, filled slots before the new token.
        bias: `(N_b,)` fp32 pool of logit biases, or None if no row has any.
        bias_offsets: `(B, H_k)` int64, first bias of each block, -1 for rows without bias.
        attention: flat fp32 buffer in which the Triton version forms attention rows, or None if no row wants any.
        attention_offsets: `(B,)` int64, where a row's `(H, length + 1)` attention begins, -1 if it is not wanted.
        max_slots: no block will ever hold more slots than this, the new token included: fixes the launch grid.
        blocks: the host's view of the same, one per row.
        grown: slots per head that new tokens have added to each row so far; one list for all layers.
        layer_index: the layer, from 0.
        policies: the policy of each row.
        step_index: `(B,)` int64, 0 for a row's first new token.
        states: the pools of per-slot state.
        attention_views: for each row that steps alone the `(H, length + 1)` view of the buffer (Triton only).
        steps: rows whose policy steps on its own, by index: policy and its slots.
        steppers: steppers that serve several rows at once, each with the indices of these.
    """

    keys: Tensor
    values: Tensor
    offsets: Tensor
    lengths: Tensor
    bias: Tensor | None
    bias_offsets: Tensor
    attention: Tensor | None
    attention_offsets: Tensor
    max_slots: int
    blocks: Sequence[Blocks]
    grown: list[int]
    layer_index: int
    policies: Sequence[Any]
    step_index: Tensor
    states: dict[StateKey, Tensor] = field(default_factory=dict)
    attention_views: dict[int, Tensor] = field(default_factory=dict)
    steps: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    steppers: list[tuple[Any, list[int]]] = field(default_factory=list)


def ragged_decode(
    query: Tensor, plan: DecodePlan, scaling: float, attention_rows: Sequence[int] = (), softcap: float | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Attention of one new token per row, in torch.

    Args:
        query: `(B, H, D)`, model dtype.
        plan: the rows' caches with the new token written.
        scaling: factor on the logits.
        attention_rows: rows whose softmax attention is returned; their heads must not be ragged.
        softcap: bound that logits are soft-capped to (Gemma 2) before a bias is added, or None; torch only.

    Returns:
        The output `(B, H, D)` in the query's dtype, and for each row of `attention_rows` its attention
        `(H, length + 1)` fp32.
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    attention: dict[int, Tensor] = {}
    for row, (blocks, grown) in enumerate(zip(plan.blocks, plan.grown, strict=True)):
        if row in attention_rows and blocks.ragged:
            raise ValueError(f"row {row} has ragged heads: its attention has no rectangular shape")
        group_size, head = query.shape[1] // len(blocks.lengths), 0
        for rectangle in blocks.rectangles:
            n_slots = rectangle.length + grown + 1
            keys = blocks.view(plan.keys, rectangle.first, rectangle, n_slots)
            values = blocks.view(plan.values, rectangle.first, rectangle, n_slots)
            heads = slice(head, head + rectangle.n_heads * group_size)
            grouped = query[row, heads].reshape(rectangle.n_heads, group_size, -1)
            logits = torch.bmm(grouped, keys.transpose(1, 2)).float().mul_(scaling)
            cap_logits(logits, softcap)
            if plan.bias is not None and rectangle.first_bias >= 0:
                logits += blocks.view(plan.bias, rectangle.first_bias, rectangle, n_slots)[:, None]
            weights = torch.softmax(logits, -1)
            output[row, heads].view_as(grouped).copy_(torch.bmm(weights.to(values.dtype), values))
            head = heads.stop
        if row in attention_rows:
            attention[row] = weights.flatten(0, 1)
    return output, attention


def write_token(new_keys: Tensor, new_values: Tensor, plan: DecodePlan) -> None:
    """Write every row's new key and value `(B, H_k, 1, D)` to slot `length` of its blocks, in torch."""
    slots = (plan.offsets + plan.lengths).view(-1)
    plan.keys.index_copy_(0, slots, new_keys.reshape(-1, new_keys.shape[-1]))
    plan.values.index_copy_(0, slots, new_values.reshape(-1, new_values.shape[-1]))
