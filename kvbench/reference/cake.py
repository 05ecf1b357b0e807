"""CAKE in plain loops and fp64: a layer's preference P = H^(1/tau1) V^(1/tau2), a token's indicator mean + gamma var.

Source: arXiv 2503.12491; `cake/model/modify_llama.py` and `cake/utils.py` of antgroup/cakekv.
"""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import variance
from typing import Any

from torch import Tensor

from kvbench.reference.scored import keep_best


def columns(policy: Any, layer: Any) -> list[list[list[float]]]:
    """Each query head's tokens before the window, with what each of the last S_w queries gives them."""
    S_w = policy.observation_tokens
    return layer.window_attention[:, -S_w:, : layer.n_tokens - S_w].double().transpose(1, 2).tolist()


def preference(policy: Any, layer: Any) -> float:
    """The layer's preference."""
    heads = columns(policy, layer)
    H = -sum(a * math.log(a) for head in heads for column in head for a in column if a > 0)
    V = sum(variance(column) for head in heads for column in head)
    return H ** (1 / policy.tau1) * V ** (1 / policy.tau2)


def layer_slots(preferences: list[float], total: int, most: int) -> list[int]:
    """`total` slots in proportion to the preferences, `most` to a layer; what is left goes round in equal parts."""
    shares = [min(math.floor(Fraction(P) / sum(map(Fraction, preferences)) * total), most) for P in preferences]
    while (left := total - sum(shares)) > 0:
        open_layers = [i for i, share in enumerate(shares) if share < most]
        for rank, i in enumerate(open_layers):
            shares[i] = min(most, shares[i] + left // len(open_layers) + (rank < left % len(open_layers)))
    return shares


def twin(policy: Any, layer: Any, n_slots: int) -> list[tuple[list[int], Tensor, Tensor, None]]:
    """What a layer keeps of its `n_slots` over all heads: the best of each head, and the window."""
    half, H_k = policy.kernel_tokens // 2, layer.n_kv_heads
    indicators = [
        [sum(column) / len(column) + policy.gamma * variance(column) for column in head]
        for head in columns(policy, layer)
    ]
    P, group = len(indicators[0]), len(indicators) // H_k
    scores = []
    for h in range(H_k):
        mine = indicators[h * group : (h + 1) * group]
        near = [[head[i] for head in mine for i in range(j - half, j + half + 1) if 0 <= i < P] for j in range(P)]
        scores.append([sum(x) / (policy.kernel_tokens * group) for x in near])
    kept = keep_best(scores, layer.n_tokens, n_slots // H_k, 0, policy.observation_tokens)
    return [(p, layer.keys[h, p], layer.values[h, p], None) for h, p in enumerate(kept)]
