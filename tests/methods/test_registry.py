"""Methods are found by entry point; mistakes in names are answered with the choices."""

from importlib.metadata import EntryPoint

import pytest
from test_method_configs import OWN_METHODS

from kvbench.errors import ConfigError
from kvbench.methods import registry
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O
from kvbench.methods.registry import build_policy, load_policies


def test_own_methods_are_installed_under_their_names():
    policies = load_policies()
    assert set(OWN_METHODS) <= set(policies)
    assert all(policy.name == name for name, policy in policies.items())


def test_build_passes_options_on():
    assert build_policy("h2o", {"budget": 0.35, "recent_share": 0.25}) == H2O(budget=0.35, recent_share=0.25)
    assert build_policy("full") == Full()


def test_unknown_method_lists_the_choices():
    with pytest.raises(ConfigError, match=r"unknown method 'h20': choose one of .*cam.*h2o"):
        build_policy("h20")


def test_unknown_option_lists_the_choices():
    with pytest.raises(ConfigError, match=r"unknown option recent for method h2o: choose among budget, recent_share"):
        build_policy("h2o", {"recent": 3})


def test_kernels_are_no_option_of_a_method_any_more(caplog):
    assert build_policy("h2o", {"backend": "auto", "budget": 0.5}) == H2O(budget=0.5)
    assert "set engine.kernels" in caplog.text
    with pytest.raises(ConfigError, match=r"^backend=torch is no option of a method any more: .* set engine.kernels"):
        build_policy("kvmerger", {"backend": "torch"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("kvbench.policies.nowhere:Gone", "cannot be loaded"),
        ("kvbench.methods.h2o:Gone", "cannot be loaded"),
        ("kvbench.methods.h2o:math", "is not a subclass"),
    ],
)
def test_broken_entry_points_are_named(monkeypatch, value, message):
    broken = EntryPoint("mine", value, registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    with pytest.raises(ConfigError, match=rf"entry point mine = {value}.*{message}"):
        load_policies()


def test_two_packages_with_one_name_are_refused(monkeypatch):
    points = [
        EntryPoint("h2o", "kvbench.methods.h2o:H2O", registry.ENTRY_POINT_GROUP),
        EntryPoint("h2o", "kvbench.methods.full:Full", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.raises(ConfigError, match="another package"):
        load_policies()
