import pytest

from kvbench.errors import ConfigError
from kvbench.models.config import ModelConfig, named_config
from kvbench.models.fetch import LOCATORS
from kvbench.paths import config_folder

NAMES = sorted(file.stem for file in (config_folder() / "model").glob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "local"])
def test_every_file_builds_a_config_named_after_it(name):
    config = named_config(name)
    assert config.name == name
    assert config.effective_source in {"random", *LOCATORS}
    assert named_config(name, path="/some/folder").effective_source == "local"


def test_papers_models_carry_the_official_limits():
    assert named_config("llama2-7b-chat").max_prompt_tokens == 3500
    assert named_config("llama2-7b-chat").chat_format == "llama2"
    assert named_config("mistral-7b-instruct").max_prompt_tokens == 31500


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sorce": "hub"}, "model.sorce"),
        ({"name": None}, "model.name"),
        ({"source": "cloud"}, "cloud"),
        ({"dtype": "int8"}, "int8"),
        ({"chat_format": "vicuna"}, "vicuna"),
        ({"device": "gpu"}, "'gpu' is unknown"),
        ({"device_map": "balanced"}, "balanced"),
        ({"max_prompt_tokens": 1}, "max_prompt_tokens=1"),
        ({"n_query_heads": 4, "n_kv_heads": 3}, "n_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"source": "hub"}, "model.source=hub needs model.hub_id=ORGANISATION/MODEL .or model.path=FOLDER"),
        ({"source": "local"}, "model.source=local needs model.path=FOLDER"),
    ],
)
def test_bad_values_are_named(values, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_mapping({"name": "m", "source": "random", **values})


def test_unknown_and_missing_names_are_told():
    with pytest.raises(ConfigError, match="smollm2-135m"):
        named_config("smollm")
    with pytest.raises(ConfigError, match=r"model\.name is missing"):
        ModelConfig.from_mapping({"source": "random"})
