"""Attention over the whole prompt that also yields what policies score keys by.

For a layer with queries q, keys k and logits `s_ij = scaling * q_i . k_j` (j <= i, causal) the prefill needs

    P_ij = exp(s_ij - L_i),   L_i = log sum_{j <= i} exp(s_ij),   output_i = sum_j P_ij v_j,

and on request the column sums `sum_i P_ij` (the accumulated attention of H2O, Zhang et al. 2023, arXiv:2306.14048,
section 4) and the last W rows of P. P itself, T x T, is never held: memory is linear in T.

Two versions compute the column sums. "torch" takes the softmax of one block of queries after the other. "triton" keeps
the library's flash forward with its L and adds one kernel (`column_sums_triton.py`). Without a request it is SDPA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import pad, scaled_dot_product_attention

from kvbench.errors import ConfigError
from kvbench.ops.dispatch import choose_kernels

# Queries a block: as many as keep the block of logits below 32 MiB, within these bounds. A layer of 9 heads x 2,048
# tokens x 64 in fp32 takes, on two idle CPU cores, with 32, 64, 128 and 256 queries a block 61, 58, 60 and 63 ms; with
# one KV head at a time 82, 69, 62 and 59 ms; SDPA alone, without sums, 45 ms; the CPU's flash forward and a second pass
# for the sums 83 ms. Where other processes compete for the cores every operation waits for its slowest thread, and few
# large blocks win: there 64, 128, 256 and 512 queries took 1,889, 922, 845 and 723 ms in the median, SDPA 228 ms.
MIN_BLOCK_QUERIES = 64
MAX_BLOCK_QUERIES = 256
BLOCK_LOGITS = 2**23


@dataclass
class Observation:
    """What one layer's attention over the prompt gave."""

    output: Tensor
    """`(H, T, D)`, the queries' dtype."""
    column_sums: Tensor | None
    """`(H, T)` fp32, attention mass each key received from all queries, or None if not asked for."""
    window_attention: Tensor | None
    """`(H, min(W, T), T)` fp32, the softmax rows of the last queries, or None if not asked for."""
    window_logsumexp: Tensor | None
    """`(H, min(W, T))` fp32, L of these rows, or None if not asked for."""
    kernels: str
    """What computed it: "sdpa", "torch" or "triton"."""


@torch.no_grad()
def observe(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, *, column_sums: bool, window_tokens: int,
    window_logsumexp: bool = False, kernels: str = "auto", softcap: float | None = None,
) -> Observation:  # fmt: skip
    """Exact causal attention of a prompt on itself, with column sums and last rows on request.

    Args:
        query: `(H, T, D)` after RoPE.
        keys: `(H_k, T, D)` after RoPE; query head h uses KV head `h // (H / H_k)`.
        values: `(H_k, T, D)`.
        scaling: factor on the logits.
        column_sums: whether to sum each key's attention over all queries.
        window_tokens: how many last rows of the attention to return; 0 for none.
        window_logsumexp: whether to return the log-sum-exp of their logits, too.
        kernels: "auto", "torch" or "triton" (see `choose_kernels`); concerns the column sums only.
        softcap: bound that logits are soft-capped to, which only the torch version knows (see `cap_logits`).

    Returns:
        The `Observation`. Accumulation is fp32 for every dtype.

    Raises:
        ConfigError: if `kernels` cannot run here, or is "triton" with soft-capped logits.
    """
    if softcap is not None and kernels == "triton":
        raise ConfigError(f"kernels=triton do not know logits capped at {softcap}: use kernels=auto or torch")
    if softcap is None and not column_sums:
        grouped = keys.shape[0] != query.shape[0]
        states = query[None], keys[None], values[None]
        output = scaled_dot_product_attention(*states, is_causal=True, scale=scaling, enable_gqa=grouped)[0]
        return Observation(output, None, *window_rows(query, keys, scaling, window_tokens, window_logsumexp), "sdpa")
    if softcap is not None or choose_kernels(kernels, query.device) == "torch":
        options = window_tokens, softcap, window_logsumexp
        output, sums, rows, last = observe_torch(query, keys, values, scaling, *options)
        return Observation(output, sums if column_sums else None, rows, last, "torch")
    from kvbench.ops.column_sums_triton import column_sums_triton

    output, log_sum_exp = forward_with_log_sum_exp(query, keys, values, scaling)
    sums = column_sums_triton(query, keys, log_sum_exp, scaling)
    rows, _ = window_rows(query, keys, scaling, window_tokens)
    last = log_sum_exp[:, -rows.shape[1] :] if window_logsumexp and rows is not None else None
    return Observation(output, sums, rows, last, "triton")


