"""One layer's share of a ragged cache: its arenas, and per row where the blocks lie in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, DecodeSlots, constant_state, make_state, slot_state
from kvbench.ops.ragged_decode import HeadBlock
from kvbench.runtime.arena import Arena

StateKey = tuple[str, torch.dtype, tuple[int, ...]]
"""States of the same name, element type and slot shape share an arena."""


@dataclass
class RowExtent:
    """Where one row lies in one layer.

    Attributes:
        offsets: first slot of each KV head's block in the key and value arenas.
        lengths: slots kept of the prompt, per KV head.
        room: slots after those: 1 (scratch) for a row that steps, the number of new tokens for a row that grows.
        ragged: whether the heads' lengths may differ; then each block has its own capacity.
        bias_offset: first bias of the row, -1 without bias; its blocks follow each other like those of the keys.
        states: per arena of per-slot state, the first slot of the row; its H_k blocks have equal capacity.
        state_class: class of the policy's state, None without any.
        constants: the row's own copies of that state's constants, by field.
    """

    offsets: list[int]
    lengths: list[int]
    room: int
    ragged: bool
    bias_offset: int
    states: dict[StateKey, int]
    state_class: type[Any] | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bias_offsets(self) -> list[int]:
        """First bias of each head's block, -1 without bias."""
        if self.bias_offset < 0:
            return [-1] * len(self.offsets)
        return [self.bias_offset + offset - self.offsets[0] for offset in self.offsets]

    @property
    def max_slots(self) -> int:
        """Slots the longest head can hold."""
        return max(self.lengths) + self.room


class CacheLayer:
    """Arenas of one layer; all of its tensors live on the device of the first compressed layer that is written.

    Args:
        head_dim: D.
        dtype: of keys and values.
        device: where to put the arenas.
    """

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.device = device
        self.head_dim = head_dim
        self.keys = Arena((head_dim,), dtype, device)
        self.values = Arena((head_dim,), dtype, device)
        self.bias = Arena((), torch.float32, device)
        self.states: dict[StateKey, Arena] = {}

    @property
    def arenas(self) -> list[Arena]:
        """All arenas of the layer."""
        return [self.keys, self.values, self.bias, *self.states.values()]

    def write(self, layer: CompressedLayer, room: int) -> RowExtent:
        """Copy one row's compressed layer into the arenas.

        Args:
            layer: the kept slots; padding beyond `layer.lengths` is not stored (one host synchronisation).
            room: slots to add after those of each head.

        Returns:
            Where the row now lies.
        """
        n_heads, n_slots, _ = layer.keys.shape
        ragged = layer.lengths is not None
        lengths = [n_slots] * n_heads if layer.lengths is None else layer.lengths.tolist()
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length + room)
        total = starts.pop()
        first = self.keys.allocate(total)
        self.values.allocate(total)
        extent = RowExtent([first + s for s in starts], lengths, room, ragged, -1, {})
        where = _ragged_slots(lengths, room, n_slots, self.device) if ragged else None
        _copy(layer.keys, self.keys.storage[first : first + total], room, where)
        _copy(layer.values, self.values.storage[first : first + total], room, where)
        if layer.bias is not None:
            extent.bias_offset = self.bias.allocate(total)
            blocks = self.bias.storage[extent.bias_offset : extent.bias_offset + total]
            blocks.zero_()  # new tokens have no bias
            _copy(layer.bias, blocks, room, where)
        extent.state_class = None if layer.state is None else type(layer.state)
        for name, state in slot_state(layer.state).items():
            key = (name, state.dtype, tuple(state.shape[2:]))
            if key not in self.states:
                self.states[key] = Arena(key[2], state.dtype, self.device)
            arena, count = self.states[key], n_heads * (n_slots + room)
            extent.states[key] = arena.allocate(count)
            blocks = arena.storage[extent.states[key] : extent.states[key] + count]
            blocks.zero_()
            _copy(state, blocks, room, None)
        if constants := constant_state(layer.state):
            with torch.inference_mode(False):  # takes longer than a launch, so only where there is something to copy
                extent.constants = {name: value.detach().clone() for name, value in constants.items()}
        return extent

    def blocks(self, extent: RowExtent, grown: int) -> list[HeadBlock]:
        """One row's blocks for the torch version of attention; new tokens have added `grown` slots to each head."""
        heads = list(zip(extent.offsets, extent.bias_offsets, extent.lengths, strict=True))
        n_heads = 1
        if not extent.ragged:
            heads, n_heads = heads[:1], len(heads)
        return [
            HeadBlock(
                keys=_rectangle(self.keys, offset, n_heads, length + extent.room),
                values=_rectangle(self.values, offset, n_heads, length + extent.room),
                bias=_rectangle(self.bias, bias_offset, n_heads, length + extent.room) if bias_offset >= 0 else None,
                length=length + grown,
            )
            for offset, bias_offset, length in heads
        ]

    def decode_slots(self, extent: RowExtent, step_index: Tensor) -> DecodeSlots:
        """What a policy's `step` sees of one row: views of the m slots and the scratch slot."""
        n_heads, n_slots = len(extent.offsets), extent.lengths[0] + 1
        views = {
            key[0]: _rectangle(self.states[key], offset, n_heads, n_slots) for key, offset in extent.states.items()
        }
        return DecodeSlots(
            keys=_rectangle(self.keys, extent.offsets[0], n_heads, n_slots),
            values=_rectangle(self.values, extent.offsets[0], n_heads, n_slots),
            state=make_state(extent.state_class, views | extent.constants),
            step_index=step_index,
        )

    def row_bytes(self, extent: RowExtent, scratch: bool) -> int:
        """Bytes of one row: keys, values, bias and state of its kept slots, and its constants.

        Args:
            extent: where the row lies.
            scratch: whether the room is a scratch slot, which counts; room for new tokens does not, because every arm
                needs as much of it as the full cache.

        Returns:
            Bytes.
        """
        n_slots = sum(extent.lengths) + (len(extent.lengths) if scratch else 0)
        per_slot = 2 * self.head_dim * self.keys.storage.element_size()
        if extent.bias_offset >= 0:
            per_slot += 4
        per_slot += sum(math.prod(key[2]) * key[1].itemsize for key in extent.states)
        return n_slots * per_slot + sum(c.numel() * c.element_size() for c in extent.constants.values())


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

    def gather(name: str) -> Tensor:
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


def _rectangle(arena: Arena, offset: int, n_heads: int, capacity: int) -> Tensor:
    """`(H_k, capacity, ...)` view of a row's blocks."""
    return arena.storage[offset : offset + n_heads * capacity].unflatten(0, (n_heads, capacity))


def _ragged_slots(lengths: list[int], room: int, padded: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For all kept slots of a ragged row: index in the padded `(H_k * m)` source, index in the row's blocks."""
    source, target, start = [], [], 0
    for head, length in enumerate(lengths):
        slots = torch.arange(length)
        source.append(slots + head * padded)
        target.append(slots + start)
        start += length + room
    return torch.cat(source).to(device), torch.cat(target).to(device)


def _copy(source: Tensor, target: Tensor, room: int, ragged: tuple[Tensor, Tensor] | None) -> None:
    """Copy `(H_k, m, ...)` into a row's consecutive blocks, leaving the room after each head untouched."""
    if ragged is not None:
        target[ragged[1]] = source.flatten(0, 1)[ragged[0]].to(target.dtype)
        return
    n_heads, n_slots = source.shape[:2]
    target.view(n_heads, n_slots + room, *target.shape[1:])[:, :n_slots].copy_(source)
