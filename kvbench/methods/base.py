"""The whole contract between a compression method and everything else.

A policy is a frozen dataclass (its fields are its options, so they are also its configuration) with one pure function
on one layer, `compress`, called once at the end of the prompt, and optionally `step`, called once per new token.

Shapes, everywhere in this project: query heads H, KV heads H_k, group size G = H / H_k, prompt tokens T, kept slots m,
window W, head dimension D. Query head h belongs to KV head h // G.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.errors import BudgetError, ConfigError
from kvbench.methods.options import reduce_groups


@dataclass
class LayerStates:
    """What one layer knows at the end of the prompt; read-only for policies.

    Attributes:
        keys: `(H_k, T, D)` after RoPE, model dtype.
        values: `(H_k, T, D)`, model dtype.
        layer_index: index of the layer, from 0.
        n_layers: number of layers of the model.
        n_query_heads: H.
        seed: integer that depends on the run's seed and the sample only; policies derive randomness from it and
            `layer_index`, never from a global generator.
        column_sums: `(H, T)` fp32, attention mass each key received, summed over all prompt queries (post-softmax,
            causal). Present if the policy needs "column_sums".
        window_attention: `(H, W, T)` fp32, softmax rows of the last W prompt queries, W at least the policy's
            `window_tokens` (or T if the prompt is shorter). Present if the policy needs "window_attention".
        extras: further tensors by name. With need "queries": "queries" `(H, T, D)` after RoPE, model dtype, and
            "scaling", a scalar, the factor on their products with keys. With need "rotary_frequencies": that name,
            `(R / 2,)` fp32 radians per token by which RoPE turns channels i and i + R / 2 of the first R.
        kernels: "torch" or "triton", the engine's choice: which version of an operation to run where there are two.
    """

    keys: Tensor
    values: Tensor
    layer_index: int
    n_layers: int
    n_query_heads: int
    seed: int = 0
    column_sums: Tensor | None = None
    window_attention: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    kernels: str = "torch"

    @property
    def n_tokens(self) -> int:
        """T, the prompt length in tokens."""
        return self.keys.shape[1]

    @property
    def n_kv_heads(self) -> int:
        """H_k."""
        return self.keys.shape[0]

    @property
    def group_size(self) -> int:
        """G = H / H_k."""
        return self.n_query_heads // self.keys.shape[0]

    @property
    def query_counts(self) -> Tensor:
        """`(T,)` fp32, how many prompt queries can see each key: T - j for key j."""
        n_tokens = self.n_tokens
        return torch.arange(n_tokens, 0, -1, dtype=torch.float32, device=self.keys.device)

    def group_scores(self, scores: Tensor, reduce: str = "mean") -> Tensor:
        """Reduce query-head scores to KV heads.

        Args:
            scores: `(H, ...)`.
            reduce: "mean", "max", "sum" or "first" (the first query head of each group, as in llama-recipes' H2O).

        Returns:
            `(H_k, ...)`; the argument itself where every KV head has one query head.

        Raises:
            ConfigError: for any other `reduce`.
        """
        if reduce == "sum":
            return scores.unflatten(0, (self.n_kv_heads, -1)).sum(1)
        return reduce_groups(scores, self.n_kv_heads, reduce)


@dataclass
class CompressedLayer:
    """What is left of one layer for one arm.

    Attributes:
        keys: `(H_k, m, D)`, the model's dtype.
        values: `(H_k, m, D)`.
        positions: `(H_k, m)` int64: prompt index each slot stands for (a merged slot: its pivot's).
        lengths: `(H_k,)` int64 if heads keep different numbers of slots (slots from `lengths[h]` on are padding that is
            never read), else None.
        bias: `(H_k, m)` fp32 added to the attention logits of each slot, or None.
        state: per-slot tensors `(H_k, m, ...)` that `step` reads and writes in place.
        constants: small tensors of any shape that `step` reads (and may write in place).
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor | None = None
    bias: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n_slots(self) -> int:
        """Slots kept, summed over KV heads (a host synchronisation if heads are ragged)."""
        if self.lengths is None:
            return self.keys.shape[0] * self.keys.shape[1]
        return int(self.lengths.sum())


@dataclass
class DecodeSlots:
    """One row's cache in one layer, as `step` sees it after the attention of a new token.

    The m slots of the compressed prompt are followed by one scratch slot, index m, that holds the new token; attention
    has just been computed over all m + 1. After `step` returns, slots 0 .. m-1 are the cache and the scratch slot is
    overwritten by the next token, so a step keeps the cache at constant size by moving the scratch slot over another.
    All tensors are views of the cache's storage: write in place, never rebind, never synchronise with the host.

    Attributes:
        keys: `(H_k, m + 1, D)`.
        values: `(H_k, m + 1, D)`.
        state: as in `CompressedLayer.state`, `(H_k, m + 1, ...)`; the scratch slot's entry holds 0 when a step begins.
        constants: as in `CompressedLayer.constants`.
        step_index: scalar int64 tensor, 0 for the first new token.
    """

    keys: Tensor
    values: Tensor
    state: dict[str, Tensor]
    constants: dict[str, Tensor]
    step_index: Tensor


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """A compression method with its options; subclasses are frozen dataclasses in one file each.

    Class attributes a subclass sets:
        name: the method's name in configuration, records and tables.
        needs: which of "column_sums", "window_attention", "queries" and "rotary_frequencies" the prefill has to
            provide; a property where that depends on the options.
        steps: whether `step` does anything; a row whose policy steps keeps its size while decoding, any other row
            grows by one slot per new token.

    Attributes:
        budget: fraction of the full cache kept, in (0, 1]: `floor(budget * T)` slots per KV head, averaged over all
            layers and heads, layers left whole included. At 1 nothing is lost, while decoding neither: `full` runs in
            the method's place (see `kvbench.methods.full.in_effect`).
    """

    budget: float = 1.0

    name: ClassVar[str]
    steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the options; subclasses extend this and raise `ConfigError`."""
        if not (type(self.budget) in (int, float) and 0.0 < self.budget <= 1.0):
            raise ConfigError(
                f"budget={self.budget!r} is not in (0, 1]: give the fraction of the cache to keep, e.g. 0.35"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What the prefill has to provide: nothing besides keys and values, unless a subclass says otherwise."""
        return frozenset()

    @property
    def window_tokens(self) -> int:
        """How many last prompt queries `window_attention` must cover; 0 if not needed."""
        return 0

    @property
    def exact_budget(self) -> bool:
        """Whether the kept slots are known beforehand and equal the budget; False for fixed-threshold methods."""
        return True

    def budget_tokens(self, n_tokens: int) -> int:
        """Slots per KV head that `budget` allows on a prompt of `n_tokens`: the floor of the product.

        The product is rounded to 9 digits first, so that 0.35 of 20 is 7 although 0.35 * 20 < 7 in binary.
        """
        return math.floor(round(self.budget * n_tokens, 9))

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        """Slots per KV head for each layer; their sum is `n_layers * budget_tokens(n_tokens)`.

        Args:
            n_tokens: prompt length T.
            n_layers: number of layers.

        Returns:
            One number of slots per layer, each at most T.

        Raises:
            BudgetError: if the method cannot run with so few slots; names the slots, the limit and the remedy.
        """
        slots = self.budget_tokens(n_tokens)
        if slots < self.minimum_tokens:
            longer = math.ceil(self.minimum_tokens / self.budget)
            raise BudgetError(
                f"budget {self.budget} of {n_tokens} tokens = {slots} slots; {self.name} needs at least "
                f"{self.minimum_tokens}: {larger_budget(self.minimum_tokens, n_tokens)}, or use prompts of at least "
                f"{longer} tokens"
            )
        return [slots] * n_layers

    @property
    def minimum_tokens(self) -> int:
        """Fewest slots per KV head with which the method makes sense."""
        return 1

    @abstractmethod
    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Compress one layer once, at the end of the prompt.

        Args:
            layer: the layer's states; not to be modified.
            budget_tokens: this layer's entry of `layer_budgets`: slots per KV head, averaged over the heads.

        Returns:
            The kept slots. May share memory with `layer` (callers copy before they write).
        """

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        """Update one row of one layer in place after one new token; called only if `steps` is true.

        Args:
            slots: the row's cache with the new token in the scratch slot (see `DecodeSlots`).
            attention: `(H, m + 1)` fp32, the new token's softmax attention over the slots.
        """
        raise RuntimeError(f"{self.name} declares no decoding step")

    def options(self) -> dict[str, object]:
        """The options that differ from their defaults, without the budget: what tells two arms of a method apart."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "budget" and getattr(self, f.name) != f.default
        }


def larger_budget(slots: int, n_tokens: int) -> str:
    """Say which budget gives at least `slots` slots per KV head on a prompt of `n_tokens`, for error messages."""
    budget = math.ceil(1000 * slots / n_tokens) / 1000
    return f"raise the budget to {budget}" if budget < 1 else "set budget=1, which keeps everything"
