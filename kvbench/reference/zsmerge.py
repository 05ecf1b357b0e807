"""ZSMerge in plain loops and fp64: score by decayed attention; tail, top, and the residual R in equal blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvbench.methods.base import LayerStates
from kvbench.methods.zsmerge import ZSMerge
from kvbench.reference.stepped import reduce_group

LIMITS = (1e-6, 1e-6, 1e-6)


def twin(policy: ZSMerge, layer: LayerStates, n_slots: int) -> list[tuple[list[int], Tensor, Tensor, Tensor | None]]:
    """For each head positions, keys, values and biases (None without merging)."""
    dense, top, tail = policy.split(n_slots)
    assert layer.window_attention is not None
    rows = layer.window_attention[:, -policy.observation_tokens :].double().tolist()
    G, n_tokens = layer.group_size, layer.n_tokens
    heads: list[tuple[list[int], Tensor, Tensor, Tensor | None]] = []
    for h in range(layer.n_kv_heads):
        k, v = layer.keys[h].double(), layer.values[h].double()
        s = []
        for j in range(n_tokens):
            decayed = [
                sum(row[j] * policy.decay**age for age, row in enumerate(rows[h * G + g][::-1])) for g in range(G)
            ]
            s.append(reduce_group(decayed, policy.group_reduce))
        older = sorted(range(n_tokens - tail), key=lambda j: (s[j], j), reverse=True)
        R = sorted(older[top:])
        slots = {j: (k[j], v[j], 1) for j in [*older[:top], *range(n_tokens - tail, n_tokens)]}
        for i in range(dense):
            block = R[: math.ceil(len(R) / (dense - i))]
            R = R[len(block) :]
            pivot = max(block, key=lambda j: (s[j], j))
            slots[pivot] = (k[block].mean(0), v[block].mean(0), len(block)) if policy.merge else (k[pivot], v[pivot], 1)
        kept = sorted(slots)
        keys, values = (torch.stack(states).float() for states in zip(*(slots[j][:2] for j in kept), strict=True))
        bias = torch.tensor([policy.bias_scale * math.log(slots[j][2]) for j in kept]) if policy.merge else None
        heads.append((kept, keys, values, bias))
    return heads