def observe_torch(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, window_tokens: int = 0, softcap: float | None = None,
    window_logsumexp: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Output, column sums and last rows from one pass over blocks of queries, on any device.

    Each block takes the softmax of its logits against all keys up to its end; all three come from that one block of
    probabilities. The logits above the diagonal outside the block are never computed. Arguments as `observe`.

    Returns:
        output `(H, T, D)` in the queries' dtype, column sums `(H, T)` fp32, rows `(H, min(W, T), T)` fp32 or None, and
        their log-sum-exp `(H, min(W, T))` fp32 or None.
    """
    (n_query_heads, n_tokens, head_dim), n_kv_heads = query.shape, keys.shape[0]
    group_size = n_query_heads // n_kv_heads
    scaled_query = (query.float() * scaling).view(n_kv_heads, group_size, n_tokens, head_dim)
    keys_transposed = keys.float().contiguous().transpose(1, 2)
    values = values.float().contiguous()
    output = query.new_empty(n_tokens, n_query_heads, head_dim)
    sums = torch.zeros(n_query_heads, n_tokens, device=query.device)
    first_row = n_tokens - min(window_tokens, n_tokens)
    rows = torch.zeros(n_query_heads, n_tokens - first_row, n_tokens, device=query.device) if window_tokens else None
    log_sums = rows.new_empty(rows.shape[:2]) if rows is not None and window_logsumexp else None
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
        inside = max(first_row - start, 0)
        if log_sums is not None and end > first_row:
            log_sums[:, start + inside - first_row : end - first_row] = attention[:, inside:].logsumexp(-1)
        torch.softmax(grouped, -1, out=grouped)
        sums[:, :end] += attention.sum(1)
        block_output = torch.bmm(grouped, values[:, :end])
        output[start:end] = block_output.view(n_query_heads, count, head_dim).transpose(0, 1)
        if rows is not None and end > first_row:
            rows[:, start + inside - first_row : end - first_row, :end] = attention[:, inside:]
    return output.transpose(0, 1), sums, rows, log_sums


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Soft-cap logits in place: `softcap * tanh(logits / softcap)` (Gemma 2, arXiv:2408.00118, section 2); None: no."""
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Causal attention of the last Q of K tokens, nothing observed: SDPA, or written out for soft-capped logits.

    From query `(B, H, Q, D)`, Q being 1 or K, and key and value `(B, H_k, K, D)` to `(B, Q, H, D)`. The mask is
    `(B, T)` bool over all tokens, of which the keys are the last, False for padding; or the whole `(B, 1, Q, K)`.
    """
    batch_size, n_heads, n_queries, head_dim = query.shape
    n_kv_heads, n_keys = key.shape[1:3]
    if mask is None and softcap is None:
        causal = n_queries > 1
        output = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2)
    if mask is None or mask.dim() == 2:
        past = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device).tril(n_keys - n_queries)
        mask = past[None, None] if mask is None else past & mask[:, None, None, -n_keys:].bool()
    if softcap is None:  # with a mask the fused kernels take no groups of heads
        key, value = (x.repeat_interleave(n_heads // n_kv_heads, 1) for x in (key, value))
        return scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2)
    grouped = query.float().view(batch_size, n_kv_heads, -1, n_queries, head_dim)
    logits = cap_logits(grouped @ key.float().unsqueeze(2).transpose(3, 4) * scaling, softcap)
    weights = logits.masked_fill(~mask.unsqueeze(2), torch.finfo(torch.float32).min).softmax(-1)
    return (weights @ value.float().unsqueeze(2)).view(query.shape).transpose(1, 2).to(query.dtype)


def window_rows(
    query: Tensor, keys: Tensor, scaling: float, window_tokens: int, logsumexp: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Causal softmax rows `(H, min(W, T), T)` fp32 of the last W queries, by one matrix product; None for W = 0.

    With `logsumexp` also the log-sum-exp `(H, min(W, T))` fp32 of their logits, else None.
    """
    if not window_tokens:
        return None, None
    n_query_heads, n_tokens, head_dim = query.shape
    window = min(window_tokens, n_tokens)
    last = (query[:, n_tokens - window :].float() * scaling).reshape(keys.shape[0], -1, head_dim)
    logits = torch.bmm(last, keys.float().transpose(1, 2)).view(n_query_heads, window, n_tokens)
    logits[:, :, n_tokens - window :] += torch.full((window, window), -math.inf, device=query.device).triu_(1)
    return logits.softmax(-1), logits.logsumexp(-1) if logsumexp else None


def forward_with_log_sum_exp(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention by the library's fused kernel, with the log-sum-exp of each row; arguments as `observe`.

    On CUDA what `scaled_dot_product_attention` itself would choose for fp16 and bf16, so that observing costs the sums
    alone (cuDNN on Hopper: measured 1.9 times as fast as flash attention at 32,768 tokens; else flash attention), and
    memory-efficient attention for fp32. On the CPU (only under Triton's interpreter) the CPU's flash kernel.

    Returns:
        output `(H, T, D)` in the queries' dtype, natural log-sum-exp `(H, T)` fp32.
    """
    aten = torch.ops.aten
    n_query_heads, n_tokens, head_dim = query.shape
    group_size = n_query_heads // keys.shape[0]
    padding = -head_dim % 8  # the fused kernels want a multiple of 8; zeros change no logit
    if padding:
        query, keys, values = (pad(x, (0, padding)) for x in (query, keys, values))
    batch = [query[None], keys[None], values[None]]
    on_cuda = query.device.type == "cuda"
    if on_cuda and query.dtype in (torch.float16, torch.bfloat16):
        choice = torch._fused_sdp_choice(
            query[None], keys[None], values[None], None, 0.0, True, scale=scaling, enable_gqa=group_size > 1
        )
        if choice == SDPBackend.CUDNN_ATTENTION.value:
            results = aten._scaled_dot_product_cudnn_attention(*batch, None, True, 0.0, True, False, scale=scaling)
        else:
            results = aten._scaled_dot_product_flash_attention(*batch, 0.0, True, scale=scaling)
    else:
        batch[1:] = [x.repeat_interleave(group_size, 1) for x in batch[1:]]
        if on_cuda:
            results = aten._scaled_dot_product_efficient_attention(*batch, None, True, 0.0, True, scale=scaling)
        else:
            results = aten._scaled_dot_product_flash_attention_for_cpu(*batch, 0.0, True, scale=scaling)
    output, log_sum_exp = results[:2]
    # Some of these kernels pad the rows of the log-sum-exp, and cuDNN's has a last dimension of 1.
    return output[0, :, :, :head_dim], log_sum_exp.reshape(1, n_query_heads, -1)[0, :, :n_tokens]
