"""ExpectedAttention head by head, in plain loops: the yardstick for `kvbench.methods.expected_attention`.

Symbols of the paper: mu and Sigma, mean and covariance of a head's queries before RoPE, R the averaged rotation, z the
expected logit of a key. RoPE is complex multiplication of channel pairs here; nothing is shared with the fast version.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """One state `(D,)` turned by its position."""
    n = len(frequencies)
    pairs = torch.complex(x[:n], x[n : 2 * n]) * torch.polar(torch.ones(n, dtype=x.dtype), position * frequencies)
    return torch.cat([pairs.real, pairs.imag, x[2 * n :]])


def rotation_matrix(positions: range, frequencies: Tensor, d: int) -> Tensor:
    """R, the mean over `positions` of the matrices that turn a state `(d,)`."""
    R = torch.zeros(d, d, dtype=frequencies.dtype)
    for position in positions:
        for i in range(d):
            unit = torch.zeros(d, dtype=frequencies.dtype)
            unit[i] = 1.0
            R[:, i] += rope(unit, position, frequencies) / len(positions)
    return R


def reference_scores(
    queries: Tensor, keys: Tensor, values: Tensor, frequencies: Tensor, scaling: float, *, n_future: int = 512,
    n_sink: int = 4, use_covariance: bool = True, use_vnorm: bool = True, epsilon: float = 0.0,
) -> Tensor:  # fmt: skip
    """Scores `(H_k, T - n_sink)` of all tokens but the sinks, fp64; queries `(H, T, D)` and keys are after RoPE."""
    queries, keys, values, frequencies = (x.double() for x in (queries, keys, values, frequencies))
    n_query_heads, n_tokens, d = queries.shape
    group = n_query_heads // keys.shape[0]
    R = rotation_matrix(range(n_tokens, n_tokens + n_future), frequencies, d)
    scores = torch.zeros(keys.shape[0], n_tokens - n_sink, dtype=torch.float64)
    for h in range(n_query_heads):
        q = torch.stack([rope(queries[h, t], -t, frequencies) for t in range(n_sink, n_tokens)])
        mu = q.mean(0)
        Sigma = sum((torch.outer(x - mu, x - mu) for x in q), torch.zeros(d, d, dtype=torch.float64)) / len(q)
        z = []
        for k in keys[h // group, n_sink:]:
            logit = scaling * (R @ mu) @ k
            if use_covariance:
                logit = logit + scaling**2 * k @ (R @ Sigma @ R.T) @ k / 2
            z.append(logit)
        scores[h // group] += torch.softmax(torch.stack(z), 0) / group
    scores += epsilon
    return scores * values[:, n_sink:].norm(dim=-1) if use_vnorm else scores
