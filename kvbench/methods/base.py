"""The whole contract between a compression method and everything else.

A policy is a frozen dataclass (its fields are its options, so they are also its configuration) with one pure function
on one layer, `compress`, called once at the end of the prompt, and optionally `step`, called once per new token.
Budgets of layers follow from the prompt's length alone (`layer_budgets`) or from what all layers look like
(`allocates`). What a step remembers is a dataclass of tensors, the method's own; `rows_stepper` may name a
`kvbench.ops.steps.RowsStepper` that does all steps of a batch in one launch.

Shapes, everywhere in this project: query heads H, KV heads H_k, group size G = H / H_k, prompt tokens T, kept slots m,
window W, head dimension D, rows of a batch B. Query head h belongs to KV head h // G.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbench.errors import BudgetError, ConfigError
from kvbench.fields import check_fields
from kvbench.methods.options import WholeLayers
from kvbench.ops.steps import GROUP_REDUCTIONS, RowsStepper

CONSTANT = {"kvbench": "one small tensor of any shape, not one entry per slot"}
"""Metadata of such a field of a step's state: `hashes: Tensor = field(metadata=CONSTANT)`."""


# ---- what compress reads and returns ---------------------------------------------------------------------------------


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
            "scaling", a scalar, the factor on their products with keys. With one of the needs below: its name.
            "rotary_frequencies": `(R / 2,)` fp32 radians per token by which RoPE turns channels i and i + R / 2 of the
            first R.
            "window_logsumexp": `(H, W)` fp32, log of the sum of the exponentials of the logits (soft-capped where the
            model caps them) behind each row of `window_attention`, which comes with it.
            "output_weight": `(H, D, hidden)`, model dtype, a view of the layer's output projection: head h adds
            `attention @ values @ output_weight[h]` to the hidden states.
            "reconstruction": `(H_k, T)` fp32 in [0, 1], the most attention that each key gets while the model repeats
            the prompt in a second pass (`kvbench.runtime.reconstruct`); only where the question is not in the prompt.
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
        return torch.arange(self.n_tokens, 0, -1, dtype=torch.float32, device=self.keys.device)

    def observed(self, name: str) -> Tensor:
        """What the prefill observed under a name, e.g. "column_sums"; ValueError if the policy's `needs` lacks it."""
        found = self.extras.get(name, getattr(self, name, None))
        if found is None:
            raise ValueError(f"{name} was not observed by the prefill: add it to the method's needs")
        return found

    def group_scores(self, scores: Tensor, reduce: str = "mean") -> Tensor:
        """Reduce query-head scores `(H, ...)` to KV heads `(H_k, ...)`; see `reduce_groups`."""
        return reduce_groups(scores, self.n_kv_heads, reduce)

    def whole(self) -> CompressedLayer:
        """The layer uncompressed (sharing memory): T slots per KV head at their own positions."""
        positions = torch.arange(self.n_tokens, device=self.keys.device)
        return CompressedLayer(self.keys, self.values, positions.expand(self.n_kv_heads, -1))


def reduce_groups(scores: Tensor, n_kv_heads: int, reduce: str) -> Tensor:
    """Reduce query-head scores `(H, ...)` to KV heads `(H_k, ...)`, by "mean", "max", "sum" or "first".

    "first" takes the first query head of each group, as in llama-recipes' H2O.
    """
    if reduce not in (*GROUP_REDUCTIONS, "sum"):
        raise ConfigError(f"group_reduce={reduce!r} is not one of {', '.join(GROUP_REDUCTIONS)}")
    if scores.shape[0] == n_kv_heads:
        return scores  # a group of one: nothing to launch
    grouped = scores.unflatten(0, (n_kv_heads, -1))
    if reduce == "max":
        return grouped.amax(1)
    return grouped[:, 0] if reduce == "first" else grouped.sum(1) if reduce == "sum" else grouped.mean(1)


@dataclass
class CompressedLayer:
    """What is left of one layer for one arm.

    Attributes:
        keys: `(H_k, m, D)`, the model's dtype.
        values: `(H_k, m, D)`.
        positions: `(H_k, m)` int64, prompt index each slot stands for (a merged slot: its pivot's), or None: analyses
            and checks read them, no cache does.
        lengths: `(H_k,)` int64 if heads keep different numbers of slots (slots from `lengths[h]` on are padding that is
            never read), else None.
        bias: `(H_k, m)` fp32 added to the attention logits of each slot, or None.
        state: what `step` remembers, an instance of a dataclass of tensors: per slot `(H_k, m, ...)`, or of any shape
            where the field is declared with `field(metadata=CONSTANT)`. None if there is nothing.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    lengths: Tensor | None = None
    bias: Tensor | None = None
    state: Any = None

    @property
    def n_slots(self) -> int:
        """Slots kept, summed over KV heads (a host synchronisation if heads are ragged)."""
        if self.lengths is None:
            return self.keys.shape[0] * self.keys.shape[1]
        return int(self.lengths.sum())


# ---- what step reads and writes --------------------------------------------------------------------------------------


def slot_state(state: Any) -> dict[str, Tensor]:
    """The per-slot tensors of a step's state by field; fields that hold None are left out."""
    return _state_tensors(state, constants=False)


