"""`plain` judges Triton kernels, so it runs none: a wrong kernel changes `fused` and leaves `plain` as it was."""

import importlib
from collections import defaultdict

import pytest
import torch

from kvbench.methods import h2o, kvmerger
from kvbench.methods.cam import CaM
from kvbench.methods.h2o import H2O
from kvbench.methods.kvmerger import KVMerger
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.ops import observe as observation
from kvbench.runtime import cache as ragged
from kvbench.runtime import observe
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Arm, Request


def no_launch(right):
    return defaultdict(lambda: lambda *arguments, **options: None)  # by launch grid


MERGER = KVMerger(budget=0.5, whole_first_layers=1, whole_last_layers=0)
WRONG_KERNELS = [  # an arm, a kernel that it runs on a GPU, and a wrong version made of the right one
    (H2O(budget=0.5), "ops.compress_triton", "heavy_and_recent", lambda right: lambda s, *n: right(-s, *n)),
    (H2O(budget=0.5), "ops.compress_triton", "keep_slots", lambda right: lambda k, v, *s: right(k, -v, *s)),
    (H2O(budget=0.5), "ops.steps_triton", "_h2o_kernel", no_launch),
    (H2O(budget=0.5), "ops.column_sums_triton", "column_sums_triton", lambda right: lambda *x: -right(*x)),
    (CaM(budget=0.5), "ops.steps_triton", "_cam_kernel", no_launch),
    (MERGER, "ops.compress_triton", "exact_chain_starts", lambda right: lambda k, *n: right(k.flip(1), *n)),
    (MERGER, "ops.compress_triton", "merge_segments", lambda right: lambda k, v, *s, **o: right(k, -v, *s, **o)),
    (MERGER, "ops.ragged_decode_triton", "ragged_decode", lambda right: lambda q, *args: right(-q, *args)),
]


@pytest.fixture
def as_on_a_gpu(monkeypatch, triton_device):
    """Let "auto" be Triton in every module that ever asked."""
    choice = {"auto": "triton", "torch": "torch"}
    for module in (observation, observe, ragged, h2o, kvmerger):
        monkeypatch.setattr(module, "choose_kernels", lambda kernels, device: choice[kernels], raising=False)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("policy", "module", "kernel", "worsen"), WRONG_KERNELS, ids=[f"{case[0].name}-{case[2]}" for case in WRONG_KERNELS]
)
def test_a_wrong_kernel_changes_the_fused_engine_alone(monkeypatch, triton_device, policy, module, kernel, worsen):
    loaded = load_model(named_config("tiny-random", dtype="float32", device=triton_device.type))
    fused = FusedEngine(cuda_graphs=False, compile=False)
    arm = Arm.of(policy)
    ids = torch.randint(3, 250, (28,), generator=torch.Generator().manual_seed(0)).tolist()
    job = Request(0, tuple(ids[:24]), 24, tuple(ids[24:]), (arm,), arm, (), max_new_tokens=2)

    def run(engine, kernels):
        (result,) = engine.run(loaded, [job])
        assert result.settings["kernels"] == kernels
        return result

    right = run(PlainEngine(), "torch")
    assert run(fused, ["triton"]).gold_nll == pytest.approx(right.gold_nll, abs=1e-3)
    module = importlib.import_module(f"kvbench.{module}")
    monkeypatch.setattr(module, kernel, worsen(getattr(module, kernel)))
    assert run(PlainEngine(), "torch").gold_nll == right.gold_nll
    assert run(fused, ["triton"]).gold_nll != pytest.approx(right.gold_nll, abs=1e-3)
