"""Random and model-like inputs for policy tests; plain functions so that a failing case is easy to rebuild by hand."""

import torch
from torch import Tensor

from kvbench.methods.base import LayerStates


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def causal_attention(queries: Tensor, keys: Tensor) -> Tensor:
    group = queries.shape[0] // keys.shape[0]
    logits = queries @ keys.repeat_interleave(group, 0).transpose(1, 2) / queries.shape[-1] ** 0.5
    n_tokens = queries.shape[1]
    hidden = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1)


def make_layer(
    n_query_heads: int, n_kv_heads: int, n_tokens: int, *, head_dim: int = 16, seed: int = 0, correlated: bool = False,
    layer_index: int = 3, n_layers: int = 8, window_tokens: int = 40, dtype: torch.dtype = torch.float32,
) -> LayerStates:  # fmt: skip
    """Independent Gaussian keys, or keys like a model's: a shared mean plus a slow walk (adjacent cosine ~0.85).

    The window has more rows than most methods ask for, as when another arm of the prefill asks for more.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys = normal(n_kv_heads, n_tokens, head_dim)
    if correlated:
        for t in range(1, n_tokens):
            keys[:, t] = 0.8 * keys[:, t - 1] + 0.6 * keys[:, t]
        keys = 2.0 * keys + normal(n_kv_heads, 1, head_dim)
    values = normal(n_kv_heads, n_tokens, head_dim)
    queries = normal(n_query_heads, n_tokens, head_dim)
    attention = causal_attention(queries, keys)
    extras = {"queries": queries.to(dtype), "scaling": torch.tensor(head_dim**-0.5)}
    extras["rotary_frequencies"] = 100.0 ** -torch.linspace(0, 1, head_dim // 2)
    every_row = queries @ keys.repeat_interleave(n_query_heads // n_kv_heads, 0).transpose(1, 2) / head_dim**0.5
    future = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    extras["window_logsumexp"] = every_row.masked_fill(future, -torch.inf).logsumexp(-1)[:, -window_tokens:]
    extras["output_weight"] = normal(n_query_heads, head_dim, 24).to(dtype)
    extras["reconstruction"] = normal(n_kv_heads, n_tokens).sigmoid()
    return LayerStates(
        keys.to(dtype), values.to(dtype), layer_index, n_layers, n_query_heads, seed=seed,
        column_sums=attention.sum(1), window_attention=attention[:, -window_tokens:], extras=extras,
    )  # fmt: skip


def new_tokens(
    n_steps: int, n_query_heads: int, n_kv_heads: int, n_slots: int, *, head_dim: int = 16, seed: int = 0
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys, values and peaked attention rows over slots + 1 for `n_steps` new tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for _ in range(n_steps):
        key, value = (torch.randn(n_kv_heads, head_dim, generator=generator) for _ in range(2))
        attention = (4.0 * torch.randn(n_query_heads, n_slots + 1, generator=generator)).softmax(-1)
        tokens.append((key, value, attention))
    return tokens
