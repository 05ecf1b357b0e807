"""What a decode step changes about a model: the same numbers, one code for all layers, and nothing left behind."""

import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from engine_cases import answers, arm, request
from torch import nn

from kvbench.errors import ModelError
from kvbench.runtime import decode, fused, patches
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.patches import CompiledLayers, PackedProjections, can_compile, decoder_layers, padded_head

# ---- projections as one product --------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention projections as transformers names them, and one layer more."""

    def __init__(self, bias=False):
        super().__init__()
        sizes = {"q_proj": 12, "k_proj": 4, "v_proj": 4}
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(8, size, bias=bias))
        self.o_proj = nn.Linear(12, 8, bias=bias)

    def forward(self, hidden):
        queries, keys, values = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        return hidden + self.o_proj(queries * torch.cat([keys, values, keys * values], -1))


def inside(model):
    """What can be seen of a model's modules: classes and attributes."""
    return [(type(module), sorted(vars(module))) for module in model.modules()]


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_same_numbers_by_one_product_a_group(bias, monkeypatch):
    model, hidden, seen = nn.Sequential(Block(bias), Block(bias)), torch.randn(7, 1, 8), []
    expected, looks = model(hidden), inside(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = PackedProjections(model)
    assert len(packed.packs) == 2
    monkeypatch.setattr(patches, "linear", lambda *a: seen.append(a[1].shape[0]) or nn.functional.linear(*a))
    for _ in range(2):
        with packed.active():
            torch.testing.assert_close(model(hidden), expected)
            assert model.state_dict().keys() == before.keys()
        torch.testing.assert_close(model(hidden), expected)
    assert seen == [20] * 4
    assert inside(model) == looks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_weights_are_moved_once_and_another_object_finds_them():
    model = Block()
    PackedProjections(model)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    again = PackedProjections(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    hidden = torch.randn(3, 1, 8)
    model.k_proj.weight.fill_(0.5)  # in place, so the pack sees it, too
    with again.active():
        torch.testing.assert_close(model.k_proj(hidden), hidden.sum(-1, keepdim=True).expand(3, 1, 4) * 0.5)


@torch.no_grad()
def test_order_of_calls_and_inputs_does_not_matter():
    model, (one, other) = Block(), torch.randn(2, 3, 1, 8)
    calls = [("v_proj", one), ("q_proj", other), ("k_proj", one), ("v_proj", other), ("q_proj", one)]
    expected = [getattr(model, name)(hidden) for name, hidden in calls]
    with PackedProjections(model).active():
        for (name, hidden), wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(getattr(model, name)(hidden), wanted)


def test_an_error_inside_leaves_the_model_as_it_was():
    model = Block()
    packed, looks = PackedProjections(model), inside(model)
    with pytest.raises(RuntimeError, match="shape"), packed.active():
        model(torch.randn(3, 1, 9))
    assert inside(model) == looks


class Other(nn.Linear):
    """Stands for a quantised or adapted layer."""


@pytest.mark.parametrize("spoil", ["class", "forward", "bias", "dtype", "shared"])
def test_layers_that_one_product_cannot_serve_are_left_alone(spoil):
    model = Block()
    if spoil == "forward":
        model.k_proj.forward = lambda hidden: hidden[..., :4]
    else:
        model.k_proj = {
            "class": Other(8, 4, bias=False), "bias": nn.Linear(8, 4), "dtype": model.k_proj.double(),
            "shared": model.v_proj,
        }[spoil]  # fmt: skip
    assert PackedProjections(model).packs == []


# ---- compiled layers -------------------------------------------------------------------------------------------------

ARMS = [arm(*what) for what in (("full", 1.0), ("h2o",), ("h2o", 0.35), ("cam",), ("cam", 0.35), ("h2o", 0.7))]


def tokens(loaded, n_rows: int, compiled: bool) -> list[list[int]]:
    """Answers of samples of at most six arms that make one batch of `n_rows` rows."""
    firsts = enumerate(range(0, n_rows, len(ARMS)))
    todo = [request(ARMS[: n_rows - first], i, 40 + 9 * i, new_tokens=6, stop_ids=()) for i, first in firsts]
    found = answers(FusedEngine(max_rows=32, compile=compiled), loaded, todo)
    assert {(a.settings["batch_rows"], a.settings["compiled"]) for a in found} == {(n_rows, compiled)}
    return [answer.token_ids for answer in found]


def compile_here(monkeypatch, backend) -> None:
    """Let the engine compile on the CPU, too."""
    monkeypatch.setattr(decode, "can_compile", lambda loaded: True)
    monkeypatch.setattr(decode, "CompiledLayers", partial(CompiledLayers, backend=backend))


def test_one_code_serves_all_layers_batches_and_engines_with_the_same_tokens(tiny_gqa, tiny_model, monkeypatch):
    graphs = []
    compile_here(monkeypatch, lambda graph, inputs: graphs.append(graph) or graph.forward)
    tokens(tiny_model("tiny-random", n_layers=2), 6, compiled=True)
    assert len(graphs) == 1  # a decoder layer compiles whole
    called = [node.target for node in graphs[0].graph.nodes]
    assert called.count(torch.nn.functional.linear) == 5  # queries, keys and values; output; gate; up; down
    assert called.count(torch.ops.kvbench.decode_step.default) == 1
    assert len(decoder_layers(tiny_gqa.model)) == 4
    for n_rows in (6, 12, 3):
        assert tokens(tiny_gqa, n_rows, compiled=True) == tokens(tiny_gqa, n_rows, compiled=False)
    assert len(graphs) == 1


def test_the_compiler_s_own_numbers_choose_the_same_tokens(tiny_gqa, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no g++: torch.compile cannot make code for the CPU here")
    compile_here(monkeypatch, "inductor")
    assert tokens(tiny_gqa, 6, compiled=True) == tokens(tiny_gqa, 6, compiled=False)


def test_only_decode_steps_run_compiled_layers(tiny_gqa, monkeypatch):
    seen = {"prefill": set(), "decode": set()}

    def noting(phase, original):
        def noted(*arguments):
            seen[phase] |= {layer._compiled_call_impl is not None for layer in decoder_layers(tiny_gqa.model)}
            return original(*arguments)

        return noted

    compile_here(monkeypatch, "eager")
    monkeypatch.setattr(fused, "prefill", noting("prefill", fused.prefill))
    monkeypatch.setattr(decode.DecodeLoop, "_forward", noting("decode", decode.DecodeLoop._forward))
    tokens(tiny_gqa, 3, compiled=True)
    assert seen == {"prefill": {False}, "decode": {True}}


@pytest.mark.parametrize("fails", [False, True])
def test_a_block_leaves_nothing_changed_however_it_ends(tiny_gqa, fails):
    def state():
        config = torch._dynamo.config
        modules = [(type(module), dict(vars(module))) for module in tiny_gqa.model.modules()]
        return modules, config.allow_unspec_int_on_nn_module, config.recompile_limit

    with attention_implementation(tiny_gqa.model):
        before = state()
        layers = CompiledLayers(tiny_gqa.model, "eager")
        assert state() == before
        with pytest.raises(ZeroDivisionError) if fails else nullcontext(), layers.active():
            inner = state()
            if fails:
                raise ZeroDivisionError
        assert state() == before
    assert all(mine != theirs for mine, theirs in zip(inner, before, strict=True))


def test_a_compiler_that_fails_is_named_with_the_remedy(tiny_mha, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    compile_here(monkeypatch, broken)
    with pytest.raises(ModelError, match=r"no compiler here.*engine\.compile=false"):
        tokens(tiny_mha, 3, compiled=True)
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(tiny_mha.model))


def test_a_cpu_is_not_compiled_for_and_the_record_says_so(tiny_gqa):
    assert not can_compile(tiny_gqa)
    (answer,) = FusedEngine(compile=True).run(tiny_gqa, [request(ARMS[:1])])
    assert answer.settings["compiled"] is False


# ---- the output matrix -----------------------------------------------------------------------------------------------


class Model:
    """As much of a model as the block asks for; it notes how many rows its output matrix sees."""

    def __init__(self):
        self.head, self.seen = nn.Linear(12, 40, bias=False), []
        self.head.register_forward_hook(lambda module, arguments, output: self.seen.append(len(arguments[0])))

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize(("n_rows", "seen"), [(1, 1), (2, 4), (3, 4), (4, 4), (5, 8), (7, 8), (8, 8)])
@pytest.mark.parametrize("shape", [(1, 12), (12,)])
def test_same_logits_from_a_multiple_of_four_rows(n_rows, seen, shape):
    model, hidden = Model(), torch.randn(n_rows, *shape)
    with padded_head(model):
        for _ in range(2):
            torch.testing.assert_close(model.head(hidden), hidden @ model.head.weight.T)
    assert model.seen == [seen, seen]


def test_the_output_matrix_is_left_as_it_was():
    model = Model()
    with pytest.raises(ZeroDivisionError), padded_head(model):
        raise ZeroDivisionError
    assert (len(model.head._forward_hooks), len(model.head._forward_pre_hooks)) == (1, 0)
    model.get_output_embeddings = lambda: None
    with padded_head(model):
        model.head(torch.randn(3, 12))
    assert model.seen == [3]
