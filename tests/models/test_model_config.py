import pytest
from omegaconf import OmegaConf

from kvbench.errors import ConfigError
from kvbench.models.config import ModelConfig, model_config_folder, named_config

NAMES = sorted(file.stem for file in model_config_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "local"])
def test_every_file_builds_a_config_named_after_it(name):
    assert named_config(name).name == name


def test_every_file_fits_the_structured_schema():
    for name in NAMES:
        merged = OmegaConf.merge(
            OmegaConf.structured(ModelConfig), OmegaConf.load(model_config_folder() / f"{name}.yaml")
        )
        assert merged.name == name


def test_path_replaces_the_source():
    assert named_config("llama2-7b-chat").effective_source == "hub"
    assert named_config("llama2-7b-chat", path="/some/folder").effective_source == "local"


def test_papers_models_carry_the_official_limits():
    assert named_config("llama2-7b-chat").max_prompt_tokens == 3500
    assert named_config("llama2-7b-chat").chat_format == "llama2"
    assert named_config("mistral-7b-instruct").max_prompt_tokens == 31500


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "m", "sorce": "hub"}, "model.sorce"),
        ({"source": "random"}, "model.name"),
        ({"name": "m", "source": "cloud"}, "cloud"),
        ({"name": "m", "source": "random", "dtype": "int8"}, "int8"),
        ({"name": "m", "source": "random", "chat_format": "vicuna"}, "vicuna"),
        ({"name": "m", "source": "random", "device_map": "balanced"}, "balanced"),
        ({"name": "m", "source": "random", "max_prompt_tokens": 1}, "max_prompt_tokens=1"),
        ({"name": "m", "source": "random", "n_query_heads": 4, "n_kv_heads": 3}, "n_kv_heads=3"),
        ({"name": "m", "source": "hub"}, "hub_id"),
        ({"name": "m", "source": "local"}, "model.path=FOLDER"),
    ],
)
def test_bad_values_are_named(values, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_mapping(values)


def test_unknown_name_lists_the_names():
    with pytest.raises(ConfigError, match="smollm2-135m"):
        named_config("smollm")
