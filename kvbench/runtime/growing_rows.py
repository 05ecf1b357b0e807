"""Rows of a decode batch whose end nobody knows: `generate` stops when it likes, and beams choose each other's caches.

`RaggedCache` gives every row its room beforehand. Here room is handed out in pieces, and whenever it is used up, or
rows are chosen anew, the blocks are copied into fresh arenas, layer by layer, so that no more than one layer ever
exists twice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from kvbench.methods.base import CompressedLayer, Policy, make_state, slot_state
from kvbench.runtime.cache import RaggedCache, _Row
from kvbench.runtime.layer import CacheLayer, RowExtent

ROOM_TOKENS = 32
"""New tokens a row has room for at a time: at most that many slots per head lie unused, and a copy of the cache is
spread over that many steps."""


class GrowingRows(RaggedCache):
    """A `RaggedCache` without a limit on new tokens; all rows see their tokens in step."""

    def add_prompts(self, policy: Policy, prompt_tokens: Sequence[int]) -> None:
        """Add one row per prompt; their layers are written next.

        Args:
            policy: the method of all rows.
            prompt_tokens: length of each prompt in tokens.
        """
        for n_tokens in prompt_tokens:
            self.add_row(policy, position=n_tokens, room_tokens=ROOM_TOKENS)

    def reserve_prompts(self, budgets: Sequence[Sequence[int]]) -> None:
        """Reserve storage for what will be written.

        Args:
            budgets: for each row the slots per KV head of each layer.
        """
        rooms = [row.room for row in self._rows]
        self.reserve(
            [
                self.n_kv_heads * sum(budget + room for budget, room in zip(layer, rooms, strict=True))
                for layer in zip(*budgets, strict=True)
            ]
        )

    def make_room(self) -> None:
        """Before a step: see to it that every row has room for the new token."""
        if any(not row.policy.steps and row.new_tokens >= row.room - 1 for row in self._rows):
            self.choose(range(self.rows), rewrite=True)

    def choose(self, rows: Sequence[int], *, rewrite: bool = False) -> None:
        """Make the batch the given rows, in that order; a row may be chosen more than once.

        Args:
            rows: indices of present rows, at most `max_rows` of them.
            rewrite: copy even if the rows stay as they are, to give each its full room.

        Raises:
            ValueError: if an index is out of range, or there are more than `max_rows`.
        """
        if len(rows) > self.max_rows or any(not 0 <= row < self.rows for row in rows):
            raise ValueError(f"rows {list(rows)} are not at most {self.max_rows} indices below {self.rows}")
        if not rewrite and list(rows) == list(range(self.rows)):
            return
        self._change()
        chosen = [copy.copy(self._rows[row]) for row in rows]
        for record in chosen:
            record.extents = [None] * self.n_layers
            if not record.policy.steps:
                record.position += record.new_tokens
                record.new_tokens = 0
        for index in range(self.n_layers):
            self._layers[index] = self._copy_layer(index, rows, chosen)
        self._rows = chosen

    def _copy_layer(self, index: int, rows: Sequence[int], chosen: list[_Row]) -> CacheLayer:
        """Copy one layer's blocks of the given rows into a fresh layer and note in `chosen` where they lie."""
        old = self._layer(index)
        kept = [read_row(old, self._extents(row)[index], self._rows[row].grown) for row in rows]
        fresh = CacheLayer(self.head_dim, self.dtype, old.device)
        n_slots = sum(layer.n_slots + self.n_kv_heads * chosen[0].room for layer in kept)
        fresh.keys.reserve(n_slots)
        fresh.values.reserve(n_slots)
        for record, layer in zip(chosen, kept, strict=True):
            record.extents[index] = fresh.write(layer, record.room)
        return fresh

    def layer_use(self, layer_index: int) -> tuple[int, int]:
        """What all rows keep of their prompts in one layer, as soon as it is written.

        Args:
            layer_index: the layer, from 0.

        Returns:
            Slots summed over rows and KV heads, and their bytes: see `RaggedCache.row_bytes`.
        """
        layer, slots, n_bytes = self._layer(layer_index), 0, 0
        for record in self._rows:
            extent = record.extents[layer_index]
            if extent is None:
                raise RuntimeError(f"layer {layer_index} is not written yet")
            slots += sum(extent.lengths)
            n_bytes += layer.row_bytes(extent, record.policy.steps)
        return slots, n_bytes


def read_row(layer: CacheLayer, extent: RowExtent, grown: int) -> CompressedLayer:
    """What one row holds in one layer, as `CacheLayer.write` takes it; views wherever the heads are of equal length.

    Args:
        layer: the arenas.
        extent: where the row lies.
        grown: slots per head that new tokens have added.

    Returns:
        The filled slots, new tokens included, without positions, which are not stored.
    """
    blocks = layer.blocks(extent, grown)
    longest = max(block.length for block in blocks)

    def gather(name: str) -> torch.Tensor:
        heads = [getattr(block, name)[:, : block.length] for block in blocks]
        if len(heads) == 1:
            return heads[0]
        padded = heads[0].new_zeros(len(heads), longest, *heads[0].shape[2:])
        for head, tensor in enumerate(heads):
            padded[head, : tensor.shape[1]] = tensor[0]
        return padded

    keys = gather("keys")
    state = None
    if extent.state_class is not None:
        step_index = torch.zeros((), dtype=torch.int64, device=layer.device)
        slots = layer.decode_slots(extent, step_index)
        views = {name: tensor[:, : extent.lengths[0]] for name, tensor in slot_state(slots.state).items()}
        state = make_state(extent.state_class, views | extent.constants)
    return CompressedLayer(
        keys=keys,
        values=gather("values"),
        lengths=torch.tensor([block.length for block in blocks]) if extent.ragged else None,
        bias=gather("bias") if extent.bias_offset >= 0 else None,
        state=state,
    )
