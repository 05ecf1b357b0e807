"""Small per-device tensors that tell a decode step where every row's slots are; their addresses never change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kvbench.runtime.layer import RowExtent


class DeviceTables:
    """Offsets, lengths and counters of all layers and rows, one copy per device that holds layers.

    The host knows all of it beforehand (nothing here depends on data), so `fill` copies whole tables once per change of
    the batch, and `advance` brings them to the next token with four launches, without the host.

    Args:
        n_layers: number of layers of the model.
        max_rows: rows the tables can hold.
        n_kv_heads: KV heads per layer.
        device: where the tables live.

    Attributes:
        offsets: `(n_layers, max_rows, H_k)` int64, first slot of each block in the layer's key and value arenas.
        lengths: `(n_layers, max_rows, H_k)` int32, filled slots of each block.
        limits: `(n_layers, max_rows, H_k)` int32, lengths stop there: the last slot of a block is never passed.
        bias_offsets: `(n_layers, max_rows, H_k)` int64, first bias of each block, -1 without bias.
        attention_offsets: `(n_layers, max_rows)` int64, where a stepping row's attention begins, -1 for other rows.
        step_index: `(max_rows,)` int64, new tokens a row has seen.
        position_ids: `(max_rows, 1)` int64, position id of the next token.
    """

    def __init__(self, n_layers: int, max_rows: int, n_kv_heads: int, device: torch.device):
        def table(*shape: int, dtype: torch.dtype = torch.int64, value: int = 0) -> Tensor:
            with torch.inference_mode(False):  # tables outlive the block they are first needed in
                return torch.full(shape, value, dtype=dtype, device=device)

        self.device = device
        self.offsets = table(n_layers, max_rows, n_kv_heads)
        self.lengths = table(n_layers, max_rows, n_kv_heads, dtype=torch.int32)
        self.limits = table(n_layers, max_rows, n_kv_heads, dtype=torch.int32)
        self.bias_offsets = table(n_layers, max_rows, n_kv_heads, value=-1)
        self.attention_offsets = table(n_layers, max_rows, value=-1)
        self.step_index = table(max_rows)
        self.position_ids = table(max_rows, 1)

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


def table_columns(
    by_layer: Sequence[Sequence[RowExtent]], grown: Sequence[int], attention_elements: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Host tables of where the rows lie.

    Args:
        by_layer: for each layer the extents of the rows.
        grown: slots that new tokens have added to each row.
        attention_elements: for each layer the attention weights each row needs a buffer for, 0 for none.

    Returns:
        The tables `offsets`, `lengths`, `limits`, `bias_offsets` and `attention_offsets` of `DeviceTables`, for B rows.
    """
    kept = torch.tensor([[extent.lengths for extent in extents] for extents in by_layer], dtype=torch.int32)
    room = torch.tensor([[[extent.room] for extent in extents] for extents in by_layer], dtype=torch.int32)
    starts = [
        [start if count else -1 for start, count in zip(accumulate(counts, initial=0), counts, strict=False)]
        for counts in attention_elements
    ]
    return {
        "offsets": torch.tensor([[extent.offsets for extent in extents] for extents in by_layer]),
        "lengths": kept + torch.tensor(grown, dtype=torch.int32).view(1, -1, 1),
        "limits": kept + room - 1,
        "bias_offsets": torch.tensor([[extent.bias_offsets for extent in extents] for extents in by_layer]),
        "attention_offsets": torch.tensor(starts),
    }
