"""Loading, and a model whose layers lie on several devices: it answers token for token like the same model on one."""

import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model

from kvbench.errors import ConfigError, ModelError
from kvbench.methods.registry import build_policy
from kvbench.models import load
from kvbench.models.config import named_config
from kvbench.models.load import load_model, resolve_device
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Answer, Arm, Request

ARMS = [("full", 1.0), ("h2o", 0.5), ("cam", 0.5), ("kvmerger_bias", 0.5)]
SEVEN_ARMS = [("full", 1.0), *((name, budget) for name in ("h2o", "cam", "kvmerger") for budget in (0.5, 0.35))]


def test_auto_dtype_depends_on_the_device():
    assert load.resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert load.resolve_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert load.resolve_dtype("float16", torch.device("cpu")) == torch.float16


def test_auto_device_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="cuda:2 asks for a CUDA device, this machine has 2"):
        resolve_device("cuda:2")
    with pytest.raises(ConfigError, match="'gpu'"):
        resolve_device("gpu")


def test_a_model_is_frozen_in_evaluation_mode_on_the_device_asked_for():
    loaded = load_model(named_config("tiny-random", device="cuda:77"), device="cpu")
    assert loaded.device.type == "cpu"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.source == "random weights, seed 0"


# Several devices.


def request(n_tokens: int, methods=ARMS, index: int = 0, new_tokens: int = 7, **options) -> Request:
    generator = torch.Generator().manual_seed(n_tokens)
    ids = tuple(torch.randint(3, 250, (n_tokens,), generator=generator).tolist())
    gold = tuple(torch.randint(3, 250, (4,), generator=generator).tolist())
    given = [(name, {"budget": b, **(options if name.startswith("kvmerger") else {})}) for name, b in methods]
    arms = tuple(Arm.of(build_policy(name, values)) for name, values in given)
    return Request(index, ids, n_tokens, gold, arms, arms[0], (2,), new_tokens, seed=index)


def answers(loaded, engine) -> list[Answer]:
    n_requests = 2 if isinstance(engine, FusedEngine) else 1
    layers = {"whole_first_layers": 1, "whole_last_layers": 0}
    results = list(engine.run(loaded, [request(40 + 9 * index, index=index, **layers) for index in range(n_requests)]))
    assert all(isinstance(result, Answer) for result in results)
    return sorted(results, key=lambda result: result.index)


def assert_same(found: list[Answer], expected: list[Answer], tolerance: float = 1e-5) -> None:
    """The same tokens and slots; likelihoods up to the last bits: the order of a sum hangs on how memory is aligned."""
    for arm, wanted in zip(found, expected, strict=True):
        assert arm.arm.key == wanted.arm.key
        assert arm.token_ids == wanted.token_ids, arm.arm.key
        assert arm.slots_per_layer == wanted.slots_per_layer
        assert arm.gold_nll == pytest.approx(wanted.gold_nll, abs=tolerance)
        assert arm.kl == pytest.approx(wanted.kl, abs=tolerance)


@pytest.mark.parametrize(("engine", "embedding"), [(FusedEngine(), "disk"), (PlainEngine(), "cpu")])
def test_layers_on_two_devices_answer_token_for_token(engine, embedding, tiny_gqa, tmp_path):
    expected = answers(tiny_gqa, engine)
    loaded = load_model(named_config("tiny-random", n_layers=4), device="cpu")
    places = {
        "model.embed_tokens": embedding, "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu",
        "model.layers.3": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
    }  # fmt: skip
    dispatch_model(loaded.model, places, main_device=torch.device("cpu"), offload_dir=tmp_path)
    loaded.device = load.input_device(loaded.model)
    assert next(loaded.model.model.layers[1].parameters()).is_meta  # between calls the layer is on the disk
    assert loaded.device == torch.device("cpu")
    assert_same(answers(loaded, engine), expected)


def test_auto_places_a_checkpoint_and_a_random_model_where_there_is_room(tiny_gqa, tmp_path):
    tiny_gqa.model.save_pretrained(tmp_path)
    tiny_gqa.tokenizer.save_pretrained(tmp_path)
    expected = answers(tiny_gqa, FusedEngine())
    stored = load_model(named_config("local", path=str(tmp_path), device_map="auto", chat_format="none"))
    assert_same(answers(stored, FusedEngine()), expected)
    spread = load_model(named_config("tiny-random", n_layers=4, device_map="auto"))
    assert_same(answers(spread, FusedEngine()), expected)


def test_layers_that_would_have_to_leave_the_gpus_are_refused():
    with pytest.raises(ModelError, match=r"2 of 4 parts of big \(b, \.\.\.\) do not fit"):
        load.check_device_map("big", {"a": 0, "b": "cpu", "c": "disk", "d": 1})
    load.check_device_map("on two GPUs", {"a": 0, "b": 1})
    load.check_device_map("on the CPU alone", {"": "cpu"})


def test_the_placement_is_told_where_there_is_one(tiny_gqa):
    assert load.describe_placement(tiny_gqa.model) == ""
    spread = SimpleNamespace(hf_device_map={"a": 0, "b": 1, "c": 1})
    assert load.describe_placement(spread) == "cuda:0 1, cuda:1 2"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
class TestTwoGpus:
    def test_a_model_answers_like_on_one(self):
        config = {
            "n_layers": 8, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "n_query_heads": 8,
            "n_kv_heads": 4, "dtype": "float32",
        }  # fmt: skip
        what = request(700, SEVEN_ARMS, new_tokens=24)
        one = load_model(named_config("tiny-random", device="cuda:0", **config))
        expected = list(FusedEngine(cuda_graphs=False, compile=False).run(one, [what]))
        spread = load_model(named_config("tiny-random", device_map="auto", **config))
        devices = [next(layer.parameters()).device.index for layer in spread.model.model.layers]
        assert devices == sorted(devices)
        assert set(devices) == {0, 1}
        found = list(FusedEngine().run(spread, [what]))
        assert found[0].settings["kernels"] == ["triton"]
        assert_same(found, expected, tolerance=1e-4)

    def test_seven_arms_of_a_7b_model(self, capsys):
        """Measures; asserts that the caches lie where the layers are."""
        what = request(3500, SEVEN_ARMS, new_tokens=64)
        for name, placement in (("one GPU", {"device": "cuda:0"}), ("two GPUs", {"device_map": "auto"})):
            loaded = load_model(named_config("random-llama2-7b", **placement))
            torch.cuda.reset_peak_memory_stats(1)
            for _ in range(2):  # the first captures graphs
                start = time.perf_counter()
                found = list(FusedEngine().run(loaded, [what]))
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            peak = [torch.cuda.max_memory_allocated(index) / 2**30 for index in (0, 1)]
            with capsys.disabled():
                print(f"\n{name}: {seconds:.2f} s a sample, GiB {peak[0]:.1f} + {peak[1]:.1f}, {found[0].settings}")
            del loaded
            torch.cuda.empty_cache()
        assert peak[1] > 5
