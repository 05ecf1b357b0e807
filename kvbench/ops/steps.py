"""Steps of all rows of one method at once: what a stepper sees of a layer. Its kernels are in `steps_triton.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

GROUP_REDUCTIONS = ("mean", "max", "first")
"""How the query heads of a KV head may share one score."""


@dataclass
class StepRow:
    """One row of a layer as the host knows it.

    Attributes:
        row: the row's index in the batch.
        policy: its policy, an instance of the stepper's class.
        n_slots: m, slots per KV head without the scratch slot.
        state_offsets: per field of the state, where the row's `(H_k, m + 1, ...)` begins in the arena of that name.
        constants: the row's constants by field (see `constant_state`).
    """

    row: int
    policy: Any
    n_slots: int
    state_offsets: dict[str, int]
    constants: dict[str, Tensor]


@dataclass
class StepLayer:
    """One layer of the batch as a stepper sees it; tables cover all rows of the batch, B, whatever their policy.

    Attributes:
        index: the layer, from 0.
        keys: `(N, D)` arena.
        values: `(N, D)` arena.
        offsets: `(B, H_k)` int64, first slot of each block; the scratch slot is number `lengths`.
        lengths: `(B, H_k)` int32, m.
        attention: flat fp32 buffer with the new token's attention.
        attention_offsets: `(B,)` int64, where a row's `(H, m + 1)` attention begins.
        step_index: `(B,)` int64, 0 for a row's first new token.
        states: per field of the state, the flat arena of that per-slot state.
        rows: the rows to step.
    """

    index: int
    keys: Tensor
    values: Tensor
    offsets: Tensor
    lengths: Tensor
    attention: Tensor
    attention_offsets: Tensor
    step_index: Tensor
    states: dict[str, Tensor]
    rows: list[StepRow]


class RowsStepper(ABC):
    """Steps all rows of one policy class, one launch per layer instead of one chain of launches per row.

    Its tables keep their addresses for its lifetime and hold everything that differs between rows, so that a captured
    step stays valid when other rows of the same number come in. Subclasses describe a row by integers (`columns`);
    `prepare` brings them to the device when the batch changes.

    Attributes:
        table: `(n_layers, max_rows, 1 + n_columns)` int64, per layer and row the row's index followed by its columns.
    """

    n_columns: ClassVar[int]

    def __init__(self, n_layers: int, max_rows: int, n_query_heads: int, n_kv_heads: int, device: torch.device):
        self.n_kv_heads, self.group_size = n_kv_heads, n_query_heads // n_kv_heads
        with torch.inference_mode(False):  # the table outlives the block it is first needed in
            self.table = torch.zeros(n_layers, max_rows, 1 + self.n_columns, dtype=torch.int64, device=device)

    def prepare(self, layer: StepLayer) -> None:
        """Describe the rows of one layer to the device; called when the batch changes, never inside a step."""
        rows = [[row.row, *self.columns(row)] for row in layer.rows]
        self.table[layer.index, : len(rows)].copy_(torch.tensor(rows, dtype=torch.int64))

    @abstractmethod
    def columns(self, row: StepRow) -> list[int]:
        """The integers that tell the kernel how to step a row, `n_columns` of them."""

    @abstractmethod
    def step(self, layer: StepLayer) -> None:
        """Do what the policy's `step` does, for all rows of `layer`: launches only, no host synchronisation."""
