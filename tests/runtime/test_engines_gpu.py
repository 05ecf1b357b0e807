"""The fused engine with Triton kernels and captured steps against the plain engine, on a GPU."""

import pytest
import torch

from kvbench.methods.registry import build_policy, load_policies
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Arm, Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ARMS = tuple(
    Arm.of(build_policy(name, {"budget": budget, **options}))
    for name, budget, options in [
        ("full", 1.0, {}),
        *((name, 0.5, {}) for name in load_policies() if name != "full"),
        ("h2o", 0.35, {"group_reduce": "max"}),
        ("cam", 0.35, {}),
        ("kvmerger", 0.5, {"whole_first_layers": 1, "whole_last_layers": 0}),
        (
            "kvmerger",
            0.5,
            {"whole_first_layers": 1, "whole_last_layers": 0, "budget_mode": "threshold", "threshold": 0.2},
        ),
        ("kvmerger_bias", 0.35, {}),
    ]
)


def jobs(count: int, question: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        n_tokens = 75 + 23 * index
        ids = tuple(torch.randint(3, 250, (n_tokens,), generator=generator).tolist())
        gold = tuple(torch.randint(3, 250, (6,), generator=generator).tolist())
        made.append(
            Request(
                index=index, input_ids=ids, compress_at=n_tokens - question, gold_ids=gold, arms=ARMS,
                reference=ARMS[0], stop_ids=(2,), max_new_tokens=12 + index, seed=index,
            )
        )  # fmt: skip
    return made


@pytest.mark.parametrize("shape", ["tiny-random", "tiny-random-mha"])
@pytest.mark.parametrize("question", [0, 5])
def test_triton_and_graphs_give_the_plain_engine_s_tokens(shape, question):
    loaded = load_model(named_config(shape, n_layers=8, dtype="float32", device="cuda"))
    todo = jobs(3, question)
    plain, fused = PlainEngine().run(loaded, todo), FusedEngine(max_rows=4 * len(ARMS)).run(loaded, todo)
    for expected, got in zip(plain, fused, strict=True):
        assert got.settings["kernels"] == ["triton"]
        assert got.settings["cuda_graphs"]
        assert got.slots_per_layer == expected.slots_per_layer
        assert got.token_ids == expected.token_ids, got.arm.key
        assert got.gold_nll == pytest.approx(expected.gold_nll, abs=1e-3)
        assert got.kl == pytest.approx(expected.kl, abs=1e-3)
