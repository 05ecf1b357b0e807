"""Flat storage that many rows share: blocks handed out from the front, fixed addresses, growth only on demand."""

from __future__ import annotations

import torch
from torch import Tensor

GRANULE = 256
"""Arenas grow to a multiple of this many slots, so that prompts of similar length do not each cause a reallocation."""


class Arena:
    """One tensor `(capacity, *slot_shape)` from whose front consecutive blocks of slots are handed out.

    Blocks are never freed one by one: `clear` forgets them all and keeps the storage. The address of `storage` changes
    only in `reserve`, which `allocate` calls when the free part is too small; `moves` counts those changes.

    Args:
        slot_shape: shape of one slot, e.g. `(head_dim,)`, or `()` for one number a slot.
        dtype: element type.
        device: where the storage lives.

    Attributes:
        storage: `(capacity, *slot_shape)`; uninitialised where nothing was written.
        used: slots handed out since the last `clear`.
        moves: how often the storage has changed its address.
    """

    def __init__(self, slot_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.storage: Tensor = torch.empty((0, *slot_shape), dtype=dtype, device=device)
        self.used = 0
        self.moves = 0

    @property
    def capacity(self) -> int:
        """Slots the storage can hold."""
        return self.storage.shape[0]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the storage, used or not."""
        return self.storage.numel() * self.storage.element_size()

    def reserve(self, n_slots: int) -> None:
        """Make room for `n_slots` slots in all; existing blocks keep their contents and their offsets.

        The old storage and the new one coexist only while used slots have to be copied; an empty arena frees first.

        Args:
            n_slots: slots the arena must be able to hold, those in use included.
        """
        if n_slots <= self.capacity:
            return
        capacity = -(-n_slots // GRANULE) * GRANULE
        shape, dtype, device = self.storage.shape[1:], self.storage.dtype, self.storage.device
        old = self.storage[: self.used]
        self.storage = old.new_empty((0, *shape))  # drops the arena's own reference before the new block is requested
        if self.used == 0:
            del old
        with torch.inference_mode(False):  # storage outlives the block it is first needed in, and is written after it
            self.storage = torch.empty((capacity, *shape), dtype=dtype, device=device)
        if self.used:
            self.storage[: self.used].copy_(old)
        self.moves += 1

    def allocate(self, n_slots: int) -> int:
        """Hand out the next `n_slots` slots.

        Args:
            n_slots: length of the block.

        Returns:
            Offset of the block's first slot; its contents are uninitialised.
        """
        offset = self.used
        self.reserve(offset + n_slots)
        self.used = offset + n_slots
        return offset

    def clear(self) -> None:
        """Forget all blocks; storage and address stay."""
        self.used = 0