def constant_state(state: Any) -> dict[str, Tensor]:
    """The constants of a step's state by field; fields that hold None are left out."""
    return _state_tensors(state, constants=True)


def make_state(kind: type[Any] | None, tensors: Mapping[str, Tensor]) -> Any:
    """A state of a class over other tensors, per-slot ones and constants by field; fields left out hold None."""
    return None if kind is None else kind(**{f.name: tensors.get(f.name) for f in dataclasses.fields(kind)})


def _state_tensors(state: Any, constants: bool) -> dict[str, Tensor]:
    if state is None:
        return {}
    if not dataclasses.is_dataclass(state):
        raise TypeError(f"state is a {type(state).__name__}: declare a dataclass with a field for each of its tensors")
    wanted = [f.name for f in dataclasses.fields(state) if (f.metadata == CONSTANT) == constants]
    return {name: tensor for name in wanted if (tensor := getattr(state, name)) is not None}


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
        state: as `CompressedLayer.state`, per slot `(H_k, m + 1, ...)`; the scratch slot's entry holds 0 when a step
            begins.
        step_index: scalar int64 tensor, 0 for the first new token.
    """

    keys: Tensor
    values: Tensor
    state: Any
    step_index: Tensor

    @property
    def n_slots(self) -> int:
        """Slots of the cache, m, the scratch slot left out."""
        return self.keys.shape[1] - 1

    @property
    def per_slot(self) -> list[Tensor]:
        """Keys, values and every per-slot tensor of the state."""
        return [self.keys, self.values, *slot_state(self.state).values()]

    def move_new_token(self, slot: Tensor) -> None:
        """Put the new token, with its state, in the place of slot number `(1,)` int64 of every head."""
        for tensor in self.per_slot:
            tensor.index_copy_(1, slot, tensor[:, -1:].clone())


# ---- a method --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """A compression method with its options; subclasses are frozen dataclasses in one file each.

    Class attributes a subclass sets:
        name: the method's name in configuration, records and tables.
        needs: which of "column_sums", "window_attention", "window_logsumexp", "queries", "rotary_frequencies",
            "output_weight" and "reconstruction" the prefill has to provide (see `LayerStates`); a property where that
            depends on the options.
        steps: whether `step` does anything; a row whose policy steps keeps its size while decoding, any other row
            grows by one slot per new token.

    Attributes:
        budget: fraction of the full cache kept, in (0, 1]: `floor(budget * T)` slots per KV head, averaged over all
            layers and heads, layers left whole included. At 1 nothing is lost, while decoding neither: `full` runs in
            the method's place (see `kvbench.methods.full.in_effect`).
    """

    budget: float = 0.5

    name: ClassVar[str]
    steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check every option against its annotation (words for them: `kvbench.methods.options`); raises `ConfigError`.

        Subclasses extend this where options depend on each other.
        """
        if not (type(self.budget) in (int, float) and 0.0 < self.budget <= 1.0):
            raise ConfigError(
                f"budget={self.budget!r} is not in (0, 1]: give the fraction of the cache to keep, e.g. 0.35"
            )
        check_fields(self, self.name)

    @property
    def needs(self) -> frozenset[str]:
        """What the prefill has to provide: nothing besides keys and values, unless a subclass says otherwise."""
        return frozenset()

    @property
    def window_tokens(self) -> int:
        """How many last prompt queries `window_attention` and `window_logsumexp` must cover; 0 if not needed."""
        return 0

    @property
    def allocates(self) -> bool:
        """Whether `allocate` divides the slots among the layers, after all have been seen; may depend on options."""
        return False

    @property
    def exact_budget(self) -> bool:
        """Whether the kept slots are known beforehand and equal the budget.

        False for fixed-threshold methods, and where layers left whole come on top of it.
        """
        return True

    @property
    def minimum_tokens(self) -> int:
        """Fewest slots per KV head with which the method makes sense."""
        return 1

    def budget_tokens(self, n_tokens: int) -> int:
        """Slots per KV head that `budget` allows on a prompt of `n_tokens`: the floor of the product."""
        return floor_share(self.budget, n_tokens)

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        """Slots per KV head for each layer, at most T each; their sum is `n_layers * budget_tokens(n_tokens)`.

        `BudgetError` if the method cannot run with so few slots; it names the slots, the limit and the remedy.
        """
        slots = self.budget_tokens(n_tokens)
        if slots < self.minimum_tokens:
            longer = math.ceil(self.minimum_tokens / self.budget)
            raise BudgetError(
                f"budget {self.budget} of {n_tokens} tokens = {slots} slots; {self.name} needs at least "
                f"{self.minimum_tokens}: {_larger_budget(self.minimum_tokens, n_tokens)}, or use prompts of at least "
                f"{longer} tokens"
            )
        return [slots] * n_layers

    def preference(self, layer: LayerStates) -> Tensor:
        """What `allocate` has to know of a layer, small beside its keys; called only if `allocates` is true."""
        raise RuntimeError(f"{self.name} allocates no slots to layers")

    def allocate(self, preferences: Sequence[Tensor], n_tokens: int, n_kv_heads: int) -> list[int]:
        """Slots of each layer, summed over its KV heads, from what `preference` gave for all of them, in order.

        From H_k to `H_k * T` each, in all `n_layers * H_k * budget_tokens(n_tokens)`. Called only if `allocates` is
        true; `layer_budgets` then only refuses budgets. Until then the layers are held, with what the policy needs.
        """
        raise RuntimeError(f"{self.name} allocates no slots to layers")

    @abstractmethod
    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Compress one layer once, at the end of the prompt.

        The layer is not to be modified; what is returned may share memory with it (callers copy before they write).
        `budget_tokens` is the layer's entry of `layer_budgets`, slots per KV head, averaged over the heads; of a policy
        that allocates its entry of `allocate`, slots of all KV heads together.
        """

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        """Update one row of one layer in place after one new token; called only if `steps` is true.

        The new token is in the scratch slot; `attention`, `(H, m + 1)` fp32, is its softmax over the slots.
        """
        raise RuntimeError(f"{self.name} declares no decoding step")

    def without_merging(self) -> Policy | None:
        """The base of a method that merges: the same slots with nothing merged into them; None if this merges nothing.

        Here by the option `merge`, which such a method has; one with another switch says so.
        """
        return dataclasses.replace(self, **{"merge": False}) if getattr(self, "merge", False) else None

    @classmethod
    def rows_stepper(cls) -> type[RowsStepper] | None:
        """The class that does to all rows on a GPU what `step` does to one; None steps them row by row."""
        return None

    def options(self) -> dict[str, object]:
        """The options that differ from their defaults, without the budget: what tells two arms of a method apart."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "budget" and getattr(self, f.name) != f.default
        }


