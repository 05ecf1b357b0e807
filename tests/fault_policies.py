"""Policies that go wrong, each in one way; named on the command line as `method._target_=fault_policies.<class>`."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from kvbench.methods.base import CompressedLayer, Policy

HUGE = 1 << 50
"""Elements of a tensor that no machine can allocate."""


def policy(kind):
    kind.name = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
    return dataclass(frozen=True, kw_only=True)(kind)


@policy
class Newest(Policy):
    """Keep the newest slots; the well-behaved part of every policy here."""

    def compress(self, layer, budget_tokens):
        positions = torch.arange(layer.n_tokens - budget_tokens, layer.n_tokens, device=layer.keys.device)
        kept = slice(layer.n_tokens - budget_tokens, None)
        return CompressedLayer(layer.keys[:, kept], layer.values[:, kept], positions.expand(layer.n_kv_heads, -1))


@policy
class Stepping(Newest):
    steps: ClassVar[bool] = True

    def step(self, slots, attention):
        return


@policy
class RaisesInCompress(Newest):
    """Raises in its second layer for prompts of more than `longer_than` tokens."""

    longer_than: int = 0

    def compress(self, layer, budget_tokens):
        if layer.layer_index == 1 and layer.n_tokens > self.longer_than:
            raise RuntimeError("broken on purpose\nsecond line")
        return super().compress(layer, budget_tokens)


@policy
class RaisesWhile(Newest):
    """Raises as long as a file exists, as a method does while another process holds the memory it needs."""

    file: str = ""

    def compress(self, layer, budget_tokens):
        if Path(self.file).exists():
            raise RuntimeError("not now")
        return super().compress(layer, budget_tokens)


@policy
class SlowSteps(Stepping):
    """Takes its time while decoding, and says so by touching a file first."""

    file: str = ""
    seconds: float = 0.05

    def step(self, slots, attention):
        Path(self.file).touch()
        time.sleep(self.seconds)


@policy
class RaisesInStep(Stepping):
    def step(self, slots, attention):
        raise ZeroDivisionError("broken in step")


@policy
class RaisesInBudget(Newest):
    """Raises where the engine plans its batches."""

    def layer_budgets(self, n_tokens, n_layers):
        raise KeyError("no such layer")


@policy
class FillsMemoryInCompress(Newest):
    """Asks PyTorch's allocator for more than there is, in the prefill."""

    def compress(self, layer, budget_tokens):
        torch.empty(HUGE, device=layer.keys.device)


@policy
class FillsMemoryInStep(Stepping):
    def step(self, slots, attention):
        torch.empty(HUGE, device=attention.device)


@policy
class RunsOutOfMemory(Newest):
    """Raises what a GPU without memory raises."""

    def compress(self, layer, budget_tokens):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@policy
class MakesNan(Newest):
    def compress(self, layer, budget_tokens):
        compressed = super().compress(layer, budget_tokens)
        compressed.values = torch.full_like(compressed.values, torch.nan)
        return compressed
