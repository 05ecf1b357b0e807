"""Requests of random tokens for the engines, and how their answers are compared."""

import pytest
import torch

from kvbench.methods.registry import build_policy
from kvbench.runtime.requests import Answer, Arm, Request


def arm(name, budget=0.5, **options) -> Arm:
    return Arm.of(build_policy(name, {"budget": budget, **options}))


def request(arms, index=0, n_tokens=40, *, question=0, gold=0, new_tokens=8, **options) -> Request:
    """A prompt whose last `question` tokens are read after compression; the full cache is the reference."""
    generator = torch.Generator().manual_seed(index)
    ids, golden = (tuple(torch.randint(3, 250, (n,), generator=generator).tolist()) for n in (n_tokens, gold))
    options = {"reference": arm("full", 1.0), "stop_ids": (2,), "max_new_tokens": new_tokens, "seed": index, **options}
    return Request(index, ids, n_tokens - question, golden, tuple(arms), **options)


def answers(engine, loaded, requests) -> list[Answer]:
    """In the order of requests and arms, whatever order they came in."""
    found = list(engine.run(loaded, requests))
    assert all(isinstance(answer, Answer) for answer in found), found
    return sorted(found, key=lambda answer: answer.index)


def assert_same(found, expected, nats) -> None:
    """The same answers and sizes; likelihood and KL up to the order of sums."""
    for got, wanted in zip(found, expected, strict=True):
        for name in ("index", "arm", "token_ids", "finish", "slots_per_layer", "compressed_tokens", "full_bytes"):
            assert getattr(got, name) == getattr(wanted, name), (name, got.arm.key)
        assert got.gold_nll == pytest.approx(wanted.gold_nll, abs=nats)
        assert got.kl == pytest.approx(wanted.kl, abs=nats)
