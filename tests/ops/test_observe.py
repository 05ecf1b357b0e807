"""`observe`, in torch and in Triton, against softmax written out over T x T in fp64.

Kernels run on the GPU or, without one, in Triton's interpreter; they are imported inside the tests, since
tests/conftest.py decides first which of the two.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvbench.errors import ConfigError
from kvbench.ops import observe as ops
from kvbench.ops.observe import forward_with_log_sum_exp, observe

SHAPES = [(4, 4, 70, 16), (6, 2, 129, 16), (4, 1, 64, 8), (3, 3, 1, 8), (9, 3, 200, 64)]  # H, H_k, T, D
SHAPE_IDS = ["H{}-{}-T{}-D{}".format(*shape) for shape in SHAPES]
KERNEL_CASES = [
    (torch.float32, 4, 4, 1, 16), (torch.float32, 4, 2, 17, 64), (torch.float32, 3, 1, 127, 80),
    (torch.float32, 2, 2, 128, 128), (torch.float32, 2, 1, 129, 64), (torch.float32, 2, 1, 40, 36),
    (torch.float16, 4, 2, 129, 64), (torch.float16, 3, 1, 300, 80), (torch.float16, 2, 2, 64, 128),
    (torch.bfloat16, 4, 2, 129, 64), (torch.bfloat16, 3, 1, 300, 80),
]  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch):
    """Make short prompts span several blocks, the last one incomplete."""
    monkeypatch.setattr(ops, "MIN_BLOCK_QUERIES", 32)
    monkeypatch.setattr(ops, "MAX_BLOCK_QUERIES", 32)


def random_states(n_query_heads, n_kv_heads, n_tokens, head_dim, dtype=torch.float32, device="cpu"):
    """Query, keys and values laid out as a model's projections are: token before head."""
    generator = torch.Generator().manual_seed(n_tokens + head_dim)
    draws = [torch.randn(n_tokens, n, head_dim, generator=generator) for n in (n_query_heads, n_kv_heads, n_kv_heads)]
    return tuple((x * 1.5).to(device, dtype).transpose(0, 1) for x in draws)


