"""configs/method: every option of every method is listed, with the default of its class."""

import dataclasses
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from kvbench.methods.registry import load_policies

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "method"
OWN_METHODS = (
    "cam",
    "full",
    "h2o",
    "kvmerger",
    "kvmerger_bias",
    "kvmerger_plus",
    "snapkv",
    "streaming_llm",
    "knorm",
    "pyramidkv",
    "adakv",
    "tova",
    "keepkv",
    "weightedkv",
    "d2o",
    "expected_attention",
)


@pytest.mark.parametrize("name", OWN_METHODS)
def test_config_lists_every_option_with_its_default(name):
    config = OmegaConf.load(FOLDER / f"{name}.yaml")
    policy = instantiate(config)
    assert type(policy) is load_policies()[name]
    assert policy.options() == {}
    assert policy.budget == (1.0 if name == "full" else 0.5)
    assert set(config) == {"_target_"} | {field.name for field in dataclasses.fields(policy)}


@pytest.mark.parametrize("name", OWN_METHODS)
def test_config_begins_with_a_comment_and_a_command(name):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert any(line.startswith(f"#   python -m kvbench method={name}") for line in lines)
    assert max(map(len, lines)) <= 120
