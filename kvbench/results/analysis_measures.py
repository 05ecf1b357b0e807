"""What is measured on one layer's states; pure functions of tensors.

The KVMerger paper (arXiv 2407.08454) rests on three observations: adjacent keys are similar, and RoPE is why; a fixed
threshold gives each layer a ratio that belongs to the model and not to the data; the first and last layers attend more
uniformly than the others. Each has its measure here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def adjacent_cosines(states: Tensor) -> Tensor:
    """Cosine of each token's state with the next token's.

    Args:
        states: `(H_k, T, D)` keys or values, T at least 2.

    Returns:
        `(H_k, T - 1)` fp32.
    """
    states = states.float()
    return cosine_similarity(states[:, :-1], states[:, 1:], dim=-1)


def unrotated(keys: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Keys as they were before RoPE: each is rotated back by its own position.

    Args:
        keys: `(H_k, T, D)` after RoPE, halves rotated against each other as in Llama, Mistral and Qwen (Su et al.,
            "RoFormer", arXiv 2104.09864, equation 34, in transformers' layout of halves).
        cosines: `(T, D)` the model's rotary cosines, attention scaling included.
        sines: `(T, D)` likewise.

    Returns:
        `(H_k, T, D)` fp32.
    """
    keys, cosines, sines = keys.float(), cosines.float(), sines.float()
    first, second = keys.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (keys * cosines - turned * sines) / (cosines.square() + sines.square())


def kept_shares(cosines: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Share of slots left if every run of neighbours above a threshold becomes one slot; nothing is protected.

    Args:
        cosines: `(H_k, T - 1)` from `adjacent_cosines`.
        thresholds: cosine thresholds.

    Returns:
        `(H_k, thresholds)` sets over tokens, in (0, 1].
    """
    limits = torch.tensor(thresholds, device=cosines.device)
    links = (cosines.unsqueeze(-1) > limits).sum(1)
    return 1 - links / (cosines.shape[1] + 1)


def attention_uniformity(rows: Tensor) -> tuple[Tensor, Tensor]:
    """How uniformly the last queries attend.

    Args:
        rows: `(H, W, T)` attention of the last W queries of the prompt; row w sees T - W + w + 1 keys.

    Returns:
        `(H,)` mean normalised entropy, 1 for uniform attention over all visible keys and 0 for a single key, and `(H,)`
        mean attention on the first token (the attention sink).
    """
    n_window, n_tokens = rows.shape[1:]
    rows = rows.double()
    entropy = torch.special.entr(rows).sum(-1)
    visible = torch.arange(n_tokens - n_window + 1, n_tokens + 1, device=rows.device, dtype=torch.float64)
    return (entropy / visible.clamp_min(2).log()).mean(-1), rows[..., 0].mean(-1)
