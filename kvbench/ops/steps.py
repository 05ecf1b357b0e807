"""Steps of all rows of one method at once, one launch per layer. Their kernels are in `steps_triton.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from kvbench.ops.ragged_decode import Blocks, DecodePlan

GROUP_REDUCTIONS = ("mean", "max", "first")
"""How the query heads of a KV head may share one score."""


class RowsStepper(ABC):
    """Steps all rows of one policy class, one launch per layer instead of one chain of launches per row.

    Its tables keep their addresses for its lifetime and hold everything that differs between rows, so that a captured
    step stays valid when other rows of the same number come in. Subclasses describe a row by integers (`columns`);
    `prepare` brings them to the device when the batch changes. `rows` are the indices of the rows to step.

    Attributes:
        table: `(n_layers, max_rows, 1 + n_columns)` int64, per layer and row the row's index followed by its columns.
    """

    n_columns: ClassVar[int]

    def __init__(self, n_layers: int, max_rows: int, n_query_heads: int, n_kv_heads: int, device: torch.device):
        self.n_kv_heads, self.group_size = n_kv_heads, n_query_heads // n_kv_heads
        with torch.inference_mode(False):  # the table outlives the block it is first needed in
            self.table = torch.zeros(n_layers, max_rows, 1 + self.n_columns, dtype=torch.int64, device=device)

    def prepare(self, plan: DecodePlan, rows: Sequence[int]) -> None:
        """Describe the rows of one layer to the device; called when the batch changes, never inside a step."""
        described = [[row, *self.columns(plan.policies[row], plan.blocks[row])] for row in rows]
        self.table[plan.layer_index, : len(rows)].copy_(torch.tensor(described, dtype=torch.int64))

    @abstractmethod
    def columns(self, policy: Any, blocks: Blocks) -> list[int]:
        """The integers that tell the kernel how to step a row, `n_columns` of them."""

    @abstractmethod
    def step(self, plan: DecodePlan, rows: Sequence[int]) -> None:
        """Do what the policy's `step` does, for all `rows`: launches only, no host synchronisation."""