def floor_share(share: float, n_tokens: int) -> int:
    """The floor of a share of some tokens, the product rounded to 9 digits first: in binary, 0.35 * 20 < 7."""
    return math.floor(round(share * n_tokens, 9))


def with_whole_layers(
    policy: Policy, n_tokens: int, n_layers: int, n_first: int, n_last: int, whole_layers: WholeLayers = "inside"
) -> list[int]:
    """Layer budgets with the first and last layers whole; what is left is spread evenly over the others.

    Where whole layers come "on_top", the others have the whole budget, and more is kept than it says. `BudgetError` if
    the others would get fewer than the method's `minimum_tokens` each.
    """
    if whole_layers == "on_top":
        slots = Policy.layer_budgets(policy, n_tokens, n_layers)
        return [slots[i] if n_first <= i < n_layers - n_last else n_tokens for i in range(n_layers)]
    others = [index for index in range(n_layers) if n_first <= index < n_layers - n_last]
    n_whole = n_layers - len(others)
    total = n_layers * policy.budget_tokens(n_tokens)
    left = total - n_whole * n_tokens
    least = len(others) * policy.minimum_tokens
    if left < least:
        options = {"whole_first_layers": n_first, "whole_last_layers": n_last}
        lower = " or ".join(name for name, count in options.items() if count)
        average = math.ceil((n_whole * n_tokens + least) / n_layers)
        raise BudgetError(
            f"budget {policy.budget} of {n_tokens} tokens in {n_layers} layers = {total} slots per KV head; "
            f"{policy.name} needs {n_whole * n_tokens} for {n_whole} whole layers and at least {least} for the others: "
            f"{f'lower {lower}, or ' if lower else ''}{_larger_budget(average, n_tokens)}"
        )
    budgets = [n_tokens] * n_layers
    for rank, index in enumerate(others):
        budgets[index] = (rank + 1) * left // len(others) - rank * left // len(others)
    return budgets


def _larger_budget(slots: int, n_tokens: int) -> str:
    budget = math.ceil(1000 * slots / n_tokens) / 1000
    return f"raise the budget to {budget}" if budget < 1 else "set budget=1, which keeps everything"


def find_rows_stepper(policy_class: type[Policy]) -> type[RowsStepper] | None:
    """A policy class's stepper; None if it has none, or redefines `step` below the class that has one."""
    owner = next(owner for owner in policy_class.__mro__ if {"rows_stepper", "step"} & set(vars(owner)))
    return policy_class.rows_stepper() if "rows_stepper" in vars(owner) else None
