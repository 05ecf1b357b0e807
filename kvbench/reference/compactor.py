"""Compactor token by token in fp64: leverage l_j = x_j G^-1 x_j with G = X^T X + 0.01 I, and attention within tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.methods.base import LayerStates
from kvbench.methods.compactor import JITTER, Compactor, gaussian_sketch
from kvbench.reference.expected_attention import rope
from kvbench.reference.scored import keep_best


def leverage(policy: Compactor, layer: LayerStates, tokens: range) -> Tensor:
    """`(H_k, n)`; the sketch is the policy's own."""
    frequencies, found = layer.extras["rotary_frequencies"].double(), []
    for k, Phi in zip(layer.keys.double(), gaussian_sketch(layer, policy.sketch_dimensions).double(), strict=True):
        K = torch.stack([rope(k[j], -j, frequencies) for j in tokens])
        X = (K - K.mean(0)) @ Phi
        G = X.T @ X + JITTER * torch.eye(X.shape[1], dtype=torch.float64)
        found.append(torch.stack([x @ torch.linalg.inv(G) @ x for x in X]))
    return torch.stack(found)


def attention(policy: Compactor, layer: LayerStates, tokens: range) -> Tensor:
    """`(H_k, n)`."""
    q, k, n, G = layer.extras["queries"].double(), layer.keys.double(), len(tokens), layer.group_size
    received = torch.zeros(layer.n_kv_heads, n, dtype=torch.float64)
    for h in range(layer.n_query_heads):
        for start in range(0, n, policy.tile_tokens):
            tile = tokens[start : start + policy.tile_tokens]
            for i in tile:
                row = torch.softmax(torch.stack([q[h, i] @ k[h // G, j] for j in tile]), 0)
                received[h // G, start : start + len(tile)] += row / G
    weighted = received * layer.values.double()[:, tokens.start : tokens.stop].norm(dim=-1)
    neighbours = [weighted[:, max(j - 1, 0) : j + 2].sum(1) / 3 for j in range(n)]
    return torch.stack(neighbours, 1)


def twin(policy: Compactor, layer: LayerStates, n_slots: int) -> list[tuple[list[int], Tensor, Tensor, None]]:
    """For each head positions, keys, values and no bias."""
    first, last = policy.start_tokens, policy.end_tokens
    tokens = range(first, layer.n_tokens - last)
    z = {"leverage": leverage(policy, layer, tokens), "attention": attention(policy, layer, tokens)}
    z = {name: (term - term.mean()) / term.std() for name, term in z.items()}
    b = policy.blending if policy.blending is not None else 1 - policy.budget
    scores = b * z["leverage"] + z["attention"] if policy.terms == "both" else z[policy.terms]
    padded = [[0.0] * first + head + [0.0] * last for head in scores.tolist()]
    kept = keep_best(padded, layer.n_tokens, n_slots, first, last)
    return [(head, layer.keys[h, head], layer.values[h, head], None) for h, head in enumerate(kept)]
