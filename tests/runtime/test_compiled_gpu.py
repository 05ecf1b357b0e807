"""Compiled decoder layers under CUDA graphs against the plain engine, on a GPU."""

import pytest
import torch

from kvbench.methods.registry import build_policy
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Arm, Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BUDGETS = [("full", 1.0), ("h2o", 0.5), ("cam", 0.5), ("h2o", 0.35), ("cam", 0.35)]
ARMS = tuple(Arm.of(build_policy(name, {"budget": budget})) for name, budget in BUDGETS)


def job(index: int, n_arms: int) -> Request:
    n_tokens = 60 + 23 * index
    ids = torch.randint(3, 250, (n_tokens,), generator=torch.Generator().manual_seed(index)).tolist()
    return Request(
        index=index, input_ids=tuple(ids), compress_at=n_tokens, gold_ids=tuple(ids[:5]), arms=ARMS[:n_arms],
        reference=ARMS[0], stop_ids=(2,), max_new_tokens=16, seed=index,
    )  # fmt: skip


def test_compiled_and_captured_steps_give_the_plain_engine_s_tokens():
    loaded = load_model(named_config("tiny-random", dtype="float32", device="cuda"))
    for todo in ([job(0, 5)], [job(1, 5), job(2, 5)], [job(3, 3)]):  # 10, 20 and 6 rows
        for expected, got in zip(PlainEngine().run(loaded, todo), FusedEngine().run(loaded, todo), strict=True):
            assert got.settings["compiled"]
            assert got.settings["cuda_graphs"]
            assert (got.index, got.arm.key) == (expected.index, expected.arm.key)
            assert got.token_ids == expected.token_ids, got.arm.key
            assert got.gold_nll == pytest.approx(expected.gold_nll, abs=1e-3)
            assert got.kl == pytest.approx(expected.kl, abs=1e-3)
