"""Methods are found by a scan and by entry point, configured by their classes; mistakes in names are answered."""

import dataclasses
from importlib.metadata import EntryPoint

import pytest
from hydra.utils import instantiate

from kvbench.catalogue import methods
from kvbench.errors import ConfigError
from kvbench.methods import registry
from kvbench.methods.adakv import AdaKV
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O
from kvbench.methods.registry import all_arms, build_policy, load_policies, method_config


def test_methods_are_found_under_their_names():
    policies = load_policies()
    assert {"full", "h2o", "kvmerger", "kvmerger_bias"} <= set(policies)
    assert all(policy.name == name for name, policy in policies.items())


@pytest.mark.parametrize("name", load_policies())
def test_a_method_is_configured_with_the_defaults_of_its_class(name):
    policy = load_policies()[name]
    config = method_config(policy)
    assert instantiate(config) == policy()
    assert policy().options() == {}
    assert config["budget"] == (1.0 if name == "full" else 0.5)
    assert set(config) == {"_target_"} | {field.name for field in dataclasses.fields(policy)}
    for option in dataclasses.fields(policy):  # every option is explained where it is declared, or by a parent class
        assert any(f"{option.name}: " in (parent.__doc__ or "") for parent in policy.__mro__), option.name


def test_the_class_of_a_method_within_a_method_can_be_exchanged():
    assert method_config(AdaKV)["base"] == {"_target_": "kvbench.methods.snapkv.SnapKV"}


def test_all_arms_are_every_method_at_three_budgets_full_once_and_first():
    arms = all_arms(before_question=True)
    assert list(arms)[:5] == ["full", "h2o_50", "h2o_35", "h2o_20", "cam_50"]
    repeating = {key for key in arms if "reconstruction" in build_policy(key.rsplit("_", 1)[0]).needs}
    assert all_arms() == {key: arm for key, arm in arms.items() if key not in repeating}
    assert len(arms) == 1 + 3 * (len(registry._own_policies()) - 1)
    assert arms["h2o_35"] == {**method_config(H2O), "budget": 0.35}


def test_build_passes_options_on():
    assert build_policy("h2o", {"budget": 0.35, "recent_share": 0.25}) == H2O(budget=0.35, recent_share=0.25)
    assert build_policy("full") == Full()


def test_mistakes_name_the_nearest_choice():
    with pytest.raises(ConfigError, match=r"unknown method 'h20': did you mean h2o\? `kvbench ls methods` lists all"):
        build_policy("h20")
    with pytest.raises(ConfigError, match=r"unknown option recent for method h2o: did you mean recent_share\?"):
        build_policy("h2o", {"recent": 3})
    with pytest.raises(ConfigError, match=r"unknown option sinks for method h2o: choose among budget, recent_share"):
        build_policy("h2o", {"sinks": 3})


def test_what_is_read_from_the_source_is_what_the_classes_say():
    catalogue = methods()
    assert list(catalogue) == list(load_policies())
    for name, policy in load_policies().items():
        found = catalogue[name]
        assert found.target == f"{policy.__module__}.{policy.__qualname__}"
        assert found.complete
        assert found.summary
        assert list(found.options) == [field.name for field in dataclasses.fields(policy)]
        for field in dataclasses.fields(policy):
            assert found.options[field.name] in (field.default, None)


def test_kernels_are_no_option_of_a_method_any_more(caplog):
    assert build_policy("h2o", {"backend": "auto", "budget": 0.5}) == H2O(budget=0.5)
    assert "set engine.kernels" in caplog.text
    with pytest.raises(ConfigError, match=r"^backend=torch is no option of a method any more: .* set engine.kernels"):
        build_policy("kvmerger", {"backend": "torch"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("kvbench.policies.nowhere:Gone", "mine = kvbench.policies.nowhere:Gone cannot be loaded"),
        ("kvbench.methods.h2o:Gone", "mine = kvbench.methods.h2o:Gone cannot be loaded"),
        ("kvbench.methods.h2o:torch", "mine = kvbench.methods.h2o:torch is not a subclass"),
        ("kvbench.methods.full:Full", "claims a name that another package has"),
    ],
)
def test_broken_entry_points_are_named(monkeypatch, value, message):
    name = "h2o" if "Full" in value else "mine"
    broken = EntryPoint(name, value, registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    with pytest.raises(ConfigError, match=rf"entry point .*{message}"):
        load_policies()
