"""Attention over the whole prompt that also yields what policies score keys by.

For a layer with queries q, keys k and logits `s_ij = scaling * q_i . k_j` (j <= i, causal) the prefill needs

    P_ij = exp(s_ij - L_i),   L_i = log sum_{j <= i} exp(s_ij),   output_i = sum_j P_ij v_j,

and on request the column sums `sum_i P_ij` (the accumulated attention of H2O, Zhang et al. 2023, arXiv:2306.14048,
section 4) and the last W rows of P. P itself, T x T, is never held: memory is linear in T.

Two versions compute the column sums. "torch" goes through blocks of queries, takes the softmax of each block against
all keys up to its end, and gets output, sums and rows from that one block. "triton" keeps the library's flash forward
with its L and adds one kernel (`column_sums_triton.py`). Without a request it is plain SDPA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvbench.attention.backend import choose_backend
from kvbench.errors import ConfigError, ModelError
from kvbench.policies.base import LayerStates

# Queries a block of the torch version. A layer of 9 heads x 2,048 tokens x 64 in fp32 takes, on two idle CPU cores with
# 32, 64, 128 and 256 queries a block, 61, 58, 60 and 63 ms; one KV head at a time 82, 69, 62 and 59 ms; SDPA alone, with
# no sums, 45 ms; the CPU's flash forward and a second pass for the sums 83 ms. On one thread, in CPU time: 92 ms (64
# queries) against SDPA's 87, and a whole prefill of the 135M model's layers 0.98 to 1.03 of the plain one.
BLOCK_QUERIES = 64


@dataclass
class Observation:
    """What one layer's attention over the prompt gave.

    Attributes:
        output: `(H, T, D)`, the queries' dtype.
        column_sums: `(H, T)` fp32, attention mass each key received from all queries, or None if not asked for.
        window_attention: `(H, min(W, T), T)` fp32, the softmax rows of the last queries, or None if not asked for.
        backend: what computed it: "sdpa", "torch" or "triton".
    """

    output: Tensor
    column_sums: Tensor | None
    window_attention: Tensor | None
    backend: str


@torch.no_grad()
def observe(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    *,
    column_sums: bool,
    window_tokens: int,
    backend: str = "auto",
) -> Observation:
    """Exact causal attention of a prompt on itself, with column sums and last rows on request.

    Args:
        query: `(H, T, D)` after RoPE.
        keys: `(H_k, T, D)` after RoPE; query head h uses KV head `h // (H / H_k)`.
        values: `(H_k, T, D)`.
        scaling: factor on the logits.
        column_sums: whether to sum each key's attention over all queries.
        window_tokens: how many last rows of the attention to return; 0 for none.
        backend: "auto", "torch" or "triton" (see `choose_backend`); concerns the column sums only.

    Returns:
        The `Observation`. Accumulation is fp32 for every dtype.

    Raises:
        ConfigError: if `backend` cannot run here.
    """
    if not column_sums:
        output = _sdpa(query, keys, values, scaling)
        rows = window_rows(query, keys, scaling, window_tokens) if window_tokens else None
        return Observation(output, None, rows, "sdpa")
    chosen = choose_backend(backend, query.device)
    if chosen == "torch":
        output, sums, rows = observe_torch(query, keys, values, scaling, window_tokens)
        return Observation(output, sums, rows, chosen)
    from kvbench.attention.column_sums_triton import column_sums_triton, forward_with_log_sum_exp

    output, log_sum_exp = forward_with_log_sum_exp(query, keys, values, scaling)
    sums = column_sums_triton(query, keys, log_sum_exp, scaling)
    rows = window_rows(query, keys, scaling, window_tokens) if window_tokens else None
    return Observation(output, sums, rows, chosen)


def observe_torch(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, window_tokens: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, column sums and last rows from one pass over blocks of queries, on any device.

    Args:
        query: `(H, T, D)`.
        keys: `(H_k, T, D)`.
        values: `(H_k, T, D)`.
        scaling: factor on the logits.
        window_tokens: how many last rows to keep; 0 for none.

    Returns:
        output `(H, T, D)` in the queries' dtype, column sums `(H, T)` fp32, rows `(H, min(W, T), T)` fp32 or None.
    """
    n_query_heads, n_tokens, head_dim = query.shape
    n_kv_heads = keys.shape[0]
    group_size = n_query_heads // n_kv_heads
    scaled_query = (query.float() * scaling).view(n_kv_heads, group_size, n_tokens, head_dim)
    keys_transposed = keys.float().contiguous().transpose(1, 2)
    values = values.float().contiguous()
    output = query.new_empty(n_tokens, n_query_heads, head_dim)
    sums = torch.zeros(n_query_heads, n_tokens, device=query.device)
    first_row = n_tokens - min(window_tokens, n_tokens)
    rows = torch.zeros(n_query_heads, n_tokens - first_row, n_tokens, device=query.device) if window_tokens else None
    block = min(BLOCK_QUERIES, n_tokens)
    future = torch.full((block, block), -math.inf, device=query.device).triu_(1)
    buffer = torch.empty(n_query_heads * block * n_tokens, device=query.device)
    for start in range(0, n_tokens, block):
        end = min(start + block, n_tokens)
        count = end - start
        # The queries of a group lie one below the other, so that each block of keys is read once per group.
        grouped = buffer[: n_query_heads * count * end].view(n_kv_heads, group_size * count, end)
        attention = grouped.view(n_query_heads, count, end)
        block_query = scaled_query[:, :, start:end].reshape(n_kv_heads, group_size * count, head_dim)
        torch.bmm(block_query, keys_transposed[:, :, :end], out=grouped)
        attention[:, :, start:end] += future[:count, :count]
        torch.softmax(grouped, -1, out=grouped)
        sums[:, :end] += attention.sum(1)
        block_output = torch.bmm(grouped, values[:, :end])
        output[start:end] = block_output.view(n_query_heads, count, head_dim).transpose(0, 1)
        if rows is not None and end > first_row:
            inside = max(first_row - start, 0)
            rows[:, start + inside - first_row : end - first_row, :end] = attention[:, inside:]
    return output.transpose(0, 1), sums, rows


