"""Attention of one new token per row over caches of different lengths: what a decode step needs, and nothing padded.

The rows of a decode batch are arms and samples whose caches differ in length, per layer and sometimes per head. All
keys of a layer lie in one flat arena; a row and KV head own one contiguous block of it. `ragged_decode` reads each
block exactly once, up to its own length. This module holds the torch version, which runs anywhere and is the reference
of the Triton version in `decode_triton.py`; both take the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.ops.observe import cap_logits


@dataclass(slots=True)
class HeadBlock:
    """Consecutive KV heads of one row that hold equally many slots, as the host knows them: views of the arenas.

    A row is one block of all its heads, or one block per head if its heads are ragged.

    Attributes:
        keys: `(heads, capacity, D)`.
        values: `(heads, capacity, D)`.
        bias: `(heads, capacity)` fp32, or None.
        length: filled slots before the new token.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    length: int


@dataclass
class RaggedLayer:
    """All rows' caches in one layer: arenas, and where each row's blocks lie in them.

    The tensors serve the Triton version, `blocks` the torch version; they describe the same slots. Every block already
    holds the new token's key and value at slot `lengths[row, head]`, so attention covers `lengths + 1` slots.

    Attributes:
        keys: `(N, D)` arena, model dtype.
        values: `(N, D)` arena.
        offsets: `(B, H_k)` int64, first slot of each block.
        lengths: `(B, H_k)` int32, filled slots before the new token.
        bias: `(N_b,)` fp32 arena of logit biases, or None if no row has any.
        bias_offsets: `(B, H_k)` int64, first bias of each block, -1 for rows without bias.
        attention: flat fp32 buffer in which the Triton version forms attention rows, or None if no row wants any.
        attention_offsets: `(B,)` int64, where a row's `(H, length + 1)` attention begins, -1 if it is not wanted.
        max_slots: no block will ever hold more slots than this, the new token included: fixes the launch grid.
        blocks: the host's view of the same, one list of blocks per row; empty where the Triton version runs.
        attention_views: for each row that wants its attention the `(H, length + 1)` view of the buffer.
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
    blocks: list[list[HeadBlock]] = field(default_factory=list)
    attention_views: dict[int, Tensor] = field(default_factory=dict)


def ragged_decode(
    query: Tensor,
    layer: RaggedLayer,
    scaling: float,
    attention_rows: Sequence[int] = (),
    softcap: float | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Attention of one new token per row, in torch.

    Args:
        query: `(B, H, D)`, model dtype.
        layer: the rows' caches with the new token written.
        scaling: factor on the logits, usually `D ** -0.5`.
        attention_rows: rows whose softmax attention is returned; their heads must not be ragged.
        softcap: bound that logits are soft-capped to (Gemma 2) before a bias is added, or None; torch only.

    Returns:
        The output `(B, H, D)` in the query's dtype, and for each row of `attention_rows` its attention
        `(H, length + 1)` fp32.

    Raises:
        ValueError: if attention is asked of a row with ragged heads.
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wanted = set(attention_rows)
    attention: dict[int, Tensor] = {}
    for row, blocks in enumerate(layer.blocks):
        if row in wanted and len(blocks) > 1:
            raise ValueError(f"row {row} has ragged heads: its attention has no rectangular shape")
        group_size = query.shape[1] // sum(block.keys.shape[0] for block in blocks)
        head = 0
        for block in blocks:
            heads = slice(head, head + block.keys.shape[0] * group_size)
            weights = _attend_block(query[row, heads], block, scaling, output[row, heads], softcap)
            head = heads.stop
        if row in wanted:
            attention[row] = weights
    return output, attention


def write_token(new_keys: Tensor, new_values: Tensor, layer: RaggedLayer) -> None:
    """Write the new token's key and value of every row and head to slot `length` of its block, in torch.

    Args:
        new_keys: `(B, H_k, 1, D)`.
        new_values: likewise.
        layer: where to write.
    """
    slots = (layer.offsets + layer.lengths).view(-1)
    layer.keys.index_copy_(0, slots, new_keys.reshape(-1, new_keys.shape[-1]))
    layer.values.index_copy_(0, slots, new_values.reshape(-1, new_values.shape[-1]))


def _attend_block(query: Tensor, block: HeadBlock, scaling: float, output: Tensor, softcap: float | None) -> Tensor:
    """One block: writes `output`, shaped `(query heads, D)` like `query`, and returns the fp32 weights `(.., n)`."""
    n_slots = block.length + 1
    keys, values = block.keys[:, :n_slots], block.values[:, :n_slots]
    grouped = query.reshape(keys.shape[0], -1, keys.shape[2])
    logits = torch.bmm(grouped, keys.transpose(1, 2)).float().mul_(scaling)
    cap_logits(logits, softcap)
    if block.bias is not None:
        logits += block.bias[:, None, :n_slots]
    weights = torch.softmax(logits, -1)
    output.view_as(grouped).copy_(torch.bmm(weights.to(values.dtype), values))
    return weights.flatten(0, 1)
