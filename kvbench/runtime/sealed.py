"""One layer of a batch that is ready to decode: what a step calls, with everything looked up beforehand."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from kvbench.methods.base import DecodeSlots, Policy, RowsStepper, StepLayer, StepRow, slot_state
from kvbench.ops import ragged_decode as decode
from kvbench.ops.ragged_decode import RaggedLayer
from kvbench.runtime.layer import CacheLayer, RowExtent
from kvbench.runtime.side import SideStream
from kvbench.runtime.tables import DeviceTables


@dataclass
class SealedLayer:
    """One layer's share of a decode step.

    Attributes:
        ragged: the rows' blocks.
        backend: "torch" or "triton".
        kernels: the backend's module, `kvbench.ops.ragged_decode` or `kvbench.ops.ragged_decode_triton`.
        steps: rows whose policy steps on its own, by index: policy and slots.
        steppers: steppers that serve several rows at once, with the rows they serve.
        side: where the steppers run.
        key: what a captured step depends on besides addresses of arenas and tables.
    """

    ragged: RaggedLayer
    backend: str
    kernels: ModuleType
    steps: dict[int, tuple[Policy, DecodeSlots]]
    steppers: list[tuple[RowsStepper, StepLayer]]
    side: SideStream
    key: Hashable

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store the new token's `(B, H_k, 1, D)` keys and values at slot `length` of every block."""
        self.kernels.write_token(key_states, value_states, self.ragged)

    def attend(self, query: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
        """Attention of the `(B, H, D)` new queries, then the policies' steps; returns `(B, H, D)`.

        The steppers' launches may still run when the output is ready: layers share one buffer of attention, so the next
        layer's attention waits for them, and so does `RaggedCache.advance_device`. Only the torch backend knows
        `softcap`, the bound of soft-capped logits.
        """
        self.side.join()
        capped = {} if softcap is None else {"softcap": softcap}
        output, attention = self.kernels.ragged_decode(query, self.ragged, scaling, tuple(self.steps), **capped)
        if self.steppers:
            with self.side.beside():
                for stepper, layer in self.steppers:
                    stepper.step(layer)
        for row, (policy, slots) in self.steps.items():
            for state in slot_state(slots.state).values():
                state[:, -1] = 0
            policy.step(slots, attention[row])
        return output


def attention_elements(policies: Sequence[Policy], extents: Sequence[RowExtent], n_query_heads: int) -> list[int]:
    """Attention weights each row needs a buffer for, `H * (m + 1)`; 0 for rows that do not step."""
    return [
        n_query_heads * extent.max_slots if policy.steps else 0
        for policy, extent in zip(policies, extents, strict=True)
    ]


def grid_slots(max_slots: int) -> int:
    """Round up by at most an eighth, so that batches of similar lengths share launch grids and captured steps."""
    unit = max(64, 1 << max(0, (max_slots - 1).bit_length() - 3))
    return -(-max_slots // unit) * unit


def seal_layer(
    index: int,
    layer: CacheLayer,
    backend: str,
    policies: Sequence[Policy],
    extents: Sequence[RowExtent],
    grown: Sequence[int],
    tables: DeviceTables,
    attention: Tensor,
    n_query_heads: int,
    steppers: dict[type[Policy], RowsStepper | None],
    side: SideStream,
) -> SealedLayer:
    """Look up everything one layer needs in a step.

    Args:
        index: the layer, from 0.
        layer: its arenas.
        backend: "torch" or "triton".
        policies: one per row.
        extents: likewise.
        grown: slots that new tokens have added, per row.
        tables: of the layer's device, already filled for these rows.
        attention: flat fp32 buffer of the layer's device, large enough for all `attention_elements`.
        n_query_heads: H.
        steppers: of the layer's device, by policy class; None where a class has none.
        side: of the layer's device.

    Returns:
        The sealed layer.
    """
    n_rows = len(extents)
    elements = attention_elements(policies, extents, n_query_heads)
    stepping = [row for row, policy in enumerate(policies) if policy.steps]
    alone = [row for row in stepping if backend == "torch" or steppers[type(policies[row])] is None]
    ragged = RaggedLayer(
        keys=layer.keys.storage,
        values=layer.values.storage,
        offsets=tables.offsets[index, :n_rows],
        lengths=tables.lengths[index, :n_rows],
        bias=layer.bias.storage if any(e.bias_offset >= 0 for e in extents) else None,
        bias_offsets=tables.bias_offsets[index, :n_rows],
        attention=attention if stepping else None,
        attention_offsets=tables.attention_offsets[index, :n_rows],
        max_slots=grid_slots(max(e.max_slots for e in extents)),
        blocks=[layer.blocks(e, g) for e, g in zip(extents, grown, strict=True)] if backend == "torch" else [],
    )
    if backend == "triton":
        for row in alone:
            first = sum(elements[:row])
            ragged.attention_views[row] = attention[first : first + elements[row]].view(n_query_heads, -1)
    together: list[tuple[RowsStepper, StepLayer]] = []
    for policy_class, rows in _by_class(policies, [row for row in stepping if row not in alone]).items():
        stepper = steppers[policy_class]
        assert stepper is not None
        step_layer = _step_layer(index, layer, ragged, tables.step_index[:n_rows], policies, extents, rows)
        stepper.prepare(step_layer)
        together.append((stepper, step_layer))
    return SealedLayer(
        ragged=ragged,
        backend=backend,
        kernels=_kernels(backend),
        steps={row: (policies[row], layer.decode_slots(extents[row], tables.step_index[row])) for row in alone},
        steppers=together,
        side=side,
        key=(
            ragged.max_slots,
            ragged.bias is not None,
            tuple((type(stepper), len(step_layer.rows)) for stepper, step_layer in together),
            tuple((row, policies[row], extents[row].offsets[0], extents[row].lengths[0]) for row in alone),
        ),
    )


def _kernels(backend: str) -> ModuleType:
    if backend == "torch":
        return decode
    from kvbench.ops import ragged_decode_triton as decode_triton  # imports triton, which a CPU may lack

    return decode_triton


def _by_class(policies: Sequence[Policy], rows: Sequence[int]) -> dict[type[Policy], list[int]]:
    classes: dict[type[Policy], list[int]] = {}
    for row in rows:
        classes.setdefault(type(policies[row]), []).append(row)
    return classes


def _step_layer(
    index: int,
    layer: CacheLayer,
    ragged: RaggedLayer,
    step_index: Tensor,
    policies: Sequence[Policy],
    extents: Sequence[RowExtent],
    rows: Sequence[int],
) -> StepLayer:
    """What a stepper needs of one layer for the rows it serves."""
    assert ragged.attention is not None
    states: dict[str, Tensor] = {}
    step_rows = []
    for row in rows:
        for key in extents[row].states:
            storage = layer.states[key].storage
            if states.setdefault(key[0], storage) is not storage:
                raise ValueError(f"{policies[row].name}: state {key[0]!r} differs in dtype or shape between rows")
        offsets = {key[0]: offset for key, offset in extents[row].states.items()}
        step_rows.append(StepRow(row, policies[row], extents[row].lengths[0], offsets, extents[row].constants))
    return StepLayer(
        index=index,
        keys=ragged.keys,
        values=ragged.values,
        offsets=ragged.offsets,
        lengths=ragged.lengths,
        attention=ragged.attention,
        attention_offsets=ragged.attention_offsets,
        step_index=step_index,
        states=states,
        rows=step_rows,
    )