def window_rows(query: Tensor, keys: Tensor, scaling: float, window_tokens: int) -> Tensor:
    """Causal softmax rows of the last queries, by one matrix product.

    Args:
        query: `(H, T, D)`.
        keys: `(H_k, T, D)`.
        scaling: factor on the logits.
        window_tokens: W.

    Returns:
        `(H, min(W, T), T)` fp32.
    """
    n_query_heads, n_tokens, head_dim = query.shape
    n_kv_heads = keys.shape[0]
    window = min(window_tokens, n_tokens)
    last = (query[:, n_tokens - window :].float() * scaling).reshape(n_kv_heads, -1, head_dim)
    logits = torch.bmm(last, keys.float().transpose(1, 2)).view(n_query_heads, window, n_tokens)
    logits[:, :, n_tokens - window :] += torch.full((window, window), -math.inf, device=query.device).triu_(1)
    return logits.softmax(-1)


class Observer:
    """The attention context of a prefill: attends layer by layer and hands each layer's states to a function.

    Attributes:
        backends: names of the implementations used so far, for the record.
        layers_seen: indices of the layers observed so far; after a forward pass, as many as the model has.
    """

    def __init__(
        self,
        needs: frozenset[str],
        window_tokens: int,
        n_layers: int,
        n_query_heads: int,
        seed: int,
        on_layer: Callable[[LayerStates], None],
        backend: str = "auto",
    ) -> None:
        """Take the union of what the policies need.

        Args:
            needs: of "column_sums" and "window_attention".
            window_tokens: the largest window any policy needs; required with "window_attention".
            n_layers: number of layers of the model.
            n_query_heads: H.
            seed: passed on in `LayerStates.seed`.
            on_layer: called once per layer with its states, whose keys and values are views that live as long as they
                are referenced.
            backend: "auto", "torch" or "triton".

        Raises:
            ConfigError: if a need is unknown, or "window_attention" comes without a window.
        """
        unknown = needs - {"column_sums", "window_attention"}
        if unknown:
            raise ConfigError(
                f"needs={sorted(unknown)} cannot be observed: use 'column_sums' or 'window_attention', or compute the "
                "scores from keys and values in compress()"
            )
        if "window_attention" in needs and window_tokens < 1:
            raise ConfigError(f"window_tokens={window_tokens} is below 1: policies that need 'window_attention' set it")
        self.needs = needs
        self.window_tokens = window_tokens if "window_attention" in needs else 0
        self.n_layers = n_layers
        self.n_query_heads = n_query_heads
        self.seed = seed
        self.on_layer = on_layer
        self.backend = backend
        self.backends: set[str] = set()
        self.layers_seen: set[int] = set()

    def attend(
        self,
        layer_index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        """Attend over the whole prompt in one layer and report its states.

        Args:
            layer_index: index of the layer, from 0.
            query: `(1, H, T, D)` after RoPE.
            key: `(1, H_k, T, D)` after RoPE.
            value: `(1, H_k, T, D)`.
            scaling: factor on the logits.
            sliding_window: tokens the layer lets each query see, itself included, or None for all.

        Returns:
            `(1, T, H, D)`.

        Raises:
            ModelError: for a batch, for a prompt that does not start at token 0, or one longer than a sliding window.
        """
        n_tokens = query.shape[2]
        if query.shape[0] != 1:
            raise ModelError(f"a prefill of {query.shape[0]} prompts at once is not supported: give one prompt a call")
        if key.shape[2] != n_tokens:
            raise ModelError(
                f"{n_tokens} queries over {key.shape[2]} keys: a prefill takes the whole prompt in one call, "
                "with use_cache=False"
            )
        if sliding_window is not None and n_tokens > sliding_window:
            raise ModelError(
                f"layer {layer_index} sees a sliding window of {sliding_window} tokens, the prompt has {n_tokens}: "
                f"set max_prompt_tokens to at most {sliding_window} or use a model without sliding windows"
            )
        observation = observe(
            query[0],
            key[0],
            value[0],
            scaling,
            column_sums="column_sums" in self.needs,
            window_tokens=self.window_tokens,
            backend=self.backend,
        )
        self.backends.add(observation.backend)
        self.layers_seen.add(layer_index)
        self.on_layer(
            LayerStates(
                keys=key[0],
                values=value[0],
                layer_index=layer_index,
                n_layers=self.n_layers,
                n_query_heads=self.n_query_heads,
                seed=self.seed,
                column_sums=observation.column_sums,
                window_attention=observation.window_attention,
            )
        )
        return observation.output.transpose(0, 1)[None]


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    return scaled_dot_product_attention(
        query[None], keys[None], values[None], is_causal=True, scale=scaling, enable_gqa=keys.shape[0] != query.shape[0]
    )[0]
