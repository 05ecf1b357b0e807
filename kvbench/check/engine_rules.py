"""Rules about the whole: the policy inside both engines, on a tiny model with random weights."""

from __future__ import annotations

from functools import cache

import torch

from kvbench.check.rule import Broken
from kvbench.check.subject import Subject
from kvbench.errors import BudgetError
from kvbench.methods.base import Policy
from kvbench.methods.full import Full
from kvbench.models.config import named_config
from kvbench.models.load import LoadedModel, load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Answer, Arm, Engine, Request

MODEL_LAYERS = 8
TOLERANCE_NATS = 2e-4
"""Of likelihood and KL between the engines, whose sums run in different orders; as in the engines' own tests."""


def engines_agree(subject: Subject) -> str:
    """The fused engine (all rows in one batch) and the plain one (one row, dense) give the same answers."""
    loaded = _tiny_model()
    jobs = [_job(subject, 0, 61, n_arms=2), _job(subject, 1, 67, n_arms=1, question=3)]
    plain, fused = (_results(engine, loaded, jobs) for engine in (PlainEngine(), FusedEngine()))
    n_answers = 0
    for expected, got in zip(plain, fused, strict=True):
        n_answers += 1
        where = f"{got.arm.key}, {expected.compressed_tokens} tokens compressed"
        remedy = (
            "what works in one engine only depends on more than its arguments: on earlier calls, on memory it "
            "shares with the layer, or on padding and scratch slots"
        )
        if got.slots_per_layer != expected.slots_per_layer:
            raise Broken(f"{where}: slots {got.slots_per_layer} against {expected.slots_per_layer}", remedy)
        if got.token_ids != expected.token_ids:
            raise Broken(f"{where}: tokens {got.token_ids} against {expected.token_ids}", remedy)
        gaps = [abs(a - b) for a, b in zip(got.gold_nll + got.kl, expected.gold_nll + expected.kl, strict=True)]
        if not max(gaps) < TOLERANCE_NATS:
            raise Broken(f"{where}: likelihood or KL differ by {max(gaps):.2g} nats", remedy)
    budgets = ", ".join(f"{arm.policy.budget:g}" for arm in jobs[0].arms)
    return (
        f"{n_answers} answers of 8 tokens, with and without a question after the compressed context; budgets {budgets}"
    )


@cache
def _tiny_model() -> LoadedModel:
    return load_model(named_config("tiny-random", n_layers=MODEL_LAYERS, device="cpu"))


def _job(subject: Subject, index: int, n_tokens: int, n_arms: int, question: int = 0) -> Request:
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(3, 250, (n_tokens + 4,), generator=generator).tolist()
    policies = [policy for policy in subject.policies.values() if _takes(policy, n_tokens - question)]
    if not policies:
        raise Broken(f"no budget is taken for {n_tokens} tokens", "lower minimum_tokens or see layer_budgets")
    chosen = {policy.budget: policy for policy in (policies[0], policies[len(policies) // 2])[:n_arms]}
    return Request(
        index=index,
        input_ids=tuple(ids[:n_tokens]),
        compress_at=n_tokens - question,
        gold_ids=tuple(ids[n_tokens:]),
        arms=tuple(Arm(f"{policy.name}@{budget:g}", policy) for budget, policy in chosen.items()),
        reference=Arm("reference", Full()),
        stop_ids=(2,),
        max_new_tokens=8,
        seed=index,
    )


def _takes(policy: Policy, n_tokens: int) -> bool:
    try:
        policy.layer_budgets(n_tokens, MODEL_LAYERS)
    except BudgetError:
        return False
    return True


def _results(engine: Engine, loaded: LoadedModel, jobs: list[Request]) -> list[Answer]:
    results = list(engine.run(loaded, jobs))
    for result in results:
        if not isinstance(result, Answer):
            raise Broken(f"{type(engine).__name__}: {result.reason}", "see that keys and values stay finite")
    return sorted((result for result in results if isinstance(result, Answer)), key=lambda result: result.index)
