"""Loading, and a model whose layers lie on several devices: it answers token for token like the same on one."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model

from kvbench.errors import ConfigError, ModelError
from kvbench.methods.registry import build_policy
from kvbench.models.config import named_config
from kvbench.models.load import (
    LoadedModel,
    check_device_map,
    describe_placement,
    input_device,
    load_model,
    resolve_device,
    resolve_dtype,
)
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Answer, Arm, Request

METHODS = [("full", 1.0), ("h2o", 0.5), ("cam", 0.5), ("kvmerger_bias", 0.5)]


def test_auto_dtype_depends_on_the_device():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


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


def test_unknown_device_is_named():
    with pytest.raises(ConfigError, match="'gpu'"):
        resolve_device("gpu")


def test_the_argument_overrides_the_configured_device():
    assert load_model(named_config("tiny-random", device="cuda:77"), device="cpu").device.type == "cpu"


def test_loaded_models_are_frozen_in_evaluation_mode(tiny_gqa):
    assert not tiny_gqa.model.training
    assert not any(parameter.requires_grad for parameter in tiny_gqa.model.parameters())
    assert tiny_gqa.source == "random weights, seed 0"


def jobs(n_jobs: int) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    options = {"whole_first_layers": 1, "whole_last_layers": 0}
    arms = tuple(
        Arm.of(build_policy(name, {"budget": budget, **(options if name.startswith("kvmerger") else {})}))
        for name, budget in METHODS
    )
    made = []
    for index in range(n_jobs):
        ids = tuple(torch.randint(3, 250, (40 + 9 * index,), generator=generator).tolist())
        gold = tuple(torch.randint(3, 250, (4,), generator=generator).tolist())
        made.append(Request(index, ids, len(ids), gold, arms, arms[0], (2,), 7, seed=index))
    return made


def answers(loaded: LoadedModel, engine: FusedEngine | PlainEngine) -> list[tuple]:
    results = sorted(
        engine.run(loaded, jobs(2 if isinstance(engine, FusedEngine) else 1)), key=lambda result: result.index
    )
    assert all(isinstance(result, Answer) for result in results)
    return results


def assert_same(found: list, expected: list) -> None:
    """The same tokens and slots; likelihoods up to the last bits: the order of a sum hangs on how memory is aligned."""
    assert [(a.arm.key, a.token_ids, a.slots_per_layer) for a in found] == [
        (a.arm.key, a.token_ids, a.slots_per_layer) for a in expected
    ]
    for arm, wanted in zip(found, expected, strict=True):
        assert arm.gold_nll == pytest.approx(wanted.gold_nll, abs=1e-5)
        assert arm.kl == pytest.approx(wanted.kl, abs=1e-5)


@pytest.mark.parametrize(("engine", "embedding"), [(FusedEngine(), "disk"), (PlainEngine(), "cpu")])
def test_layers_on_two_devices_answer_token_for_token(engine, embedding, tiny_gqa, tmp_path):
    expected = answers(tiny_gqa, engine)
    loaded = load_model(named_config("tiny-random"), device="cpu")
    places = {
        "model.embed_tokens": embedding, "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu",
        "model.layers.3": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
    }  # fmt: skip
    dispatch_model(loaded.model, places, main_device=torch.device("cpu"), offload_dir=tmp_path)
    loaded.device = input_device(loaded.model)
    devices = {parameter.device.type for parameter in loaded.model.model.layers[1].parameters()}
    assert devices == {"meta"}  # between calls the layer is on the disk
    assert loaded.device == torch.device("cpu")
    assert_same(answers(loaded, engine), expected)


def test_auto_places_a_checkpoint_and_a_random_model_where_there_is_room(tiny_gqa, tmp_path):
    tiny_gqa.model.save_pretrained(tmp_path)
    tiny_gqa.tokenizer.save_pretrained(tmp_path)
    expected = answers(tiny_gqa, FusedEngine())
    stored = load_model(named_config("local", path=str(tmp_path), device_map="auto", chat_format="none"))
    assert_same(answers(stored, FusedEngine()), expected)
    assert_same(answers(load_model(named_config("tiny-random", device_map="auto")), FusedEngine()), expected)


def test_layers_that_would_have_to_leave_the_gpus_are_refused():
    with pytest.raises(ModelError, match=r"2 of 4 parts of big \(b, \.\.\.\) do not fit"):
        check_device_map("big", {"a": 0, "b": "cpu", "c": "disk", "d": 1})
    check_device_map("on two GPUs", {"a": 0, "b": 1})
    check_device_map("on the CPU alone", {"": "cpu"})


def test_the_placement_is_told_where_there_is_one(tiny_gqa):
    assert describe_placement(tiny_gqa.model) == ""

    spread = SimpleNamespace(hf_device_map={"a": 0, "b": 1, "c": 1})
    assert describe_placement(spread) == "cuda:0 1, cuda:1 2"
