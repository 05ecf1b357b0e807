"""Observed attention in plain torch, on any device: one pass over blocks of queries, in memory linear in T.

Each block takes the softmax of its logits against all keys up to its end; output, column sums and last rows all come
from that one block of probabilities. The logits above the diagonal outside the block are never computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Queries a block: as many as keep the block of logits below 32 MiB, within these bounds. A layer of 9 heads x 2,048
# tokens x 64 in fp32 takes, on two idle CPU cores, with 32, 64, 128 and 256 queries a block 61, 58, 60 and 63 ms; with
# one KV head at a time 82, 69, 62 and 59 ms; SDPA alone, without sums, 45 ms; the CPU's flash forward and a second pass
# for the sums 83 ms. Where other processes compete for the cores every operation waits for its slowest thread, and few
# large blocks win: there 64, 128, 256 and 512 queries took 1,889, 922, 845 and 723 ms in the median, SDPA 228 ms.
MIN_BLOCK_QUERIES = 64
MAX_BLOCK_QUERIES = 256
BLOCK_LOGITS = 2**23


def observe_torch(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, window_tokens: int = 0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, column sums and last rows from one pass over blocks of queries, on any device.

    Args:
        query: `(H, T, D)`.
        keys: `(H_k, T, D)`.
        values: `(H_k, T, D)`.
        scaling: factor on the logits.
        window_tokens: how many last rows to keep; 0 for none.
        softcap: see `cap_logits`.

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
    block = max(MIN_BLOCK_QUERIES, min(MAX_BLOCK_QUERIES, BLOCK_LOGITS // (n_query_heads * n_tokens)))
    block = min(block, n_tokens)
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
        cap_logits(grouped, softcap)
        attention[:, :, start:end] += future[:count, :count]
        torch.softmax(grouped, -1, out=grouped)
        sums[:, :end] += attention.sum(1)
        block_output = torch.bmm(grouped, values[:, :end])
        output[start:end] = block_output.view(n_query_heads, count, head_dim).transpose(0, 1)
        if rows is not None and end > first_row:
            inside = max(first_row - start, 0)
            rows[:, start + inside - first_row : end - first_row, :end] = attention[:, inside:]
    return output.transpose(0, 1), sums, rows


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Soft-cap logits in place: `softcap * tanh(logits / softcap)` (Gemma 2, arXiv:2408.00118, section 2); None: no."""
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def window_rows(
    query: Tensor, keys: Tensor, scaling: float, window_tokens: int, softcap: float | None = None
) -> Tensor:
    """Causal softmax rows of the last queries, by one matrix product.

    Args:
        query: `(H, T, D)`.
        keys: `(H_k, T, D)`.
        scaling: factor on the logits.
        window_tokens: W.
        softcap: see `cap_logits`.

    Returns:
        `(H, min(W, T), T)` fp32.
    """
    n_query_heads, n_tokens, head_dim = query.shape
    n_kv_heads = keys.shape[0]
    window = min(window_tokens, n_tokens)
    last = (query[:, n_tokens - window :].float() * scaling).reshape(n_kv_heads, -1, head_dim)
    logits = torch.bmm(last, keys.float().transpose(1, 2)).view(n_query_heads, window, n_tokens)
    cap_logits(logits, softcap)
    logits[:, :, n_tokens - window :] += torch.full((window, window), -math.inf, device=query.device).triu_(1)
    return logits.softmax(-1)
