"""The cache of a decode batch whose rows are arms and samples with different numbers of slots, stored without padding.

One `RaggedCache` is both the `past_key_values` of a transformers model (`update` writes the new token) and the
`attention_context` of its attention layers (`attend` reads what is stored). Prefill writes rows layer by layer; every
decode step is then one forward pass over all rows and one `advance`:

    cache = RaggedCache(n_layers, n_query_heads, n_kv_heads, head_dim, dtype)
    row = cache.add_row(policy, position=n_prompt_tokens, room_tokens=max_new_tokens)
    cache.write(layer_index, row, policy.compress(states, budget_tokens))        # for every layer
    model(input_ids, position_ids=cache.position_ids, past_key_values=cache, attention_context=cache, use_cache=True)
    cache.advance()

Nothing in a step depends on data, so the host knows every length beforehand: a step neither synchronises nor allocates
by data, and with the Triton backend it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from kvbench.attention.backend import choose_backend
from kvbench.attention.decode import RaggedLayer, ragged_decode
from kvbench.cache.layer import CacheLayer, RowExtent
from kvbench.cache.tables import DeviceTables
from kvbench.errors import ConfigError, ModelError
from kvbench.policies.base import CompressedLayer, DecodeSlots, Policy


class _Row:
    """What the host knows of a row beside its extents: its policy, where it started and how far it is."""

    def __init__(self, policy: Policy, position: int, room_tokens: int, n_layers: int):
        self.policy = policy
        self.position = position
        self.room = 1 if policy.steps else room_tokens
        self.new_tokens = 0
        self.extents: list[RowExtent | None] = [None] * n_layers

    @property
    def grown(self) -> int:
        """Slots per head that new tokens have added: at most the room less the slot that the next token needs."""
        return min(self.new_tokens, self.room - 1)


class RaggedCache(Cache):
    """Keys, values, biases and policy state of all rows of a decode batch.

    Args:
        n_layers: layers of the model.
        n_query_heads: H.
        n_kv_heads: H_k.
        head_dim: D.
        dtype: of keys and values, the model's dtype.
        backend: "auto", "torch" or "triton" (see `kvbench.attention.backend.choose_backend`).
        max_rows: most rows at a time; tables of that size are allocated once.

    Attributes:
        backends: names of the backends in use, for the record.

    Raises:
        ConfigError: if `n_query_heads` is no multiple of `n_kv_heads`.
    """

    def __init__(
        self,
        n_layers: int,
        n_query_heads: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        backend: str = "auto",
        max_rows: int = 64,
    ):
        super().__init__(layers=[])
        if n_query_heads % n_kv_heads:
            raise ConfigError(
                f"{n_query_heads} query heads are no multiple of {n_kv_heads} KV heads: check the model's configuration"
            )
        self.n_layers, self.n_query_heads, self.n_kv_heads = n_layers, n_query_heads, n_kv_heads
        self.head_dim, self.dtype, self.max_rows = head_dim, dtype, max_rows
        self.backend = backend
        self.backends: set[str] = set()
        self._rows: list[_Row] = []
        self._layers: list[CacheLayer | None] = [None] * n_layers
        self._tables: dict[torch.device, DeviceTables] = {}
        self._reserved_slots = 0
        self._moves = 0
        self._sealed: list[RaggedLayer] = []
        self._steps: list[dict[int, DecodeSlots]] = []
        self._dirty = True

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows in the batch, B."""
        return len(self._rows)

    def add_row(self, policy: Policy, position: int, room_tokens: int) -> int:
        """Add a row to the batch; its layers are written next.

        Args:
            policy: the method; a policy that steps keeps its size, any other row grows by a slot per new token.
            position: position id of the first new token, that is the number of prompt tokens.
            room_tokens: most new tokens the row will store (ignored for policies that step). A row that stays in the
                batch beyond that overwrites its last slot: no other row is harmed, its further answers mean nothing.

        Returns:
            The row's index.

        Raises:
            ConfigError: if the cache is full.
            ValueError: if `room_tokens` is less than 1.
        """
        if room_tokens < 1 and not policy.steps:
            raise ValueError(f"room_tokens={room_tokens} is less than 1: attention needs a slot for the new token")
        if len(self._rows) >= self.max_rows:
            raise ConfigError(
                f"row {len(self._rows) + 1} exceeds max_rows={self.max_rows}: decode fewer arms at once or raise it"
            )
        self._rows.append(_Row(policy, position, room_tokens, self.n_layers))
        self._dirty = True
        return len(self._rows) - 1

    def reserve(self, slots_per_layer: int) -> None:
        """Ask for room beforehand, so that writing rows does not grow the arenas step by step.

        Args:
            slots_per_layer: slots, summed over rows and KV heads, that keys and values of any layer will need, room
                for new tokens included. Takes effect in a layer when its device is known: at its first `write`.
        """
        self._reserved_slots = max(self._reserved_slots, slots_per_layer)
        for layer in self._layers:
            if layer is not None:
                self._reserve(layer)

    def write(self, layer_index: int, row: int, layer: CompressedLayer) -> None:
        """Copy what is left of one layer into the cache.

        Args:
            layer_index: the layer, from 0.
            row: a row's index.
            layer: the compressed layer; every tensor on the layer's device. Copied, so it may share memory.

        Raises:
            ValueError: if shapes or dtype do not fit the model, the row's layer is written already, or a policy that
                steps returns ragged heads or a bias on them that cannot move along.
        """
        record = self._rows[row]
        self._check(layer_index, row, layer)
        if self._layers[layer_index] is None:
            self._layers[layer_index] = CacheLayer(self.head_dim, self.dtype, layer.keys.device)
            self._reserve(self._layer(layer_index))
            if layer.keys.device not in self._tables:
                self._tables[layer.keys.device] = DeviceTables(
                    self.n_layers, self.max_rows, self.n_kv_heads, layer.keys.device
                )
        record.extents[layer_index] = self._layer(layer_index).write(layer, record.room)
        self._dirty = True

    def keep_rows(self, rows: list[int]) -> None:
        """Shrink the batch to some of its rows, which are renumbered in the order given.

        The storage of the others is reused after `clear` only.

        Args:
            rows: indices of rows to keep, each at most once.

        Raises:
            ValueError: if an index is repeated or out of range.
        """
        if len(set(rows)) != len(rows) or any(not 0 <= row < len(self._rows) for row in rows):
            raise ValueError(f"rows {rows} are not distinct indices below {len(self._rows)}")
        self._rows = [self._rows[row] for row in rows]
        self._dirty = True

    def clear(self) -> None:
        """Drop all rows; storage stays allocated at its addresses for the next batch."""
        self._rows = []
        for layer in self._layers:
            for arena in layer.arenas if layer is not None else ():
                arena.clear()
        self._dirty = True

    def row_slots(self, row: int) -> list[int]:
        """Prompt slots kept in each layer, summed over KV heads."""
        return [sum(extent.lengths) for extent in self._extents(row)]

    def row_bytes(self, row: int) -> int:
        """Bytes of what a row keeps of its prompt, over all layers: keys, values, bias, state, scratch slots.

        Room for new tokens is left out: every arm needs it alike.
        """
        record = self._rows[row]
        return sum(
            self._layer(index).row_bytes(extent, record.policy.steps) for index, extent in enumerate(self._extents(row))
        )

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all arenas, whether in use or not."""
        return sum(a.allocated_bytes for layer in self._layers if layer is not None for a in layer.arenas)

    # ---- decode steps ----------------------------------------------------------------------------------------------

    @property
    def position_ids(self) -> Tensor:
        """`(B, 1)` int64 position ids of the next token, on the first layer's device; `advance` adds 1 in place."""
        self.prepare()
        return self._tables[self._layer(0).device].position_ids[: len(self._rows)]

    def prepare(self) -> None:
        """Bring the device tables up to date after the batch has changed; called by the first `update` otherwise.

        Raises:
            RuntimeError: if the batch is empty or a layer of a row was not written.
        """
        if self._dirty:
            self._seal()
            self._dirty = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new token of every row into one layer (called by the model's attention module).

        Args:
            key_states: `(B, H_k, 1, D)` after RoPE.
            value_states: `(B, H_k, 1, D)`.
            layer_idx: the layer.
            *args: ignored, for other versions of transformers.
            **kwargs: ignored, likewise.

        Returns:
            The arguments: `attend` reads the cache itself.

        Raises:
            ValueError: if the shapes do not fit the batch.
            RuntimeError: as `prepare`.
        """
        self.prepare()
        expected = (len(self._rows), self.n_kv_heads, 1, self.head_dim)
        if tuple(key_states.shape) != expected:
            raise ValueError(f"new keys have shape {tuple(key_states.shape)}, the batch needs {expected}")
        layer = self._sealed[layer_idx]
        slots = (layer.offsets + layer.lengths).view(-1)
        layer.keys.index_copy_(0, slots, key_states.reshape(-1, self.head_dim))
        layer.values.index_copy_(0, slots, value_states.reshape(-1, self.head_dim))
        return key_states, value_states

    def attend(
        self,
        layer_index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        """Attention of the new tokens over their rows, then the step of the rows whose policy has one.

        Args:
            layer_index: the layer, from 0.
            query: `(B, H, 1, D)` after RoPE.
            key: ignored: `update` has stored it.
            value: ignored, likewise.
            scaling: factor on the logits.
            sliding_window: the layer's window in tokens, if it has one.

        Returns:
            `(B, 1, H, D)`.

        Raises:
            ModelError: if a row has seen more tokens than the layer's window: its slots no longer tell their distance.
        """
        if sliding_window is not None and self.get_seq_length() + 1 > sliding_window:
            raise ModelError(
                f"{self.get_seq_length() + 1} tokens exceed layer {layer_index}'s sliding window of {sliding_window}: "
                "set max_prompt_tokens so that prompt and answer fit into the window"
            )
        steps = self._steps[layer_index]
        output, attention = ragged_decode(query.squeeze(2), self._sealed[layer_index], scaling, tuple(steps))
        for row, slots in steps.items():
            for state in slots.state.values():
                state[:, -1] = 0
            self._rows[row].policy.step(slots, attention[row])
        return output.unsqueeze(1)

    def advance(self) -> None:
        """Go on to the next token after a forward pass: lengths, positions and step counters, on device and host."""
        self.advance_device()
        self.count_step()

    def advance_device(self) -> None:
        """The device's half of `advance`: what belongs into a captured step."""
        for tables in self._tables.values():
            tables.advance()

    def count_step(self) -> None:
        """The host's half of `advance`: to be called after each replay of a captured step."""
        for index, row in enumerate(self._rows):
            before = row.grown
            row.new_tokens += 1
            if row.grown == before or self._dirty:
                continue
            for layer in self._sealed:
                for block in layer.blocks[index]:
                    block.length += 1

    def room_left(self, row: int) -> int | None:
        """New tokens a row can still store; None for a row that steps, which always can."""
        record = self._rows[row]
        return None if record.policy.steps else record.room - record.new_tokens

    @property
    def generation(self) -> int:
        """Grows whenever an address that a captured step could use has changed."""
        return self._moves + sum(a.moves for layer in self._layers if layer is not None for a in layer.arenas)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _layer(self, layer_index: int) -> CacheLayer:
        layer = self._layers[layer_index]
        if layer is None:
            raise RuntimeError(f"layer {layer_index} was never written: write every layer of a row before decoding")
        return layer

    def _extents(self, row: int) -> list[RowExtent]:
        extents = self._rows[row].extents
        missing = [index for index, extent in enumerate(extents) if extent is None]
        if missing:
            raise RuntimeError(f"row {row} lacks layers {missing}: write every layer of a row before decoding")
        return [extent for extent in extents if extent is not None]

    def _reserve(self, layer: CacheLayer) -> None:
        layer.keys.reserve(self._reserved_slots)
        layer.values.reserve(self._reserved_slots)

    def _check(self, layer_index: int, row: int, layer: CompressedLayer) -> None:
        """Refuse what does not fit the model; these are defects of a policy or the caller, not of a configuration."""
        policy = self._rows[row].policy
        if self._rows[row].extents[layer_index] is not None:
            raise ValueError(f"layer {layer_index} of row {row} is written already")
        shape = (self.n_kv_heads, layer.keys.shape[1], self.head_dim)
        for name, tensor in (("keys", layer.keys), ("values", layer.values)):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{policy.name}: {name} have shape {tuple(tensor.shape)}, the cache needs {shape}")
            if tensor.dtype != self.dtype:
                raise ValueError(f"{policy.name}: {name} are {tensor.dtype}, the cache stores {self.dtype}")
        for name, state in (("bias", layer.bias), *layer.state.items()):
            if state is not None and state.shape[:2] != shape[:2]:
                raise ValueError(f"{policy.name}: {name} has shape {tuple(state.shape)}, the cache needs {shape[:2]}")
        if layer.lengths is not None and policy.steps:
            raise ValueError(f"{policy.name} steps and returns ragged heads: a step needs heads of equal length")

    def _seal(self) -> None:
        """Build the device tables and the host's views from the rows' extents."""
        if not self._rows:
            raise RuntimeError("the cache has no rows: add and write rows before decoding")
        by_layer = list(zip(*(self._extents(row) for row in range(len(self._rows))), strict=True))
        grown = [row.grown for row in self._rows]

        def table(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype)

        columns = {
            "offsets": table([[e.offsets for e in extents] for extents in by_layer]),
            "lengths": table(
                [[[n + g for n in e.lengths] for e, g in zip(extents, grown, strict=True)] for extents in by_layer],
                torch.int32,
            ),
            "limits": table(
                [[[n + e.room - 1 for n in e.lengths] for e in extents] for extents in by_layer], torch.int32
            ),
            "bias_offsets": table([[e.bias_offsets for e in extents] for extents in by_layer]),
            "step_index": table([row.new_tokens for row in self._rows]),
            "position_ids": table([[row.position + row.new_tokens] for row in self._rows]),
        }
        for tables in self._tables.values():
            tables.fill(**columns)
        self._sealed = [self._ragged_layer(index, list(extents)) for index, extents in enumerate(by_layer)]
        self._steps = [self._decode_slots(index, list(extents)) for index, extents in enumerate(by_layer)]

    def _ragged_layer(self, index: int, extents: list[RowExtent]) -> RaggedLayer:
        layer, n_rows = self._layer(index), len(extents)
        tables = self._tables[layer.device]
        self.backends.add(choose_backend(self.backend, layer.device))
        return RaggedLayer(
            keys=layer.keys.storage,
            values=layer.values.storage,
            offsets=tables.offsets[index, :n_rows],
            lengths=tables.lengths[index, :n_rows],
            bias=layer.bias.storage if any(e.bias_offset >= 0 for e in extents) else None,
            bias_offsets=tables.bias_offsets[index, :n_rows],
            attention=None,
            attention_offsets=tables.attention_offsets[index, :n_rows],
            max_slots=max(e.max_slots for e in extents),
            blocks=[layer.blocks(e, row.grown) for e, row in zip(extents, self._rows, strict=True)],
        )

    def _decode_slots(self, index: int, extents: list[RowExtent]) -> dict[int, DecodeSlots]:
        layer = self._layer(index)
        step_index = self._tables[layer.device].step_index
        return {
            row: layer.decode_slots(extent, step_index[row])
            for row, extent in enumerate(extents)
            if self._rows[row].policy.steps
        }

    # ---- transformers' view ----------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by the row that has seen most, new ones included (not the number of slots)."""
        return max((row.position + row.new_tokens for row in self._rows), default=0)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit that transformers should know of."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes of a mask that the registered mask function does not build: `(tokens seen + query_length, 0)`."""
        return self.get_seq_length() + query_length, 0

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops tokens by itself."""
        return [False] * self.n_layers

    @property
    def is_compileable(self) -> bool:
        """False: steps are captured by the engine, not compiled by transformers."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether there are rows."""
        return bool(self._rows)

    @property
    def batch_size(self) -> int:
        """Rows in the batch."""
        return len(self._rows)

    def __len__(self) -> int:
        return self.n_layers

    def __repr__(self) -> str:
        return f"RaggedCache({len(self._rows)} rows, {self.n_layers} layers, {self.allocated_bytes} bytes)"

    def reset(self) -> None:
        """As `clear`."""
        self.clear()

    def _unsupported(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("RaggedCache has neither beam search nor cropping: rows are chosen with keep_rows")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _unsupported
