"""What raises in one arm of one sample fails that alone: everything else is measured as if it had not been there."""

import fault_policies
import pytest
import torch
from engine_cases import request

from kvbench.errors import BudgetError, failure_reason
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Answer, Arm, SampleFailure, ends_the_run, is_out_of_memory

GOOD = (Arm.of(Full()), Arm.of(H2O(budget=0.5)), Arm.of(fault_policies.Newest(budget=0.5)))
ENGINES = [FusedEngine(), PlainEngine()]
both_engines = pytest.mark.parametrize("engine", ENGINES, ids=["fused", "plain"])


def requests(*arms: Arm, count: int = 2):
    return [request(arms, i, 40 + 20 * i, gold=3, new_tokens=4) for i in range(count)]


def outcome(results) -> tuple[dict[tuple[int, str], list[int]], dict[tuple[int, str], str]]:
    """Answers and reasons by (request, arm)."""
    results = list(results)
    good = [((r.index, r.arm.key), r.token_ids) for r in results if isinstance(r, Answer)]
    failed = [((r.index, arm.key), r.reason) for r in results if isinstance(r, SampleFailure) for arm in r.arms]
    assert len(dict(good + failed)) == len(good + failed)
    return dict(good), dict(failed)


@both_engines
@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (fault_policies.RaisesInCompress, "RuntimeError: broken on purpose (fault_policies.py:"),
        (fault_policies.RaisesInStep, "ZeroDivisionError: broken in step (fault_policies.py:"),
        (fault_policies.RaisesInBudget, "KeyError: 'no such layer' (fault_policies.py:"),
        (fault_policies.FillsMemoryInCompress, "out of memory with a single arm: RuntimeError: "),
        (fault_policies.FillsMemoryInStep, "out of memory with a single arm: RuntimeError: "),
        (fault_policies.RunsOutOfMemory, "out of memory with a single arm: OutOfMemoryError: CUDA out of memory"),
        (fault_policies.MakesNan, "not finite"),
    ],
)
def test_the_guilty_arm_fails_and_the_others_answer_as_without_it(tiny_gqa, engine, policy, words):
    bad = Arm.of(policy(budget=0.5))
    expected, none = outcome(engine.run(tiny_gqa, requests(*GOOD)))
    assert (len(expected), none) == (6, {})
    good, failed = outcome(engine.run(tiny_gqa, requests(GOOD[0], bad, *GOOD[1:])))
    assert good == expected
    assert failed.keys() == {(0, bad.key), (1, bad.key)}
    assert all(words in reason and "\n" not in reason for reason in failed.values()), failed


@both_engines
def test_the_other_samples_of_a_guilty_arm_are_measured(tiny_gqa, engine):
    bad = Arm.of(fault_policies.RaisesInCompress(budget=0.5, longer_than=50))
    good, failed = outcome(engine.run(tiny_gqa, requests(bad, GOOD[0])))
    assert good.keys() == {(0, bad.key), (0, "full"), (1, "full")}
    assert failed.keys() == {(1, bad.key)}


@both_engines
def test_a_setting_that_no_sample_can_use_ends_the_run(tiny_gqa, engine):
    with pytest.raises(BudgetError, match="slots"):
        list(engine.run(tiny_gqa, requests(GOOD[0], Arm.of(H2O(budget=0.01)))))


@both_engines
def test_logits_that_are_not_finite_fail_the_sample_loudly(engine):
    broken = load_model(named_config("tiny-random", device="cpu"))
    broken.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    good, failed = outcome(engine.run(broken, requests(*GOOD, count=1)))
    assert good == {}
    assert len(failed) == 3
    assert all("not finite" in reason for reason in failed.values())


@both_engines
def test_an_engine_that_is_asked_to_stop_ends_after_the_batch_in_flight(tiny_gqa, engine):
    todo = requests(GOOD[0], count=3)
    assert list(engine.run(tiny_gqa, todo, lambda: True)) == []
    answers = iter([False, True])
    results = list(engine.run(tiny_gqa, todo, lambda: next(answers)))
    batch = 1 if isinstance(engine, PlainEngine) else 3
    assert [result.index for result in results] == list(range(batch))


def test_missing_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as real:
        torch.empty(fault_policies.HUGE)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_lost_device_ends_the_run_and_a_full_one_does_not():
    lost = torch.AcceleratorError("CUDA error: device-side assert triggered", 710)
    assert ends_the_run(lost)
    assert not ends_the_run(torch.OutOfMemoryError("CUDA out of memory"))
    assert not ends_the_run(RuntimeError("shapes do not match"))


def test_a_reason_is_one_line_with_a_place():
    assert failure_reason(SampleFailure(0, "a\nb", ())) == "SampleFailure: a"
    assert failure_reason(ValueError()) == "ValueError"
    with pytest.raises(ValueError, match="invalid literal") as raised:
        int("x\n")
    place = f"(test_failures.py:{raised.tb.tb_lineno})"
    assert failure_reason(raised.value) == f"ValueError: invalid literal for int() with base 10: 'x\\n' {place}"
