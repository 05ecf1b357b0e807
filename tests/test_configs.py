"""Every configuration file composes, and what it describes can be built: a config nobody runs rots."""

from dataclasses import dataclass

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from kvbench.config import config_folder, group_options, register
from kvbench.plan import _task_identity, build_plan
from kvbench.tasks.base import Mix, Task


def options(group: str) -> list[str]:
    folder = config_folder() / group
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.yaml"))]
    return [name for name in names if not name.rsplit("/", 1)[-1].startswith("_")]


def composed(*overrides: str):
    register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("name", group_options("method"))
def test_every_method_builds(name):
    plan = build_plan(composed(f"method={name}", "task=passkey"))
    assert [arm.policy.name for arm in plan.arms] == [name]
    assert plan.arms[0].policy.options() == {}  # the defaults are the class's


def test_a_configuration_from_before_kernels_were_the_engine_s(caplog):
    plan = build_plan(composed("method=h2o", "+method.backend=auto", "method.recent_share=${budget}", "budget=0.35"))
    assert plan.arms[0].key == "h2o@0.35,recent_share=0.35"
    assert "set engine.kernels" in caplog.text


@pytest.mark.parametrize("name", options("task"))
def test_every_task_builds(name):
    assert build_plan(composed(f"task={name}")).task.name


@pytest.mark.parametrize("name", [n for n in options("model") if n != "local"])
def test_every_model_composes(name):
    assert build_plan(composed(f"model={name}")).model.name == name


@pytest.mark.parametrize("group", ["arms", "engine"])
def test_every_option_of_the_other_groups_builds(group):
    for name in group_options(group):
        assert build_plan(composed(f"{group}={name}")).arms


def test_a_mistyped_key_fails_at_composition_with_its_name():
    with pytest.raises(ConfigCompositionException, match=r"protocol\.sede"):
        composed("protocol.sede=3")
    with pytest.raises(ConfigCompositionException, match=r"model\.pth"):
        composed("model.pth=/x")


def test_where_a_model_runs_and_where_data_lies_do_not_define_a_run():
    base = build_plan(composed("task=qasper")).identity
    same = build_plan(composed("task=qasper", "model.device=cpu", "task.limit=3", "data.root=/x")).identity
    assert base == same
    for override in ("protocol.seed=1", "task=passkey", "protocol.compress=before_question", "model.dtype=bfloat16"):
        assert build_plan(composed("task=qasper", override)).identity != base, override


def test_a_mixture_is_told_apart_by_the_classes_of_its_parts():
    @dataclass(frozen=True, kw_only=True)
    class One(Task):
        def all_samples(self):
            return []

    class Other(One):
        pass

    one, other = (_task_identity(Mix(name="mix", tasks={"part": part(name="part")})) for part in (One, Other))
    assert one != other
    assert one["tasks"]["part"] == {"class": "One", "name": "part"}
