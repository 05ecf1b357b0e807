"""Policies that go wrong, each in one way; named on the command line as `method._target_=fault_policies.<class>`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, DecodeSlots, LayerStates, Policy

HUGE = 1 << 50
"""Elements of a tensor that no machine can allocate."""


@dataclass(frozen=True, kw_only=True)
class Newest(Policy):
    """Keep the newest slots; the well-behaved part of every policy here."""

    name: ClassVar[str] = "newest"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        positions = torch.arange(layer.n_tokens - budget_tokens, layer.n_tokens, device=layer.keys.device)
        kept = slice(layer.n_tokens - budget_tokens, None)
        return CompressedLayer(layer.keys[:, kept], layer.values[:, kept], positions.expand(layer.n_kv_heads, -1))


@dataclass(frozen=True, kw_only=True)
class Stepping(Newest):
    """The same with a decoding step."""

    name: ClassVar[str] = "stepping"
    steps: ClassVar[bool] = True

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        return


@dataclass(frozen=True, kw_only=True)
class RaisesInCompress(Newest):
    """Raises in its second layer for prompts of more than `longer_than` tokens."""

    name: ClassVar[str] = "raises_in_compress"
    longer_than: int = 0

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        if layer.layer_index == 1 and layer.n_tokens > self.longer_than:
            raise RuntimeError("broken on purpose\nsecond line")
        return super().compress(layer, budget_tokens)


@dataclass(frozen=True, kw_only=True)
class RaisesWhile(Newest):
    """Raises as long as a file exists, as a method does while another process holds the memory it needs."""

    name: ClassVar[str] = "raises_while"
    file: str = ""

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        if Path(self.file).exists():
            raise RuntimeError("not now")
        return super().compress(layer, budget_tokens)


@dataclass(frozen=True, kw_only=True)
class SlowSteps(Stepping):
    """Takes its time while decoding, and says so by touching a file first."""

    name: ClassVar[str] = "slow_steps"
    file: str = ""
    seconds: float = 0.05

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        Path(self.file).touch()
        time.sleep(self.seconds)


@dataclass(frozen=True, kw_only=True)
class RaisesInStep(Stepping):
    """Raises while decoding."""

    name: ClassVar[str] = "raises_in_step"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        raise ZeroDivisionError("broken in step")


@dataclass(frozen=True, kw_only=True)
class RaisesInBudget(Newest):
    """Raises where the engine plans its batches."""

    name: ClassVar[str] = "raises_in_budget"

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        raise KeyError("no such layer")


@dataclass(frozen=True, kw_only=True)
class FillsMemoryInCompress(Newest):
    """Asks PyTorch's allocator for more than there is, in the prefill."""

    name: ClassVar[str] = "fills_memory_in_compress"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        torch.empty(HUGE, device=layer.keys.device)
        return super().compress(layer, budget_tokens)


@dataclass(frozen=True, kw_only=True)
class FillsMemoryInStep(Stepping):
    """The same while decoding."""

    name: ClassVar[str] = "fills_memory_in_step"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        torch.empty(HUGE, device=attention.device)


@dataclass(frozen=True, kw_only=True)
class RunsOutOfMemory(Newest):
    """Raises what a GPU without memory raises."""

    name: ClassVar[str] = "runs_out_of_memory"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@dataclass(frozen=True, kw_only=True)
class MakesNan(Newest):
    """Returns values that are no numbers."""

    name: ClassVar[str] = "makes_nan"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        compressed = super().compress(layer, budget_tokens)
        compressed.values = torch.full_like(compressed.values, torch.nan)
        return compressed
