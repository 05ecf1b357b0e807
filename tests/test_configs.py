"""Every configuration file composes, and what it describes can be built: a config nobody runs rots."""

from dataclasses import dataclass

import pytest

from kvbench.config import composed, group_options
from kvbench.plan import _task_identity, build_plan
from kvbench.tasks.base import Mix, Task


def plan_of(*overrides: str):
    return build_plan(composed(overrides))


@pytest.mark.parametrize("name", group_options("method"))
def test_every_method_builds(name):
    plan = plan_of(f"method={name}", "task=passkey")
    assert [arm.policy.name for arm in plan.arms] == [name]
    assert plan.arms[0].policy.options() == {}  # the defaults are the class's


def test_a_configuration_from_before_kernels_were_the_engine_s(caplog):
    plan = plan_of("method=h2o", "+method.backend=auto", "method.recent_share=${budget}", "budget=0.35")
    assert plan.arms[0].key == "h2o@0.35,recent_share=0.35"
    assert "set engine.kernels" in caplog.text


ABSTRACT = ("task=longbench", "task=ruler", "task=zeroscrolls", "model=local")


@pytest.mark.parametrize("group", ["task", "model", "arms", "engine"])
def test_every_option_of_the_other_groups_builds(group):
    for name in group_options(group):
        if f"{group}={name}" not in ABSTRACT:
            plan = plan_of(f"{group}={name}")
            assert plan.arms
            assert plan.task.name
            assert group != "model" or plan.model.name == name


def test_where_a_model_runs_and_where_data_lies_do_not_define_a_run():
    base = plan_of("task=qasper").identity
    same = plan_of("task=qasper", "model.device=cpu", "task.limit=3", "data.root=/x").identity
    assert base == same
    for override in ("protocol.seed=1", "task=passkey", "protocol.compress=before_question", "model.dtype=bfloat16"):
        assert plan_of("task=qasper", override).identity != base, override


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
