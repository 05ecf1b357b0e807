"""The column-sum kernel against fp64, on the GPU or, without one, under Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor

from kvbench.errors import ConfigError
from kvbench.ops.observe import forward_with_log_sum_exp, observe

# Kernels are imported inside the tests: tests/conftest.py decides first whether they run on a GPU or are interpreted.

CASES = [
    (torch.float32, 4, 4, 1, 16),
    (torch.float32, 4, 2, 17, 64),
    (torch.float32, 3, 1, 127, 80),
    (torch.float32, 2, 2, 128, 128),
    (torch.float32, 2, 1, 129, 64),
    (torch.float32, 2, 1, 40, 36),
    (torch.float16, 4, 2, 129, 64),
    (torch.float16, 3, 1, 300, 80),
    (torch.float16, 2, 2, 64, 128),
    (torch.bfloat16, 4, 2, 129, 64),
    (torch.bfloat16, 3, 1, 300, 80),
]


def random_states(
    dtype: torch.dtype, n_query_heads: int, n_kv_heads: int, n_tokens: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_tokens + head_dim)

    def draw(n_heads: int) -> Tensor:
        states = torch.randn(n_tokens, n_heads, head_dim, generator=generator) * 1.5
        return states.to(device, dtype).transpose(0, 1)

    return draw(n_query_heads), draw(n_kv_heads), draw(n_kv_heads)


def reference(query: Tensor, keys: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Column sums and log-sum-exp, fp64."""
    logits = query.double() @ keys.double().repeat_interleave(len(query) // len(keys), 0).transpose(1, 2) * scaling
    future = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).triu(1)
    logits = logits.masked_fill(future, -math.inf)
    return logits.softmax(-1).sum(1), logits.logsumexp(-1)


def relative_rms_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{str(case[0])[6:]}-H{case[1]}-{case[2]}-T{case[3]}-D{case[4]}"
)
def test_kernel_agrees_with_softmax(triton_device: torch.device, case: tuple[torch.dtype, int, int, int, int]) -> None:
    from kvbench.ops.column_sums_triton import column_sums_triton

    if case[0] == torch.bfloat16 and triton_device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 by its bit patterns: checked on a GPU only")
    query, keys, _ = random_states(*case, triton_device)
    expected, log_sum_exp = reference(query, keys, 0.2)
    got = column_sums_triton(query, keys, log_sum_exp.float(), 0.2)
    assert got.dtype == torch.float32
    assert relative_rms_error(got, expected) < 2e-6


@pytest.mark.parametrize("blocks", [(16, 64), (64, 16), (32, 32)])
def test_tile_sizes_do_not_change_the_result(triton_device: torch.device, blocks: tuple[int, int]) -> None:
    from kvbench.ops.column_sums_triton import KernelConfig, column_sums_triton

    query, keys, _ = random_states(torch.float32, 2, 1, 150, 32, triton_device)
    expected, log_sum_exp = reference(query, keys, 0.2)
    got = column_sums_triton(query, keys, log_sum_exp.float(), 0.2, KernelConfig(*blocks, 4, 2))
    assert relative_rms_error(got, expected) < 2e-6


def test_observe_with_triton_agrees_with_observe_in_torch(triton_device: torch.device) -> None:
    query, keys, values = random_states(torch.float32, 4, 2, 100, 36, triton_device)
    got, expected = (
        observe(query, keys, values, 0.2, column_sums=True, window_tokens=8, backend=name)
        for name in ("triton", "torch")
    )
    assert (got.backend, expected.backend) == ("triton", "torch")
    for name in ("output", "column_sums", "window_attention"):
        assert getattr(got, name).shape == getattr(expected, name).shape
        assert relative_rms_error(getattr(got, name), getattr(expected, name).double()) < 2e-6


def test_log_sum_exp_of_the_fused_forward(triton_device: torch.device) -> None:
    query, keys, values = random_states(torch.float32, 6, 2, 45, 20, triton_device)
    log_sum_exp = forward_with_log_sum_exp(query, keys, values, 0.2)[1]
    assert relative_rms_error(log_sum_exp, reference(query, keys, 0.2)[1]) < 1e-6


def test_a_head_too_wide_is_refused(triton_device: torch.device) -> None:
    from kvbench.ops.column_sums_triton import column_sums_triton

    query = torch.zeros(1, 4, 264, device=triton_device)
    with pytest.raises(ConfigError, match="head dimension 264 is above 256"):
        column_sums_triton(query, query, query[:, :, 0], 1.0)
