"""What a compressed cache keeps, in slots and bytes, layer by layer: numbers only, so it outlives the cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One layer at the end of the prompt, summed over all rows and KV heads.

    Attributes:
        index: the layer, from 0.
        compressed: False for a layer left alone because it has a sliding window.
        slots: slots kept.
        full_slots: slots the uncompressed cache would hold: one per prompt token, padding not counted; in a layer left
            alone, those of its window.
        n_bytes: bytes of the kept slots: keys, values, bias, state of the policy.
        full_bytes: bytes of keys and values of `full_slots`.
    """

    index: int
    compressed: bool
    slots: int
    full_slots: int
    n_bytes: int
    full_bytes: int


@dataclass(frozen=True)
class CacheReport:
    """Requested and measured budget of the last `generate`; `str()` gives a table.

    Attributes:
        method: the policy's name.
        requested_budget: the policy's budget, in (0, 1].
        prompt_tokens: length of each row's prompt in tokens, padding not counted.
        new_tokens: tokens added to each row since.
        layers: one entry per layer.
        allocated_bytes: storage in use now, room for new tokens included; 0 after the block.
    """

    method: str
    requested_budget: float
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    layers: tuple[LayerReport, ...]
    allocated_bytes: int

    @property
    def measured_budget(self) -> float:
        """Slots kept over slots of the full cache, in the layers that are compressed."""
        compressed = [layer for layer in self.layers if layer.compressed]
        return sum(layer.slots for layer in compressed) / sum(layer.full_slots for layer in compressed)

    @property
    def measured_bytes_ratio(self) -> float:
        """Bytes kept over bytes of the full cache, in all layers, those left alone included."""
        return self.n_bytes / self.full_bytes

    @property
    def layers_left_alone(self) -> tuple[int, ...]:
        """Indices of the layers that are not compressed."""
        return tuple(layer.index for layer in self.layers if not layer.compressed)

    @property
    def n_bytes(self) -> int:
        """Bytes kept of the prompts, in all layers."""
        return sum(layer.n_bytes for layer in self.layers)

    @property
    def full_bytes(self) -> int:
        """Bytes of the full cache of the prompts, in all layers."""
        return sum(layer.full_bytes for layer in self.layers)

    def __str__(self) -> str:
        prompts = "+".join(map(str, self.prompt_tokens))
        lines = [
            f"{self.method}, budget {self.requested_budget:g} requested, {self.measured_budget:.4f} measured in "
            f"{len(self.layers) - len(self.layers_left_alone)} of {len(self.layers)} layers; bytes of all layers "
            f"{self.measured_bytes_ratio:.4f} of the full cache; prompt {prompts} tokens, {self.new_tokens} new",
            "layer      slots of   full       bytes of   full",
        ]
        for layer in self.layers:
            note = "" if layer.compressed else "   left alone (sliding window)"
            lines.append(
                f"{layer.index:5d} {layer.slots:10d} {layer.full_slots:9d} {layer.n_bytes:11d} "
                f"{layer.full_bytes:10d}{note}"
            )
        return "\n".join(lines)
