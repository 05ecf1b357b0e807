"""`observe` against softmax written out over T x T in fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvbench.errors import ConfigError, ModelError
from kvbench.methods.base import LayerStates
from kvbench.ops import observe as observe_module
from kvbench.ops.observe import observe
from kvbench.runtime.observe import Observer

SHAPES = [(4, 4, 70, 16), (6, 2, 129, 16), (4, 1, 64, 8), (3, 3, 1, 8), (9, 3, 200, 64)]
SHAPE_IDS = ["H{}-{}-T{}-D{}".format(*shape) for shape in SHAPES]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make short prompts span several blocks, the last one incomplete."""
    monkeypatch.setattr(observe_module, "MIN_BLOCK_QUERIES", 32)
    monkeypatch.setattr(observe_module, "MAX_BLOCK_QUERIES", 32)


def random_states(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Query, keys and values laid out as a model's projections are: token before head."""
    n_query_heads, n_kv_heads, n_tokens, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return tuple(
        (torch.randn(n_tokens, n_heads, head_dim, generator=generator) * 1.5).to(dtype).transpose(0, 1)
        for n_heads in (n_query_heads, n_kv_heads, n_kv_heads)
    )


def softmax_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Output and probabilities `(H, T, T)`, fp64."""
    group_size = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group_size, 0) for x in (keys, values))
    logits = query.double() @ keys.transpose(1, 2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    attention = logits.masked_fill(future, -math.inf).softmax(-1)
    return attention @ values, attention


def relative_rms_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("window_tokens", [0, 1, 40, 1000])
def test_agrees_with_softmax_in_fp32(shape: tuple[int, int, int, int], window_tokens: int) -> None:
    query, keys, values = random_states(shape)
    output, attention = softmax_attention(query, keys, values, 0.3)
    got = observe(query, keys, values, 0.3, column_sums=True, window_tokens=window_tokens, backend="torch")
    assert got.backend == "torch"
    assert got.column_sums is not None
    assert got.output.shape == query.shape
    assert relative_rms_error(got.output, output) < 2e-6
    assert relative_rms_error(got.column_sums, attention.sum(1)) < 1e-6
    if window_tokens == 0:
        assert got.window_attention is None
    else:
        assert got.window_attention is not None
        expected = attention[:, -window_tokens:]
        assert got.window_attention.shape == expected.shape
        assert relative_rms_error(got.window_attention, expected) < 2e-6


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_every_query_gives_one_unit_of_mass(shape: tuple[int, int, int, int]) -> None:
    query, keys, values = random_states(shape)
    sums = observe(query, keys, values, 0.3, column_sums=True, window_tokens=0).column_sums
    assert sums is not None
    torch.testing.assert_close(sums.double().sum(1), torch.full((shape[0],), shape[2]).double(), rtol=1e-6, atol=0)


def test_blocks_of_the_usual_size_agree_too() -> None:
    query, keys, values = random_states((2, 1, 2 * observe_module.MAX_BLOCK_QUERIES + 11, 8))
    output, attention = softmax_attention(query, keys, values, 0.3)
    got = observe(query, keys, values, 0.3, column_sums=True, window_tokens=20)
    assert got.column_sums is not None
    assert got.window_attention is not None
    assert relative_rms_error(got.output, output) < 2e-6
    assert relative_rms_error(got.column_sums, attention.sum(1)) < 1e-6
    assert relative_rms_error(got.window_attention, attention[:, -20:]) < 2e-6


@pytest.mark.usefixtures("small_blocks")
def test_sums_and_rows_of_a_bf16_model_are_accumulated_in_fp32() -> None:
    query, keys, values = random_states((6, 2, 129, 16), torch.bfloat16)
    output, attention = softmax_attention(query, keys, values, 0.25)
    got = observe(query, keys, values, 0.25, column_sums=True, window_tokens=16)
    assert got.output.dtype == torch.bfloat16
    assert got.column_sums is not None
    assert got.window_attention is not None
    # The inputs are exact in fp32, so only the output, rounded once, may carry bf16's half a unit in the last place.
    assert relative_rms_error(got.output, output) < torch.finfo(torch.bfloat16).eps / 2
    assert relative_rms_error(got.column_sums, attention.sum(1)) < 1e-6
    assert relative_rms_error(got.window_attention, attention[:, -16:]) < 2e-6


@pytest.mark.parametrize("window_tokens", [0, 5, 500])
def test_without_column_sums_it_is_plain_sdpa(window_tokens: int) -> None:
    query, keys, values = random_states((6, 2, 129, 16))
    output, attention = softmax_attention(query, keys, values, 0.3)
    got = observe(query, keys, values, 0.3, column_sums=False, window_tokens=window_tokens)
    assert (got.backend, got.column_sums) == ("sdpa", None)
    assert relative_rms_error(got.output, output) < 2e-6
    if window_tokens:
        assert got.window_attention is not None
        assert relative_rms_error(got.window_attention, attention[:, -window_tokens:]) < 2e-6


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.untyped_storage().nbytes() // item.element_size())
        return result


def test_memory_grows_linearly() -> None:
    largest = {}
    for n_tokens in (1024, 2048):
        query, keys, values = random_states((2, 1, n_tokens, 16))
        with LargestTensor() as mode:
            observe(query, keys, values, 0.25, column_sums=True, window_tokens=8)
        largest[n_tokens] = mode.elements
        assert mode.elements < n_tokens * n_tokens
    assert largest[2048] == 2 * largest[1024]


def test_the_observer_reports_each_layer_with_views() -> None:
    states: list[LayerStates] = []
    observer = Observer(frozenset({"column_sums", "window_attention"}), 4, 2, 6, 7, states.append)
    query, keys, values = (x[None] for x in random_states((6, 2, 33, 16)))
    for layer_index in (0, 1):
        output = observer.attend(layer_index, query, keys, values, 0.25)
        assert output.shape == (1, 33, 6, 16)
        assert output.is_contiguous()
        expected, attention = softmax_attention(query[0], keys[0], values[0], 0.25)
        assert relative_rms_error(output[0].transpose(0, 1), expected) < 2e-6
    assert [layer.layer_index for layer in states] == [0, 1]
    assert observer.backends == {"torch"}
    layer = states[1]
    assert (layer.n_layers, layer.n_query_heads, layer.seed) == (2, 6, 7)
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == (keys.data_ptr(), values.data_ptr())
    assert layer.keys.shape == (2, 33, 16)
    assert layer.column_sums is not None
    assert layer.window_attention is not None
    assert relative_rms_error(layer.column_sums, attention.sum(1)) < 1e-6
    assert layer.window_attention.shape == (6, 4, 33)


def test_the_observer_computes_only_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_module, "observe_torch", lambda *args: pytest.fail("column sums were not asked for"))
    states: list[LayerStates] = []
    observer = Observer(frozenset(), 32, 1, 6, 0, states.append)
    observer.attend(0, *(x[None] for x in random_states((6, 2, 33, 16))), 0.25)
    assert (states[0].column_sums, states[0].window_attention, observer.backends) == (None, None, {"sdpa"})


def test_what_cannot_be_observed_is_refused() -> None:
    observer = Observer(frozenset({"column_sums"}), 0, 1, 6, 0, lambda states: None)
    query, keys, values = (x[None] for x in random_states((6, 2, 33, 16)))
    with pytest.raises(ModelError, match="prefill of 2 prompts"):
        observer.attend(0, *(x.expand(2, -1, -1, -1) for x in (query, keys, values)), 0.25)
    with pytest.raises(ModelError, match="32 queries over 33 keys"):
        observer.attend(0, query[:, :, 1:], keys, values, 0.25)
    with pytest.raises(ConfigError, match=r"needs=\['hidden_states'\] cannot be observed"):
        Observer(frozenset({"hidden_states"}), 0, 1, 6, 0, lambda states: None)
    with pytest.raises(ConfigError, match="window_tokens=0 is below 1"):
        Observer(frozenset({"window_attention"}), 0, 1, 6, 0, lambda states: None)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("column_sums", [True, False])
def test_soft_capped_logits(column_sums: bool) -> None:
    query, keys, values = random_states(SHAPES[1])
    output, attention = softmax_attention(query, keys, values, 0.3, softcap=2.0)
    options: dict[str, Any] = {"column_sums": column_sums, "window_tokens": 20}
    got = observe(query, keys, values, 0.3, softcap=2.0, **options)
    assert relative_rms_error(got.output, output) < 1e-6
    assert got.window_attention is not None
    assert relative_rms_error(got.window_attention, attention[:, -20:]) < 1e-6
    if column_sums:
        assert got.column_sums is not None
        assert relative_rms_error(got.column_sums, attention.sum(1)) < 1e-6
    else:
        assert got.column_sums is None
    assert relative_rms_error(observe(query, keys, values, 0.3, **options).output, output) > 0.1
    with pytest.raises(ConfigError, match=r"capped at 2\.0: use kernels=auto or torch"):
        observe(query, keys, values, 0.3, softcap=2.0, backend="triton", **options)
