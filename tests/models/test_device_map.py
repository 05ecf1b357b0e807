"""A model whose layers lie on several devices answers token for token like the same model on one."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model

from kvbench.errors import ModelError
from kvbench.methods.registry import build_policy
from kvbench.models.config import named_config
from kvbench.models.device_map import check_device_map, describe_placement, input_device
from kvbench.models.load import LoadedModel, load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Arm, Request

METHODS = [("full", 1.0), ("h2o", 0.5), ("cam", 0.5), ("kvmerger_bias", 0.5)]


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
