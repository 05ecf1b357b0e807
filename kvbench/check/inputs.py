"""The inputs of the check: layers as a prefill hands them out, and new tokens as a decode step brings them.

States come from the engines' own `Observer`, so a policy gets exactly what it declares in `needs`, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig

from kvbench.methods.base import (
    CompressedLayer,
    DecodeSlots,
    LayerStates,
    Policy,
    constant_state,
    make_state,
    slot_state,
)  # fmt: skip
from kvbench.runtime.observe import Observer

BUDGETS = (0.1, 0.2, 0.35, 0.5, 1.0)
N_LAYERS = 32
HEAD_DIM = 16
SEED = 7
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (4, 1)}
"""Query heads and KV heads of each kind of attention."""


@dataclass(frozen=True)
class Case:
    """One call of `compress`.

    Attributes:
        heads: "MHA", "GQA" or "MQA".
        n_tokens: prompt length T.
        budget: fraction kept.
        layer_index: of `N_LAYERS` layers.
        dtype: of keys and values.
        equal_keys: whether all keys of a head are the same, so that every comparison is a tie.
    """

    heads: str
    n_tokens: int
    budget: float
    layer_index: int = N_LAYERS // 2
    dtype: torch.dtype = torch.float32
    equal_keys: bool = False

    @property
    def n_kv_heads(self) -> int:
        """H_k."""
        return HEADS[self.heads][1]

    def __str__(self) -> str:
        n_query_heads, n_kv_heads = HEADS[self.heads]
        keys = ", equal keys" if self.equal_keys else ""
        return (
            f"{self.heads} {n_query_heads}/{n_kv_heads}, {self.n_tokens} tokens, budget {self.budget:g}, "
            f"layer {self.layer_index}, {str(self.dtype).removeprefix('torch.')}{keys}"
        )


def cases(window_tokens: int, budgets: Iterable[float]) -> list[Case]:
    """The cases for a policy.

    Args:
        window_tokens: the policy's window; prompts shorter and a little longer than it are among the cases.
        budgets: fractions to try.
    """
    lengths = {7, 40, 97}
    if window_tokens > 1:
        lengths |= {window_tokens - 1, window_tokens + 13}
    found: list[Case] = []
    for budget in budgets:
        found += [Case(heads, n_tokens, budget) for heads in HEADS for n_tokens in sorted(lengths)]
        found += [Case("GQA", 97, budget, layer_index=index) for index in (0, N_LAYERS - 1)]
        found.append(Case("GQA", 40, budget, dtype=torch.bfloat16))
        found.append(Case("MHA", 40, budget, equal_keys=True))
    return found


def layer_states(case: Case, policy: Policy) -> LayerStates:
    """What the prefill knows of a layer: random queries and values, and keys like a model's.

    Neighbouring keys are alike and all keys of a head share a mean, as in real models.

    Args:
        case: shapes, dtype and layer.
        policy: its `needs` decide what is observed.
    """
    n_query_heads, n_kv_heads = HEADS[case.heads]
    generator = torch.Generator().manual_seed(SEED + case.n_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    noise = normal(n_kv_heads, case.n_tokens + 2, HEAD_DIM)
    keys = normal(n_kv_heads, 1, HEAD_DIM) + noise[:, 2:] + noise[:, 1:-1] + noise[:, :-2]
    if case.equal_keys:
        keys = keys[:, :1].repeat(1, case.n_tokens, 1)
    query, values = normal(n_query_heads, case.n_tokens, HEAD_DIM), normal(n_kv_heads, case.n_tokens, HEAD_DIM)
    caught: list[LayerStates] = []
    observer = Observer(
        needs=policy.needs,
        window_tokens=policy.window_tokens,
        n_layers=N_LAYERS,
        n_query_heads=n_query_heads,
        seed=SEED,
        on_layer=caught.append,
        backend="torch",
        config=LlamaConfig(hidden_size=n_query_heads * HEAD_DIM, num_attention_heads=n_query_heads, head_dim=HEAD_DIM),
    )
    query, keys, values = (tensor.to(case.dtype)[None] for tensor in (query, keys, values))
    observer.attend(case.layer_index, query, keys, values, HEAD_DIM**-0.5)
    return caught[0]


def tensors_of(layer: LayerStates) -> dict[str, Tensor]:
    """All tensors of a layer's states, by name."""
    optional = {"column_sums": layer.column_sums, "window_attention": layer.window_attention}
    observed = {name: tensor for name, tensor in optional.items() if tensor is not None}
    return {"keys": layer.keys, "values": layer.values, **observed, **layer.extras}


def copy_of(layer: LayerStates) -> LayerStates:
    """The same states in tensors of their own."""
    tensors = {name: tensor.clone() for name, tensor in tensors_of(layer).items()}
    return dataclasses.replace(
        layer,
        keys=tensors["keys"],
        values=tensors["values"],
        column_sums=tensors.get("column_sums"),
        window_attention=tensors.get("window_attention"),
        extras={name: tensors[name] for name in layer.extras},
    )


def decode_slots(compressed: CompressedLayer) -> DecodeSlots:
    """The cache's view of a compressed layer: copies with one scratch slot appended."""

    def with_scratch(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.zeros_like(tensor[:, :1])], dim=1)

    copies = {name: with_scratch(tensor) for name, tensor in slot_state(compressed.state).items()}
    copies |= {name: tensor.clone() for name, tensor in constant_state(compressed.state).items()}
    kind = None if compressed.state is None else type(compressed.state)
    return DecodeSlots(
        keys=with_scratch(compressed.keys),
        values=with_scratch(compressed.values),
        state=make_state(kind, copies),
        step_index=torch.zeros((), dtype=torch.int64),
    )


@torch.inference_mode()
def bring_token(slots: DecodeSlots, case: Case, number: int) -> Tensor:
    """Put new token `number` into the scratch slot, as the cache does, and return its attention `(H, m + 1)` fp32."""
    generator = torch.Generator().manual_seed(SEED * 1000 + number)
    n_kv_heads, n_slots, head_dim = slots.keys.shape
    slots.step_index.fill_(number)
    slots.keys[:, -1] = torch.randn(n_kv_heads, head_dim, generator=generator).to(slots.keys.dtype)
    slots.values[:, -1] = torch.randn(n_kv_heads, head_dim, generator=generator).to(slots.values.dtype)
    for state in slot_state(slots.state).values():
        state[:, -1] = 0
    return (3.0 * torch.randn(HEADS[case.heads][0], n_slots, generator=generator)).softmax(-1)
