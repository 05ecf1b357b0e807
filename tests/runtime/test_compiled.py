"""Compiled decoder layers: the same answers, one code for all layers and batches, and nothing left behind."""

import shutil
from functools import partial

import pytest
import torch

from kvbench.errors import ModelError
from kvbench.methods.registry import build_policy
from kvbench.runtime import decode, fused
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.patches import CompiledLayers, can_compile, decoder_layers
from kvbench.runtime.requests import Arm, Request

BUDGETS = [("full", 1.0), ("h2o", 0.5), ("h2o", 0.35), ("cam", 0.5), ("cam", 0.35), ("h2o", 0.7), ("cam", 0.7)]
ARMS = tuple(Arm.of(build_policy(name, {"budget": budget})) for name, budget in BUDGETS)


def jobs(n_rows: int) -> list[Request]:
    """Jobs of at most seven arms that make one batch of `n_rows` rows."""
    made = []
    for index, first in enumerate(range(0, n_rows, len(ARMS))):
        n_tokens = 40 + 9 * index
        ids = torch.randint(3, 250, (n_tokens,), generator=torch.Generator().manual_seed(index)).tolist()
        made.append(
            Request(
                index=index, input_ids=tuple(ids), compress_at=n_tokens, gold_ids=(), arms=ARMS[: n_rows - first],
                reference=ARMS[0], stop_ids=(), max_new_tokens=6,
            )
        )  # fmt: skip
    return made


def answers(loaded, n_rows: int, compiled: bool) -> list[list[int]]:
    tokens = []
    for result in FusedEngine(max_rows=32, compile=compiled).run(loaded, jobs(n_rows)):
        assert (result.settings["batch_rows"], result.settings["compiled"]) == (n_rows, compiled)
        tokens.append(result.token_ids)
    return tokens


def compile_here(monkeypatch, backend) -> None:
    """Let the engine compile on the CPU too, with the given backend."""
    monkeypatch.setattr(decode, "can_compile", lambda loaded: True)
    monkeypatch.setattr(decode, "CompiledLayers", partial(CompiledLayers, backend=backend))


def test_one_code_serves_all_layers_batches_and_engines_with_the_same_tokens(tiny_gqa, tiny_model, monkeypatch):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_here(monkeypatch, counting)
    answers(tiny_model("tiny-random", n_layers=2), 7, compiled=True)
    made = len(graphs)
    assert made == 1  # a decoder layer compiles whole
    products = [node for graph in graphs for node in graph.graph.nodes if node.target is torch.nn.functional.linear]
    assert len(products) == 5  # queries, keys and values; output; gate; up; down
    assert len(decoder_layers(tiny_gqa.model)) == 4
    for n_rows in (7, 14, 3):
        assert answers(tiny_gqa, n_rows, compiled=True) == answers(tiny_gqa, n_rows, compiled=False)
        assert len(graphs) == made


def test_the_compiler_s_own_numbers_choose_the_same_tokens(tiny_gqa, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no g++: torch.compile cannot make code for the CPU here")
    compile_here(monkeypatch, "inductor")
    assert answers(tiny_gqa, 7, compiled=True) == answers(tiny_gqa, 7, compiled=False)


def test_only_decode_steps_run_compiled_layers(tiny_gqa, monkeypatch):
    seen = {"prefill": set(), "decode": set()}

    def note(phase: str) -> None:
        seen[phase] |= {layer._compiled_call_impl is not None for layer in decoder_layers(tiny_gqa.model)}

    def prefill(*arguments, original=fused.prefill):
        note("prefill")
        return original(*arguments)

    def forward(self, *arguments, original=decode.DecodeLoop._forward):
        note("decode")
        return original(self, *arguments)

    compile_here(monkeypatch, "eager")
    monkeypatch.setattr(fused, "prefill", prefill)
    monkeypatch.setattr(decode.DecodeLoop, "_forward", forward)
    answers(tiny_gqa, 3, compiled=True)
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
        try:
            with layers.active():
                inside = state()
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
        assert state() == before
    assert all(mine != theirs for mine, theirs in zip(inside, before, strict=True))


def test_a_compiler_that_fails_is_named_with_the_remedy(tiny_mha, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    compile_here(monkeypatch, broken)
    with pytest.raises(ModelError, match=r"no compiler here.*engine\.compile=false"):
        answers(tiny_mha, 3, compiled=True)
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(tiny_mha.model))


def test_a_cpu_is_not_compiled_for_and_the_record_says_so(tiny_gqa):
    assert not can_compile(tiny_gqa)
    result, _ = FusedEngine(compile=True).run(tiny_gqa, jobs(2))
    assert result.settings["compiled"] is False
