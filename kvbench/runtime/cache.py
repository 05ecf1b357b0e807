"""The cache of a decode batch whose rows are arms and samples with different numbers of slots, stored without padding.

One `RaggedCache` is both the `past_key_values` of a transformers model and the `attention_context` of its attention
layers: `attend` stores the new token and reads what is stored. Prefill writes rows layer by layer; every decode step is
then one forward pass over all rows and one `advance`:

    cache = RaggedCache(n_layers, n_query_heads, n_kv_heads, head_dim, dtype)
    row = cache.add_row(policy, position=n_prompt_tokens, room_tokens=max_new_tokens)
    cache.write(layer_index, row, policy.compress(states, budget_tokens))        # for every layer
    model(input_ids, position_ids=cache.position_ids, past_key_values=cache, attention_context=cache, use_cache=True)
    cache.advance()

Nothing in a step depends on data: it neither synchronises nor allocates by data, and with Triton kernels it can be
captured in a CUDA graph and replayed for every batch of equal `graph_key`.

Rows whose end nobody knows beforehand (`generate` stops when it likes, beams choose each other's caches) get their room
in pieces: `make_room` before a step and `choose` copy the blocks into fresh pools, layer by layer, so that no more than
one layer ever exists twice.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable, Sequence
from importlib import import_module
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import Cache

from kvbench.errors import ConfigError
from kvbench.methods import base
from kvbench.methods.base import CompressedLayer, Policy, slot_state
from kvbench.ops.dispatch import choose_kernels, current_device
from kvbench.ops.ragged_decode import Blocks, DecodePlan
from kvbench.ops.steps import RowsStepper
from kvbench.runtime.blocks import BlockTable, LayerPools, Pool, SideStream, lay_out

ROOM_TOKENS = 32
"""New tokens a row without a known end has room for at a time: at most that many slots per head lie unused, and a copy
of the cache is spread over that many steps."""


class _Row:
    """A row as the host knows it: its policy, where it started, how far it is, and its blocks, layer by layer."""

    def __init__(self, policy: Policy, position: int, room_tokens: int):
        self.policy, self.position, self.new_tokens = policy, position, 0
        self.room = 1 if policy.steps else room_tokens
        self.blocks: dict[int, Blocks] = {}

    @property
    def grown(self) -> int:
        """Slots per head that new tokens have added: at most the room less the slot that the next token needs."""
        return min(self.new_tokens, self.room - 1)


class _Place:
    """What the layers on one device share: kernels, table, attention buffer, steppers, a stream beside the main one."""

    def __init__(self, kernels: str, table: BlockTable, device: torch.device):
        self.kernels, self.table, self.device = kernels, table, device
        suffix = "_triton" if kernels == "triton" else ""  # imported late: triton, which a CPU may lack
        self.ops: Any = import_module(f"kvbench.ops.ragged_decode{suffix}")
        self.attention = Pool((), torch.float32, device)
        self.steppers: dict[type[Policy], RowsStepper | None] = {}
        self.side = SideStream(device)


class RaggedCache(Cache):
    """Keys, values, biases and policy state of all rows of a decode batch.

    Keys and values are of the model's `dtype`; tables for `max_rows` rows are allocated once. For `kernels` see
    `kvbench.ops.dispatch.choose_kernels`.
    """

    def __init__(
        self, n_layers: int, n_query_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype,
        kernels: str = "auto", max_rows: int = 64,
    ):  # fmt: skip
        super().__init__(layers=[])
        if n_query_heads % n_kv_heads:
            raise ConfigError(
                f"{n_query_heads} query heads are no multiple of {n_kv_heads} KV heads: check the model's configuration"
            )
        self.n_layers, self.n_query_heads, self.n_kv_heads = n_layers, n_query_heads, n_kv_heads
        self.head_dim, self.dtype, self.kernels, self.max_rows = head_dim, dtype, kernels, max_rows
        self.handle = next(_handles)  # by which `decode_step` finds the cache
        _caches[self.handle] = self
        self._rows: list[_Row] = []
        self._layers: dict[int, LayerPools] = {}  # those that were written
        self._places: dict[torch.device, _Place] = {}
        self._reserved_slots = [0] * n_layers
        self._plans: list[DecodePlan] = []
        self._grown: list[int] = []
        self._dirty = True
        self._graph_key: Hashable = None

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """How many rows the batch has, B."""
        return len(self._rows)

    def add_row(self, policy: Policy, position: int, room_tokens: int | None = None) -> int:
        """Add a row to the batch, whose layers are written next, and return its index.

        A row whose policy steps keeps its size, any other grows by a slot per new token, `room_tokens` at most. One
        that stays in the batch beyond that overwrites its last slot: no other row is harmed, its further answers mean
        nothing. None: nobody knows, `make_room` is called before each step. `position` is the number of prompt tokens.
        """
        room_tokens = ROOM_TOKENS if room_tokens is None else room_tokens
        if room_tokens < 1 and not policy.steps:
            raise ValueError(f"room_tokens={room_tokens} is less than 1: attention needs a slot for the new token")
        if len(self._rows) >= self.max_rows:
            raise ConfigError(
                f"row {len(self._rows) + 1} exceeds max_rows={self.max_rows}: decode fewer arms at once or raise it"
            )
        self._change()
        self._rows.append(_Row(policy, position, room_tokens))
        return len(self._rows) - 1

    def reserve(self, slots_per_layer: Sequence[int]) -> None:
        """Ask for room beforehand: pools that grow row by row leave the allocator with holes.

        Per layer the slots over rows and KV heads, room for new tokens included; in effect from the first `write` on.
        """
        self._reserved_slots = [max(pair) for pair in zip(self._reserved_slots, slots_per_layer, strict=True)]
        for index, layer in self._layers.items():
            layer.reserve(self._reserved_slots[index])

    def reserve_rows(self, budgets: Sequence[Sequence[int]]) -> None:
        """Reserve storage for the present rows, given each row's slots per KV head of each layer."""
        room = sum(row.room for row in self._rows)
        self.reserve([self.n_kv_heads * (sum(layer) + room) for layer in zip(*budgets, strict=True)])

    def write(self, layer_index: int, row: int, layer: CompressedLayer) -> None:
        """Copy what is left of one layer of a row into the cache; every tensor lies on the layer's device."""
        record, device = self._rows[row], layer.keys.device
        self._check(layer_index, row, layer)
        self._change()
        if device not in self._places:
            table = BlockTable(self.n_layers, self.max_rows, self.n_kv_heads, device)
            self._places[device] = _Place(choose_kernels(self.kernels, device), table, device)
        if layer_index not in self._layers:
            self._layers[layer_index] = LayerPools(self.head_dim, self.dtype, device)
            self._layers[layer_index].reserve(self._reserved_slots[layer_index])
        record.blocks[layer_index] = self._layers[layer_index].write(layer, record.room)

    def keep_rows(self, rows: list[int]) -> None:
        """Shrink the batch to distinct rows, in the order given; storage of the others is reused after `clear` only."""
        if len(set(rows)) != len(rows) or any(not 0 <= row < len(self._rows) for row in rows):
            raise ValueError(f"rows {rows} are not distinct indices below {len(self._rows)}")
        self._change()
        self._rows = [self._rows[row] for row in rows]

    def choose(self, rows: Sequence[int], *, rewrite: bool = False) -> None:
        """Make the batch copies of the given rows, at most `max_rows`, in that order; one may be chosen more than once.

        All rows must have seen their tokens in step; those that grow get their full room again, with `rewrite` even if
        the rows stay as they are.
        """
        if len(rows) > self.max_rows or any(not 0 <= row < self.rows for row in rows):
            raise ValueError(f"rows {list(rows)} are not at most {self.max_rows} indices below {self.rows}")
        if not rewrite and list(rows) == list(range(self.rows)):
            return
        self._change()
        chosen = [copy.copy(self._rows[row]) for row in rows]
        for record in chosen:
            record.blocks = {}
            if not record.policy.steps:
                record.position += record.new_tokens
                record.new_tokens = 0
        for index, old in self._layers.items():
            kept = [old.read(self._blocks(row)[index], self._rows[row].grown) for row in rows]
            fresh = self._layers[index] = LayerPools(self.head_dim, self.dtype, old.device)
            fresh.reserve(sum(layer.n_slots + self.n_kv_heads * chosen[0].room for layer in kept))
            for record, layer in zip(chosen, kept, strict=True):
                record.blocks[index] = fresh.write(layer, record.room)
        self._rows = chosen

    def make_room(self) -> None:
        """Before a step: see to it that every row has room for the new token."""
        if any(not row.policy.steps and row.new_tokens >= row.room - 1 for row in self._rows):
            self.choose(range(self.rows), rewrite=True)

    def clear(self) -> None:
        """Drop all rows; storage stays allocated at its addresses for the next batch."""
        self._outdate()
        self._rows = []
        for pool in self._pools():
            pool.used = 0

    def row_slots(self, row: int) -> list[int]:
        """Prompt slots kept in each layer, summed over KV heads."""
        return [sum(blocks.lengths) for blocks in self._blocks(row)]

    def row_bytes(self, row: int) -> int:
        """Bytes of what a row keeps of its prompt, over all layers, as `LayerPools.row_bytes`."""
        steps = self._rows[row].policy.steps
        return sum(self._layers[index].row_bytes(blocks, steps) for index, blocks in enumerate(self._blocks(row)))

    def layer_use(self, layer_index: int) -> tuple[int, int]:
        """Slots and bytes (`row_bytes`) of what all rows keep of their prompts in one layer that is written."""
        kept = [(row.blocks[layer_index], row.policy.steps) for row in self._rows]
        n_bytes = sum(self._layers[layer_index].row_bytes(blocks, steps) for blocks, steps in kept)
        return sum(sum(blocks.lengths) for blocks, _ in kept), n_bytes

    @property
    def kernels_used(self) -> set[str]:
        """Names of the kernels in use, for the record."""
        return {place.kernels for place in self._places.values()}

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pools, whether in use or not."""
        return sum(pool.storage.nbytes for pool in self._pools())

    # ---- decode steps ----------------------------------------------------------------------------------------------

    @property
    def position_ids(self) -> Tensor:
        """`(B, 1)` int64 position ids of the next token, on the first layer's device; `advance` adds 1 in place."""
        self.prepare()
        return self._places[self._layers[0].device].table.position_ids[: len(self._rows)]

    def prepare(self) -> None:
        """Bring tables and plans up to date after the batch has changed; a step does so itself."""
        if self._dirty:
            self._plan()
            self._dirty = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The arguments: `attend` stores them (called by the model's attention module, which hands them on)."""
        return key_states, value_states

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """As `step`; in compiled code by one custom operation, so that a decoder layer compiles whole."""
        if torch.compiler.is_compiling():
            return decode_step(self.handle, layer_index, query, key, value, scaling, softcap)
        return self.step(layer_index, query, key, value, scaling, softcap)

    def step(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """Store the new tokens, attend to their rows, then do the step of the rows whose policy has one.

        From query `(B, H, 1, D)` after RoPE, key and value `(B, H_k, 1, D)` to `(B, 1, H, D)`; only the torch version
        knows a `softcap`. Steps of several rows at once may still run when the output is ready: layers share one buffer
        of attention, so the next layer's attention waits for them, and so does `advance_device`.
        """
        self.prepare()
        expected = (len(self._rows), self.n_kv_heads, 1, self.head_dim)
        if tuple(key.shape) != expected:
            raise ValueError(f"new keys have shape {tuple(key.shape)}, the batch needs {expected}")
        plan, place = self._plans[layer_index], self._places[key.device]
        if place.kernels == "torch" and query.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the torch version cannot be captured in a CUDA graph: its lengths are the host's")
        ops, alone = place.ops, tuple(plan.steps)
        capped = {} if softcap is None else {"softcap": softcap}
        with current_device(key.device):
            ops.write_token(key, value, plan)
            place.side.join()
            output, attention = ops.ragged_decode(query.squeeze(2), plan, scaling, alone, **capped)
            if plan.steppers:
                with place.side.beside():
                    for stepper, rows in plan.steppers:
                        stepper.step(plan, rows)
            for row, (policy, slots) in plan.steps.items():
                for state in slot_state(slots.state).values():
                    state[:, -1] = 0
                policy.step(slots, attention[row])
        return output.unsqueeze(1)

    def advance(self) -> None:
        """Go on to the next token after a forward pass: lengths, positions and step counters, on device and host."""
        self.advance_device()
        self.count_step()

    def advance_device(self) -> None:
        """The device's half of `advance`, without the host's: see `count_step`."""
        for place in self._places.values():
            place.side.join()
            place.table.advance()

    def count_step(self) -> None:
        """The host's half of `advance`, lengths that the torch version reads; `_change` makes up for it if left out."""
        for row in self._rows:
            row.new_tokens += 1
        self._grown[:] = [row.grown for row in self._rows]  # the plans' own list

    @property
    def capturable(self) -> bool:
        """Whether a step may be captured in a CUDA graph: all layers use Triton and lie on one device."""
        return self.kernels_used == {"triton"} and len(self._places) == 1

    @property
    def graph_key(self) -> Hashable:
        """Equal for two batches if a step captured with one may be replayed with the other.

        Covers the rows' number, the policies' kinds, launch grids and addresses; lengths and offsets may differ.
        """
        self.prepare()
        return self._graph_key

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _blocks(self, row: int) -> list[Blocks]:
        blocks, layers = self._rows[row].blocks, range(self.n_layers)
        if missing := [index for index in layers if index not in blocks]:
            raise RuntimeError(f"row {row} lacks layers {missing}: write every layer of a row before decoding")
        return [blocks[index] for index in layers]

    def _check(self, layer_index: int, row: int, layer: CompressedLayer) -> None:
        """Refuse what does not fit the model; these are defects of a policy or the caller, not of a configuration."""
        policy, shape = self._rows[row].policy, (self.n_kv_heads, layer.keys.shape[1], self.head_dim)
        if layer_index in self._rows[row].blocks:
            raise ValueError(f"layer {layer_index} of row {row} is written already")
        for name, tensor in (("keys", layer.keys), ("values", layer.values)):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{policy.name}: {name} have shape {tuple(tensor.shape)}, the cache needs {shape}")
            if tensor.dtype != self.dtype:
                raise ValueError(f"{policy.name}: {name} are {tensor.dtype}, the cache stores {self.dtype}")
        for name, state in (("bias", layer.bias), *slot_state(layer.state).items()):
            if state is not None and state.shape[:2] != shape[:2]:
                raise ValueError(f"{policy.name}: {name} has shape {tuple(state.shape)}, the cache needs {shape[:2]}")
        if layer.lengths is not None and policy.steps:
            raise ValueError(f"{policy.name} steps and returns ragged heads: a step needs heads of equal length")

    def _pools(self) -> list[Pool]:
        layers = [pool for layer in self._layers.values() for pool in layer.pools]
        return layers + [place.attention for place in self._places.values()]

    def _change(self) -> None:
        """Before the batch changes: ask the device how far its rows are, since replayed steps pass the host by."""
        if not self._dirty:
            seen = self._places[self._layers[0].device].table.step_index[: len(self._rows)].tolist()
            for row, new_tokens in zip(self._rows, seen, strict=True):
                row.new_tokens = new_tokens
        self._outdate()

    def _outdate(self) -> None:
        """Everything is looked up again before the next step; until then nothing keeps the storage of grown pools."""
        self._dirty, self._plans = True, []

    def _plan(self) -> None:
        """Fill the device tables and look up what every layer's steps need."""
        if not self._rows:
            raise RuntimeError("the cache has no rows: add and write rows before decoding")
        by_row = [self._blocks(row) for row in range(len(self._rows))]
        policies = [row.policy for row in self._rows]
        self._grown = [row.grown for row in self._rows]
        steps = [policy.steps for policy in policies]
        columns, attention_elements, longest = lay_out(by_row, self._grown, steps, self.n_query_heads)
        for index, n_elements in enumerate(attention_elements):
            self._places[self._layers[index].device].attention.reserve(n_elements)
        columns["step_index"] = torch.tensor([row.new_tokens for row in self._rows])
        columns["position_ids"] = torch.tensor([[row.position + row.new_tokens] for row in self._rows])
        for place in self._places.values():
            place.table.fill(**columns)
            for kind in {type(policy) for policy in policies if policy.steps} - place.steppers.keys():
                found = base.find_rows_stepper(kind) if place.kernels == "triton" else None  # steppers are kernels
                shape = self.n_layers, self.max_rows, self.n_query_heads, self.n_kv_heads, place.device
                place.steppers[kind] = found(*shape) if found else None
        firsts = columns["attention_offsets"].tolist()
        self._plans = [
            self._plan_layer(index, policies, blocks, longest[index], firsts[index])
            for index, blocks in enumerate(zip(*by_row, strict=True))
        ]
        moves = tuple(pool.moves for pool in self._pools())
        self._graph_key = (len(self._rows), moves, tuple(map(_step_key, self._plans)))

    def _plan_layer(
        self, index: int, policies: list[Policy], blocks: Sequence[Blocks], longest: int, attention_firsts: list[int]
    ) -> DecodePlan:
        pools, n_rows = self._layers[index], len(blocks)
        place = self._places[pools.device]
        table, attention = place.table, place.attention.storage
        plan = DecodePlan(
            keys=pools.keys.storage, values=pools.values.storage,
            offsets=table.offsets[index, :n_rows], lengths=table.lengths[index, :n_rows],
            bias=pools.bias.storage if any(b.first_bias >= 0 for b in blocks) else None,
            bias_offsets=table.bias_offsets[index, :n_rows],
            attention=attention if any(policy.steps for policy in policies) else None,
            attention_offsets=table.attention_offsets[index, :n_rows],
            max_slots=grid_slots(longest), blocks=blocks, grown=self._grown, layer_index=index, policies=policies,
            step_index=table.step_index[:n_rows], states={key: pool.storage for key, pool in pools.states.items()},
        )  # fmt: skip
        together: dict[type[Policy], list[int]] = {}
        for row, policy in enumerate(policies):
            if not policy.steps:
                continue
            if place.steppers[type(policy)] is not None:
                together.setdefault(type(policy), []).append(row)
                continue
            n_slots = blocks[row].lengths[0] + 1
            flat = attention[attention_firsts[row] :][: self.n_query_heads * n_slots]
            plan.attention_views[row] = flat.view(self.n_query_heads, n_slots)
            plan.steps[row] = (policy, pools.decode_slots(blocks[row], table.step_index[row]))
        for kind, rows in together.items():
            stepper = place.steppers[kind]
            assert stepper is not None
            stepper.prepare(plan, rows)
            plan.steppers.append((stepper, rows))
        return plan

    # ---- transformers' view ----------------------------------------------------------------------------------------

    is_compileable = False  # steps are captured by the engine, not compiled by transformers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by the row that has seen most, new ones included (not the number of slots)."""
        return max((row.position + row.new_tokens for row in self._rows), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes of a mask that our mask function does not build."""
        return self.get_seq_length() + query_length, 0

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops tokens by itself."""
        return [False] * self.n_layers

    def _unsupported(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("RaggedCache has neither beam search nor cropping: rows are chosen with keep_rows or choose")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _unsupported


_handles = itertools.count()
_caches: WeakValueDictionary[int, RaggedCache] = WeakValueDictionary()


@torch.library.custom_op("kvbench::decode_step", mutates_args=())
def decode_step(
    handle: int, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """`RaggedCache.step` of the cache with this handle, as torch.compile sees it: tensors in, a tensor out."""
    return _caches[handle].step(layer_index, query, key, value, scaling, softcap)


@decode_step.register_fake
def _(handle: int, layer_index: int, query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


def _step_key(plan: DecodePlan) -> Hashable:
    """What a captured step of a layer depends on besides addresses of pools and tables."""
    blocks, policies = plan.blocks, plan.policies
    alone = tuple((row, policies[row], blocks[row].first, blocks[row].lengths[0]) for row in plan.steps)
    together = tuple((type(policies[rows[0]]), len(rows)) for _, rows in plan.steppers)
    return plan.max_slots, plan.bias is not None, together, alone


def grid_slots(max_slots: int) -> int:
    """Round up by at most an eighth, so that batches of similar lengths share launch grids and captured steps."""
    unit = max(64, 1 << max(0, (max_slots - 1).bit_length() - 3))
    return -(-max_slots // unit) * unit
