"""The plain engine's cache: one row, one list of tensors per KV head, dense fp32 attention. Slow on purpose.

It shares no code with `kvbench.runtime.cache` and `kvbench.attention`, so that agreement between the engines means
something.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvbench.methods.base import CompressedLayer, DecodeSlots, Policy, constant_state, make_state, slot_state


class _Layer:
    """One layer: keys, values and bias per KV head, each `(n, D)` or `(n,)`, lengths may differ."""

    def __init__(self, compressed: CompressedLayer):
        n_kv_heads, n_slots = compressed.keys.shape[:2]
        lengths = [n_slots] * n_kv_heads if compressed.lengths is None else compressed.lengths.tolist()
        bias = compressed.bias if compressed.bias is not None else compressed.keys.new_zeros(n_kv_heads, n_slots)
        self.keys = [compressed.keys[h, :n].clone() for h, n in enumerate(lengths)]
        self.values = [compressed.values[h, :n].clone() for h, n in enumerate(lengths)]
        self.bias = [bias[h, :n].float().clone() for h, n in enumerate(lengths)]
        self.state_class = None if compressed.state is None else type(compressed.state)
        self.state = {name: tensor.clone() for name, tensor in slot_state(compressed.state).items()}
        self.constants = {name: tensor.clone() for name, tensor in constant_state(compressed.state).items()}

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append one token: key and value `(H_k, D)`."""
        for h in range(len(self.keys)):
            self.keys[h] = torch.cat([self.keys[h], key[h : h + 1]])
            self.values[h] = torch.cat([self.values[h], value[h : h + 1]])
            self.bias[h] = torch.cat([self.bias[h], self.bias[h].new_zeros(1)])

    def attend(self, query: Tensor, scaling: float, softcap: float | None) -> tuple[Tensor, list[Tensor]]:
        """Dense attention of one query `(H, D)`: output `(H, D)` fp32 and the softmax row of each query head."""
        group_size = query.shape[0] // len(self.keys)
        outputs, rows = [], []
        for head in range(query.shape[0]):
            h = head // group_size
            logits = self.keys[h].float() @ query[head].float() * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            row = torch.softmax(logits + self.bias[h], 0)
            outputs.append(row @ self.values[h].float())
            rows.append(row)
        return torch.stack(outputs), rows

    def step(self, policy: Policy, rows: list[Tensor], step_index: Tensor) -> None:
        """Let the policy put the new token (the last slot) in place of another."""
        keys, values = torch.stack(self.keys), torch.stack(self.values)
        state = {
            name: torch.cat([tensor, tensor.new_zeros(tensor.shape[0], 1, *tensor.shape[2:])], 1)
            for name, tensor in self.state.items()
        }
        slots = DecodeSlots(keys, values, make_state(self.state_class, state | self.constants), step_index)
        policy.step(slots, torch.stack(rows))
        self.keys, self.values = list(keys[:, :-1]), list(values[:, :-1])
        self.bias = [bias[:-1] for bias in self.bias]
        self.state = {name: tensor[:, :-1] for name, tensor in state.items()}


class PlainCache(Cache):
    """One arm's cache of one sample; also the attention context of the decode steps.

    Args:
        policy: the arm's policy.
        position: position id of the first new token: the number of tokens seen so far.
    """

    def __init__(self, policy: Policy, position: int):
        super().__init__(layers=[])
        self.policy = policy
        self.position = position
        self.slots_per_layer: list[int] = []
        self.n_bytes = 0
        self._stored: list[_Layer] = []
        self._steps = 0

    def add(self, compressed: CompressedLayer) -> None:
        """Add the next layer."""
        layer = _Layer(compressed)
        self._stored.append(layer)
        self.slots_per_layer.append(compressed.n_slots)
        stored = [*layer.keys, *layer.values, *layer.state.values()]
        if compressed.bias is not None:
            stored += layer.bias
        self.n_bytes += sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new token's key and value `(1, H_k, 1, D)`; returns them unchanged."""
        self._stored[layer_idx].append(key_states[0, :, 0], value_states[0, :, 0])
        return key_states, value_states

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """Attention of the new token `(1, H, 1, D)` over the stored slots, then the policy's step.

        Returns:
            `(1, 1, H, D)` in the query's dtype.
        """
        layer = self._stored[layer_index]
        output, rows = layer.attend(query[0, :, 0], scaling, softcap)
        if self.policy.steps:
            layer.step(self.policy, rows, torch.tensor(self._steps, device=query.device))
        return output[None, None].to(query.dtype)

    def advance(self) -> None:
        """One token has passed through all layers."""
        self.position += 1
        self._steps += 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, which is not the number of slots kept."""
        return self.position

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next query."""
        return self.position

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Key length and offset for a mask; unused, since our mask function makes none."""
        return self.position + 1, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum."""
        return -1
