"""The fused engine with Triton kernels, captured and compiled steps against the plain engine, on a GPU."""

import pytest
import torch
from engine_cases import answers, arm, assert_same, request

from kvbench.methods.registry import load_policies
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TWO_WHOLE = {"whole_first_layers": 1, "whole_last_layers": 0}


@pytest.mark.parametrize("shape", ["tiny-random", "tiny-random-mha"])
@pytest.mark.parametrize("question", [0, 5])
def test_triton_and_graphs_give_the_plain_engine_s_tokens(shape, question):
    arms = [
        arm("full", 1.0),
        *(arm(name) for name in load_policies() if name != "full"),
        arm("h2o", 0.35, group_reduce="max"),
        arm("cam", 0.35),
        arm("kvmerger", **TWO_WHOLE),
        arm("kvmerger", **TWO_WHOLE, budget_mode="threshold", threshold=0.2),
        arm("kvmerger_bias", 0.35),
    ]
    loaded = load_model(named_config(shape, n_layers=8, dtype="float32", device="cuda"))
    todo = [request(arms, i, 75 + 23 * i, question=question, gold=6, new_tokens=12 + i) for i in range(3)]
    found = answers(FusedEngine(max_rows=4 * len(arms)), loaded, todo)
    assert all(answer.settings["kernels"] == ["triton"] and answer.settings["cuda_graphs"] for answer in found)
    assert_same(found, answers(PlainEngine(), loaded, todo), 1e-3)


def test_compiled_and_captured_steps_give_the_plain_engine_s_tokens():
    arms = [arm("full", 1.0), arm("h2o"), arm("cam"), arm("h2o", 0.35), arm("cam", 0.35)]
    loaded = load_model(named_config("tiny-random", dtype="float32", device="cuda"))
    for sizes in ([(60, 5)], [(83, 5), (106, 5)], [(129, 3)]):  # 10, 20 and 6 rows
        todo = [request(arms[:n], i, n_tokens, gold=5, new_tokens=16) for i, (n_tokens, n) in enumerate(sizes)]
        found = answers(FusedEngine(compile=True), loaded, todo)
        assert all(answer.settings["compiled"] and answer.settings["cuda_graphs"] for answer in found)
        assert_same(found, answers(PlainEngine(), loaded, todo), 1e-3)
