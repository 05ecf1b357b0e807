"""Where cached rows lie: pools of slots that many rows share, each row's blocks in them, and a table for the device.

A row has one block of slots per KV head in each layer. `Pool` hands blocks out, `LayerPools` writes what a policy kept
into them and says where (`Blocks`), `BlockTable` tells the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, DecodeSlots, constant_state, make_state, slot_state
from kvbench.ops.ragged_decode import Blocks, StateKey

GRANULE = 256
"""Pools grow to a multiple of this many slots, so that prompts of similar length do not each cause a reallocation."""


class Pool:
    """One tensor `(capacity, *slot_shape)` from whose front consecutive blocks of slots are handed out.

    Blocks are never freed one by one: `used = 0` forgets them all. The address of `storage`, uninitialised where
    nothing was written, changes only in `reserve`; `moves` counts how often.
    """

    def __init__(self, slot_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.storage: Tensor = torch.empty((0, *slot_shape), dtype=dtype, device=device)
        self.used = self.moves = 0

    def reserve(self, n_slots: int) -> None:
        """Make room for `n_slots` slots in all; existing blocks keep their contents and their offsets.

        The old storage and the new one coexist only while used slots have to be copied; an empty pool frees first.
        """
        if n_slots <= len(self.storage):
            return
        capacity = -(-n_slots // GRANULE) * GRANULE
        shape, dtype, device = self.storage.shape[1:], self.storage.dtype, self.storage.device
        old = self.storage[: self.used]
        self.storage = old.new_empty((0, *shape))  # drops the pool's own reference before the new block is requested
        if self.used == 0:
            del old
        with torch.inference_mode(False):  # storage outlives the block it is first needed in, and is written after it
            self.storage = torch.empty((capacity, *shape), dtype=dtype, device=device)
        if self.used:
            self.storage[: self.used].copy_(old)
        self.moves += 1

    def allocate(self, n_slots: int) -> tuple[int, Tensor]:
        """Hand out the next slots: the first one's number, and the uninitialised slots."""
        first = self.used
        self.reserve(first + n_slots)
        self.used = first + n_slots
        return first, self.storage[first : self.used]


class LayerPools:
    """The pools of one layer, on the device of the first compressed layer that is written."""

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.device, self.head_dim = device, head_dim
        self.keys = Pool((head_dim,), dtype, device)
        self.values = Pool((head_dim,), dtype, device)
        self.bias = Pool((), torch.float32, device)
        self.states: dict[StateKey, Pool] = {}

    @property
    def pools(self) -> list[Pool]:
        """All pools of the layer."""
        return [self.keys, self.values, self.bias, *self.states.values()]

    def reserve(self, n_slots: int) -> None:
        """Ask for keys and values beforehand: pools that grow row by row leave the allocator with holes."""
        self.keys.reserve(n_slots)
        self.values.reserve(n_slots)

    def write(self, layer: CompressedLayer, room: int) -> Blocks:
        """Copy one row's compressed layer into the pools, `room` slots added to each head, and say where it lies.

        Padding beyond `layer.lengths` is not stored (one host synchronisation).
        """
        n_heads, n_slots, _ = layer.keys.shape
        ragged = layer.lengths is not None
        lengths = [n_slots] * n_heads if layer.lengths is None else layer.lengths.tolist()
        total = sum(lengths) + n_heads * room
        first, keys = self.keys.allocate(total)
        _, values = self.values.allocate(total)
        blocks = Blocks(first, lengths, room, ragged)
        where = _ragged_slots(lengths, room, n_slots, self.device) if ragged else None
        _copy(layer.keys, keys, room, where)
        _copy(layer.values, values, room, where)
        if layer.bias is not None:
            blocks.first_bias, bias = self.bias.allocate(total)
            bias.zero_()  # new tokens have no bias
            _copy(layer.bias, bias, room, where)
        if layer.state is not None:
            blocks.state_class = type(layer.state)
            for name, state in slot_state(layer.state).items():
                key = (name, state.dtype, tuple(state.shape[2:]))
                if key not in self.states:
                    self.states[key] = Pool(key[2], state.dtype, self.device)
                blocks.states[key], slots = self.states[key].allocate(n_heads * (n_slots + room))
                slots.zero_()
                _copy(state, slots, room, None)
            if constants := constant_state(layer.state):
                with torch.inference_mode(False):  # takes longer than a launch, so only where there is something
                    blocks.constants = {name: value.detach().clone() for name, value in constants.items()}
        return blocks

    def read(self, blocks: Blocks, grown: int) -> CompressedLayer:
        """What one row holds, `grown` new tokens a head included, as `write` takes it; views unless it is ragged."""

        def gather(pool: Pool, bias: bool = False) -> Tensor:
            parts = [(r.first_bias if bias else r.first, r) for r in blocks.rectangles]
            heads = [blocks.view(pool.storage, first, part, part.length + grown) for first, part in parts]
            if not blocks.ragged:
                return heads[0]
            padded = heads[0].new_zeros(len(heads), max(blocks.lengths) + grown, *heads[0].shape[2:])
            for target, tensor in zip(padded, heads, strict=True):
                target[: tensor.shape[1]] = tensor[0]
            return padded

        state = self._state(blocks, blocks.lengths[0])
        lengths = torch.tensor(blocks.lengths) + grown if blocks.ragged else None
        bias = gather(self.bias, bias=True) if blocks.first_bias >= 0 else None
        return CompressedLayer(gather(self.keys), gather(self.values), lengths=lengths, bias=bias, state=state)

    def decode_slots(self, blocks: Blocks, step_index: Tensor) -> DecodeSlots:
        """What a policy's `step` sees of one row: views of the m slots and the scratch slot."""
        (rectangle,), n_slots = blocks.rectangles, blocks.lengths[0] + 1
        keys, values = (blocks.view(p.storage, blocks.first, rectangle, n_slots) for p in (self.keys, self.values))
        return DecodeSlots(keys, values, self._state(blocks, n_slots), step_index)

    def row_bytes(self, blocks: Blocks, steps: bool) -> int:
        """Bytes of one row: keys, values, bias and state of its kept slots, and its constants.

        A scratch slot (if the row steps) counts; room for new tokens does not: every arm needs it alike.
        """
        n_slots = sum(blocks.lengths) + (len(blocks.lengths) if steps else 0)
        per_slot = 2 * self.head_dim * self.keys.storage.element_size() + (4 if blocks.first_bias >= 0 else 0)
        per_slot += sum(math.prod(key[2]) * key[1].itemsize for key in blocks.states)
        return n_slots * per_slot + sum(c.numel() * c.element_size() for c in blocks.constants.values())

    def _state(self, blocks: Blocks, n_slots: int) -> object:
        rectangle, found = blocks.rectangles[0], blocks.states.items()
        views = {key[0]: blocks.view(self.states[key].storage, first, rectangle, n_slots) for key, first in found}
        return make_state(blocks.state_class, views | blocks.constants)


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


