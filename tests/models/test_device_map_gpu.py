"""Two GPUs: the layers of one model on both answer like the same model on one, up to the roundings of float32."""

import time

import pytest
import torch

from kvbench.methods.registry import build_policy
from kvbench.models.config import named_config
from kvbench.models.load import LoadedModel, load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.requests import Answer, Arm, Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
METHODS = [
    ("full", 1.0),
    ("h2o", 0.5),
    ("h2o", 0.35),
    ("cam", 0.5),
    ("cam", 0.35),
    ("kvmerger", 0.5),
    ("kvmerger", 0.35),
]


def job(n_tokens: int, new_tokens: int) -> Request:
    generator = torch.Generator().manual_seed(n_tokens)
    ids = tuple(torch.randint(3, 250, (n_tokens,), generator=generator).tolist())
    gold = tuple(torch.randint(3, 250, (8,), generator=generator).tolist())
    arms = tuple(Arm.of(build_policy(name, {"budget": budget})) for name, budget in METHODS)
    return Request(0, ids, n_tokens, gold, arms, arms[0], (), new_tokens)


def run(loaded: LoadedModel, engine: FusedEngine, what: Request) -> tuple[list[Answer], float]:
    list(engine.run(loaded, [what]))
    torch.cuda.synchronize()
    start = time.perf_counter()
    answers = list(engine.run(loaded, [what]))
    torch.cuda.synchronize()
    return answers, time.perf_counter() - start


def test_a_model_on_two_gpus_answers_like_on_one():
    shape = {"n_layers": 8, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "n_query_heads": 8}
    config = {**shape, "n_kv_heads": 4, "dtype": "float32"}
    engine = FusedEngine(cuda_graphs=False, compile=False)
    what = job(700, 24)
    expected, _ = run(load_model(named_config("tiny-random", device="cuda:0", **config)), engine, what)
    spread = load_model(named_config("tiny-random", device_map="auto", **config))
    devices = [next(layer.parameters()).device.index for layer in spread.model.model.layers]
    assert devices == sorted(devices)
    assert set(devices) == {0, 1}
    got, _ = run(spread, FusedEngine(), what)
    assert got[0].settings["kernels"] == ["triton"]
    for arm, other in zip(got, expected, strict=True):
        assert arm.token_ids == other.token_ids, arm.arm.key
        assert arm.slots_per_layer == other.slots_per_layer
        assert arm.gold_nll == pytest.approx(other.gold_nll, abs=1e-4)
        assert arm.kl == pytest.approx(other.kl, abs=1e-4)


def test_seven_arms_of_a_7b_model_on_two_gpus(capsys):
    """Measures; asserts that the caches lie where the layers are."""
    what = job(3500, 64)
    seconds = {}
    for name, placement in (("one GPU", {"device": "cuda:0"}), ("two GPUs", {"device_map": "auto"})):
        loaded = load_model(named_config("random-llama2-7b", **placement))
        torch.cuda.reset_peak_memory_stats(1)
        answers, seconds[name] = run(loaded, FusedEngine(), what)
        peak = [torch.cuda.max_memory_allocated(index) / 2**30 for index in (0, 1)]
        with capsys.disabled():
            print(f"\n{name}: {seconds[name]:.2f} s a sample, GiB {peak[0]:.1f} + {peak[1]:.1f}, {answers[0].settings}")
        del loaded
        torch.cuda.empty_cache()
    assert peak[1] > 5