def softmax_attention(query, keys, values, scaling, softcap=None):
    """Output, probabilities `(H, T, T)` and log-sum-exp `(H, T)`, fp64."""
    keys, values = (x.double().repeat_interleave(query.shape[0] // keys.shape[0], 0) for x in (keys, values))
    logits = query.double() @ keys.transpose(1, 2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).triu(1)
    logits = logits.masked_fill(future, -math.inf)
    attention = logits.softmax(-1)
    return attention @ values, attention, logits.logsumexp(-1)


def error(got, expected):
    """Relative, root mean square."""
    assert got.shape == expected.shape
    return float((got.double() - expected).norm() / expected.norm())


def assert_agrees(got, expected, window_tokens, output=2e-6, column_sums=True):
    assert error(got.output, expected[0]) < output
    if column_sums:
        assert got.column_sums.dtype == torch.float32
        assert error(got.column_sums, expected[1].sum(1)) < 1e-6
    else:
        assert got.column_sums is None
    if window_tokens:
        assert error(got.window_attention, expected[1][:, -window_tokens:]) < 2e-6
    else:
        assert got.window_attention is None


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("window_tokens", [0, 1, 40, 1000])
def test_agrees_with_softmax_in_fp32(shape, window_tokens):
    states = random_states(*shape)
    got = observe(*states, 0.3, column_sums=True, window_tokens=window_tokens, kernels="torch")
    assert got.kernels == "torch"
    assert_agrees(got, softmax_attention(*states, 0.3), window_tokens)
    mass = torch.full((shape[0],), shape[2]).double()  # every query gives one unit
    torch.testing.assert_close(got.column_sums.double().sum(1), mass, rtol=1e-6, atol=0)


def test_blocks_of_the_usual_size_agree_too():
    states = random_states(2, 1, 2 * ops.MAX_BLOCK_QUERIES + 11, 8)
    assert_agrees(observe(*states, 0.3, column_sums=True, window_tokens=20), softmax_attention(*states, 0.3), 20)


@pytest.mark.usefixtures("small_blocks")
def test_sums_and_rows_of_a_bf16_model_are_accumulated_in_fp32():
    states = random_states(6, 2, 129, 16, torch.bfloat16)
    got = observe(*states, 0.25, column_sums=True, window_tokens=16)
    assert got.output.dtype == torch.bfloat16
    # The inputs are exact in fp32, so only the output, rounded once, may carry bf16's half a unit in the last place.
    assert_agrees(got, softmax_attention(*states, 0.25), 16, output=torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("window_tokens", [0, 5, 500])
def test_without_column_sums_it_is_plain_sdpa(window_tokens, monkeypatch):
    monkeypatch.setattr(ops, "observe_torch", lambda *args: pytest.fail("column sums were not asked for"))
    states = random_states(6, 2, 129, 16)
    got = observe(*states, 0.3, column_sums=False, window_tokens=window_tokens)
    assert got.kernels == "sdpa"
    assert_agrees(got, softmax_attention(*states, 0.3), window_tokens, column_sums=False)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("column_sums", [True, False])
def test_soft_capped_logits(column_sums):
    states, options = random_states(6, 2, 129, 16), {"column_sums": column_sums, "window_tokens": 20}
    expected = softmax_attention(*states, 0.3, softcap=2.0)
    assert_agrees(observe(*states, 0.3, softcap=2.0, **options), expected, 20, 1e-6, column_sums)
    assert error(observe(*states, 0.3, **options).output, expected[0]) > 0.1
    with pytest.raises(ConfigError, match=r"capped at 2\.0: use kernels=auto or torch"):
        observe(*states, 0.3, softcap=2.0, kernels="triton", **options)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.untyped_storage().nbytes() // item.element_size())
        return result


def test_memory_grows_linearly():
    largest = {}
    for n_tokens in (1024, 2048):
        states = random_states(2, 1, n_tokens, 16)
        with LargestTensor() as mode:
            observe(*states, 0.25, column_sums=True, window_tokens=8)
        largest[n_tokens] = mode.elements
        assert mode.elements < n_tokens * n_tokens
    assert largest[2048] == 2 * largest[1024]


# ---- the kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: "{}-H{}-{}-T{}-D{}".format(str(case[0])[6:], *case[1:]))
def test_kernel_agrees_with_softmax(triton_device, case):
    from kvbench.ops.column_sums_triton import column_sums_triton

    if case[0] == torch.bfloat16 and triton_device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 by its bit patterns: checked on a GPU only")
    states = random_states(*case[1:], case[0], triton_device)
    _, attention, log_sum_exp = softmax_attention(*states, 0.2)
    got = column_sums_triton(*states[:2], log_sum_exp.float(), 0.2)
    assert got.dtype == torch.float32
    assert error(got, attention.sum(1)) < 2e-6


@pytest.mark.parametrize("blocks", [(16, 64), (64, 16), (32, 32)])
def test_tile_sizes_do_not_change_the_result(triton_device, blocks):
    from kvbench.ops.column_sums_triton import KernelConfig, column_sums_triton

    states = random_states(2, 1, 150, 32, device=triton_device)
    _, attention, log_sum_exp = softmax_attention(*states, 0.2)
    got = column_sums_triton(*states[:2], log_sum_exp.float(), 0.2, KernelConfig(*blocks, 4, 2))
    assert error(got, attention.sum(1)) < 2e-6


def test_observe_with_triton_agrees_with_torch(triton_device):
    states = random_states(4, 2, 100, 36, device=triton_device)
    options = {"column_sums": True, "window_tokens": 8, "window_logsumexp": True}
    got, expected = (observe(*states, 0.2, kernels=k, **options) for k in ("triton", "torch"))
    assert (got.kernels, expected.kernels) == ("triton", "torch")
    for name in ("output", "column_sums", "window_attention", "window_logsumexp"):
        assert error(getattr(got, name), getattr(expected, name).double()) < 2e-6


def test_log_sum_exp_of_the_fused_forward(triton_device):
    states = random_states(6, 2, 45, 20, device=triton_device)
    assert error(forward_with_log_sum_exp(*states, 0.2)[1], softmax_attention(*states, 0.2)[2]) < 1e-6


def test_a_head_too_wide_is_refused(triton_device):
    from kvbench.ops.column_sums_triton import column_sums_triton

    query = torch.zeros(1, 4, 264, device=triton_device)
    with pytest.raises(ConfigError, match="head dimension 264 is above 256"):
        column_sums_triton(query, query, query[:, :, 0], 1.0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("column_sums", [False, True])
@pytest.mark.parametrize("window_tokens", [1, 40, 1000])
def test_the_window_s_log_sum_exp_is_that_of_its_logits(column_sums, softcap, window_tokens):
    states = random_states(4, 2, 97, 16)
    options = {"column_sums": column_sums, "window_tokens": window_tokens, "kernels": "torch", "softcap": softcap}
    got = observe(*states, 0.3, window_logsumexp=True, **options)
    expected = softmax_attention(*states, 0.3, softcap)[2][:, -window_tokens:]
    assert got.window_logsumexp.dtype == torch.float32
    assert error(got.window_logsumexp, expected) < 1e-6
    assert observe(*states, 0.3, **options).window_logsumexp is None