def lay_out(
    by_row: Sequence[Sequence[Blocks]], grown: Sequence[int], steps: Sequence[bool], n_query_heads: int
) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """Describe rows, each given by its blocks in all layers, what it has grown by and whether it steps.

    Returns tables by their names in `BlockTable`; per layer the attention weights of rows that step, `H * (m + 1)`
    each, and the slots that the longest block can hold.
    """

    def integers(name: str) -> Tensor:
        return torch.tensor([[getattr(blocks, name) for blocks in row] for row in by_row]).transpose(0, 1)

    kept, first, first_bias = integers("lengths"), integers("first")[..., None], integers("first_bias")[..., None]
    room = torch.tensor([row[0].room for row in by_row]).view(1, -1, 1)
    capacities = kept + room
    from_first = capacities.cumsum(-1) - capacities
    elements = n_query_heads * (kept.amax(-1) + 1) * torch.tensor(steps)
    columns = {
        "offsets": first + from_first,
        "lengths": kept + torch.tensor(grown).view(1, -1, 1),
        "limits": capacities - 1,
        "bias_offsets": torch.where(first_bias >= 0, first_bias + from_first, -1),
        "attention_offsets": torch.where(elements > 0, elements.cumsum(1) - elements, -1),
    }
    return columns, elements.sum(1).tolist(), capacities.amax((1, 2)).tolist()


class BlockTable:
    """Offsets, lengths and counters of all layers and rows on one device; their addresses never change.

    `advance` brings them to the next token with four launches, without the host. What `DecodePlan` names has a leading
    axis of layers here; `limits` are what `lengths` stop at (the last slot of a block is never passed), `step_index`
    the new tokens a row has seen, `position_ids` that of the next token.
    """

    def __init__(self, n_layers: int, max_rows: int, n_kv_heads: int, device: torch.device):
        blocks = (n_layers, max_rows, n_kv_heads)
        with torch.inference_mode(False):  # tables outlive the block they are first needed in
            self.offsets, self.bias_offsets = torch.zeros(2, *blocks, dtype=torch.int64, device=device)
            self.lengths, self.limits = torch.zeros(2, *blocks, dtype=torch.int32, device=device)
            self.attention_offsets = torch.zeros(blocks[:2], dtype=torch.int64, device=device)
            self.step_index = torch.zeros(max_rows, dtype=torch.int64, device=device)
            self.position_ids = torch.zeros(max_rows, 1, dtype=torch.int64, device=device)

    def fill(self, **columns: Tensor) -> None:
        """Copy host tables of the first B rows into place; names are those of the attributes."""
        for name, column in columns.items():
            target: Tensor = getattr(self, name)
            rows_axis = 1 if name.endswith(("offsets", "lengths", "limits")) else 0
            target.narrow(rows_axis, 0, column.shape[rows_axis]).copy_(column)

    def advance(self) -> None:
        """One token further for all rows; device operations only (rows beyond the batch count along, unread)."""
        torch.minimum(self.lengths + 1, self.limits, out=self.lengths)
        self.step_index.add_(1)
        self.position_ids.add_(1)


class SideStream:
    """A CUDA stream for launches whose results the rest of a layer does not need; without CUDA, no stream.

    The policies' one-launch steps are such work: small kernels that would leave the device idle, while only the next
    token's attention needs what they do. Inside a captured step the stream becomes a branch of the graph.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._busy = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Let launches of the block start after all before it, and run beside all after it until `join`."""
        if self._stream is None:
            yield
            return
        self._busy = True
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let what is launched from here on start after the work of all `beside` blocks so far."""
        if self._busy and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._busy = False
