"""Exact attention column sums on the GPU: one pass of Q K^T with the log-sum-exp the flash forward leaves behind.

With L_i, the log-sum-exp of row i, known, `sum_i exp(scaling * q_i . k_j - L_i)` needs no softmax: a program owns a
block of keys of one query head and walks over the query blocks at and below the diagonal, adding up probabilities in
fp32 registers. No atomics, so the result is deterministic, and memory beyond the result is nil. The keys of a block are
read once per query head, not once per group: they are used against up to T queries, so sharing them would save nothing
that counts. Per logit the kernel spends D multiply-adds, one multiply-add for scale and L, one exp2 and one addition.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.errors import ConfigError
from kvbench.ops.dispatch import current_device

MAX_HEAD_DIM = 256


class KernelConfig(NamedTuple):
    """Tile sizes and launch parameters of the kernel; one of the two blocks is a multiple of the other."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


def default_config(head_dim: int, dtype: torch.dtype) -> KernelConfig:
    """The configuration by head dimension and dtype; `scripts/bench_kernels.py --sweep` times the alternatives."""
    if dtype == torch.float32:  # no tensor cores: full fp32 products; larger tiles spill registers
        return KernelConfig(32, 64, 8, 2) if head_dim <= 128 else KernelConfig(16, 32, 4, 2)
    # Two programs a multiprocessor (250 registers a thread, no spills on sm_90), so that the exponentials of one can
    # overlap with the products of the other; 128 keys a program keep the queries' traffic from the L2 cache below its
    # bandwidth.
    return KernelConfig(64, 128, 4, 3) if head_dim <= 128 else KernelConfig(64, 64, 4, 2)


def column_sums_triton(
    query: Tensor, keys: Tensor, log_sum_exp: Tensor, scaling: float, config: KernelConfig | None = None
) -> Tensor:
    """Attention mass each key receives, summed over all queries of a causal prompt.

    Args:
        query: `(H, T, D)`, fp16, bf16 or fp32.
        keys: `(H_k, T, D)`, same dtype.
        log_sum_exp: `(H, T)` fp32, natural logarithm, of the scaled causal logits.
        scaling: factor on the logits.
        config: tile sizes and launch parameters; fixed by default, so that runs are repeatable.

    Returns:
        `(H, T)` fp32.

    Raises:
        ConfigError: if D is above 256.
    """
    n_query_heads, n_tokens, head_dim = query.shape
    if head_dim > MAX_HEAD_DIM:
        raise ConfigError(f"head dimension {head_dim} is above {MAX_HEAD_DIM}, the kernel's limit: use kernels=torch")
    config = config or default_config(head_dim, query.dtype)
    query, keys, log_sum_exp = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, log_sum_exp))
    sums = torch.empty(n_query_heads, n_tokens, dtype=torch.float32, device=query.device)
    with current_device(query.device):
        _column_sums_kernel[(triton.cdiv(n_tokens, config.block_keys) * n_query_heads,)](
            query, keys, log_sum_exp, sums, n_tokens, n_query_heads, n_query_heads // keys.shape[0],
            scaling * math.log2(math.e), *query.stride()[:2], *keys.stride()[:2], log_sum_exp.stride(0),
            HEAD_DIM=head_dim, BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_QUERIES=config.block_queries, BLOCK_KEYS=config.block_keys,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return sums


@triton.jit
def _add_blocks(
    acc, query_ptr, log_sum_exp_ptr, keys_transposed, first_query, stop_query, first_key, n_tokens, scale_log2,
    stride_query_token, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Add the probabilities of queries `first_query .. stop_query - 1` to `acc`; only `DIAGONAL` blocks are masked."""
    dims = tl.arange(0, BLOCK_DIM)
    offsets = tl.arange(0, BLOCK_QUERIES)
    for start in range(first_query, stop_query, BLOCK_QUERIES):
        rows = start + offsets
        inside = rows < n_tokens
        base = query_ptr + tl.cast(start, tl.int64) * stride_query_token
        pointers = base + (offsets[:, None] * stride_query_token + dims[None, :])
        if HEAD_DIM == BLOCK_DIM:
            block = tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            block = tl.load(pointers, mask=inside[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
        # An infinite log-sum-exp makes the probabilities of rows past the end zero.
        log_sum_exp = tl.load(log_sum_exp_ptr + rows, mask=inside, other=float("inf")) * 1.4426950408889634
        logits = tl.dot(block, keys_transposed, input_precision="ieee")
        mass = tl.exp2(logits * scale_log2 - log_sum_exp[:, None])
        if DIAGONAL:
            columns = first_key + tl.arange(0, BLOCK_KEYS)
            mass = tl.where(rows[:, None] >= columns[None, :], mass, 0.0)
        acc += mass
    return acc


# Not specialised on the numbers that change from prompt to prompt: one compilation serves every length.
@triton.jit(do_not_specialize=["n_tokens", "n_query_heads", "group_size", "stride_log_sum_exp_head"])
def _column_sums_kernel(
    query_ptr, keys_ptr, log_sum_exp_ptr, sums_ptr, n_tokens, n_query_heads, group_size, scale_log2, stride_query_head,
    stride_query_token, stride_keys_head, stride_keys_token, stride_log_sum_exp_head,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One block of keys of one query head. The first keys see the most queries: their programs start first."""
    program = tl.program_id(0)
    head = (program % n_query_heads).to(tl.int64)
    first_key = (program // n_query_heads) * BLOCK_KEYS
    columns = first_key + tl.arange(0, BLOCK_KEYS)
    dims = tl.arange(0, BLOCK_DIM)
    keys_transposed = tl.load(
        keys_ptr
        + (head // group_size) * stride_keys_head
        + columns[None, :].to(tl.int64) * stride_keys_token
        + dims[:, None],
        mask=(columns[None, :] < n_tokens) & (dims[:, None] < HEAD_DIM),
        other=0.0,
    )
    query_ptr += head * stride_query_head
    log_sum_exp_ptr += head * stride_log_sum_exp_head
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), dtype=tl.float32)
    first_query = (first_key // BLOCK_QUERIES) * BLOCK_QUERIES
    below_diagonal = tl.minimum(tl.cdiv(first_key + BLOCK_KEYS, BLOCK_QUERIES) * BLOCK_QUERIES, n_tokens)
    acc = _add_blocks(
        acc, query_ptr, log_sum_exp_ptr, keys_transposed, first_query, below_diagonal, first_key, n_tokens, scale_log2,
        stride_query_token, HEAD_DIM, BLOCK_DIM, BLOCK_QUERIES, BLOCK_KEYS, True,
    )  # fmt: skip
    acc = _add_blocks(
        acc, query_ptr, log_sum_exp_ptr, keys_transposed, below_diagonal, n_tokens, first_key, n_tokens, scale_log2,
        stride_query_token, HEAD_DIM, BLOCK_DIM, BLOCK_QUERIES, BLOCK_KEYS, False,
    )  # fmt: skip
    tl.store(sums_ptr + head * n_tokens + columns, tl.sum(acc, axis=0), mask=columns < n_tokens)
