"""Every configuration file composes, and what it describes can be built: a config nobody runs rots."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import kvbench
from kvbench.config import composed, group_options
from kvbench.plan import _task_identity, build_plan
from kvbench.tasks.base import Mix, Task

ANY_METHOD = "protocol.compress=before_question"  # also one that has the model repeat the context


def plan_of(*overrides: str):
    return build_plan(composed(overrides))


@pytest.mark.parametrize("name", group_options("method"))
def test_every_method_builds(name):
    plan = plan_of(f"method={name}", "task=passkey", ANY_METHOD)
    assert [arm.policy.name for arm in plan.arms] == list(dict.fromkeys(["full", name]))
    assert plan.arms[-1].policy.options() == {}  # the defaults are the class's


def keys_of(*overrides: str):
    return [arm.key for arm in plan_of("task=passkey", *overrides).arms]


def test_methods_and_budgets_make_the_arms_of_one_batch(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    source = (Path(kvbench.__file__).parent / "methods" / "knorm.py").read_text(encoding="utf-8")
    file.write_text(source.replace('"knorm"', '"mine"'), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    four = ["h2o@0.5", "h2o@0.2", "mine@0.5", "mine@0.2"]
    assert keys_of("methods=[h2o,mine:Knorm]", "budgets=[0.5,0.2]") == ["full", *four]
    assert keys_of(f"methods=[full,{file}:Knorm]", "budget=0.3") == ["full", "mine@0.3"]
    assert keys_of("method=mine:Knorm", "method.recent_tokens=4") == ["full", "mine@0.5,recent_tokens=4"]
    assert keys_of(f"method={file}:Knorm", "budgets=[0.5,0.2]") == ["full", *four[2:]]
    assert keys_of("methods=[{h2o:{recent_share:0.25}},h2o]") == ["full", "h2o@0.5,recent_share=0.25", "h2o@0.5"]
    assert keys_of("arms=pivot", "budgets=[0.2]")[1] == "kvmerger@0.2"


def test_models_need_no_file_of_their_own(tmp_path):
    (folder := tmp_path / "my model").mkdir()
    for name, expected in {
        "Qwen/Qwen2.5-0.5B-Instruct": ("Qwen2.5-0.5B-Instruct", "hub"),
        f"'{folder}'": ("my model", "local"),
        f"{tmp_path}/": (tmp_path.name, "local"),
        str(tmp_path / "weights.Q4_0.gguf"): ("weights.Q4_0", "gguf"),
    }.items():
        model = plan_of(f"model={name}", "task=passkey").model
        assert (model.name, model.effective_source) == expected
    assert model.path == str(tmp_path / "weights.Q4_0.gguf")
    assert plan_of("model=Qwen/Qwen2.5-0.5B-Instruct", "model.dtype=bfloat16").model.dtype == "bfloat16"


def test_a_configuration_from_before_kernels_were_the_engine_s(caplog):
    plan = plan_of("method=h2o", "+method.backend=auto", "method.recent_share=${budget}", "budget=0.35")
    assert plan.arms[1].key == "h2o@0.35,recent_share=0.35"
    assert "set engine.kernels" in caplog.text


ABSTRACT = ("task=longbench", "task=ruler", "task=zeroscrolls", "model=local")


@pytest.mark.parametrize("group", ["task", "model", "arms", "engine"])
def test_every_option_of_the_other_groups_builds(group):
    for name in group_options(group):
        if f"{group}={name}" not in ABSTRACT:
            plan = plan_of(f"{group}={name}", ANY_METHOD)
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
