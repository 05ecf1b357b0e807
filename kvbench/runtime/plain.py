"""The plain engine: one arm, one sample, one token at a time. Slow on purpose; the oracle of the fused engine.

It runs torch operations only, wherever it runs: prefill, compression, attention and steps (see `plain_cache`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.errors import failure_reason
from kvbench.methods.base import LayerStates
from kvbench.methods.full import in_effect
from kvbench.models.load import LoadedModel
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.fork import prefill
from kvbench.runtime.plain_cache import PlainCache
from kvbench.runtime.requests import (
    Answer,
    Arm,
    Engine,
    Request,
    SampleFailure,
    blank_answer,
    check_requests,
    ends_the_run,
    is_out_of_memory,
    model_shape,
    never,
)


@dataclass(frozen=True)
class PlainEngine(Engine):
    """Prefills anew for every sequence of every arm, and decodes it alone (see module docstring)."""

    def run(
        self, loaded: LoadedModel, requests: Sequence[Request], stopping: Callable[[], bool] = never
    ) -> Iterator[Answer | SampleFailure]:
        """Run requests one after the other; see `Engine.run`."""
        check_requests(loaded, requests)
        for request in requests:
            if stopping():
                return
            try:
                reference = _Row(loaded, request, request.reference).force()[1] if request.gold_ids else None
            except Exception as error:
                yield _failure(request, error, request.arms)
                continue
            for arm in request.arms:
                try:
                    answer = _answer(loaded, request, arm, reference)
                except Exception as error:
                    yield _failure(request, error, (arm,))
                    continue
                yield answer


def _answer(loaded: LoadedModel, request: Request, arm: Arm, reference: Tensor | None) -> Answer:
    """One arm's answer, and its likelihood and KL against the reference's log-probabilities `(n_gold, V)`."""
    start = time.perf_counter()
    row = _Row(loaded, request, arm)
    answer = blank_answer(loaded, request, arm, row.cache.slots_per_layer, row.cache.n_bytes, seconds=0.0)
    answer.token_ids, answer.finish = row.generate()
    if reference is not None:
        answer.gold_nll, log_probs = _Row(loaded, request, arm).force()
        answer.kl = (reference.exp() * (reference - log_probs)).sum(-1).tolist()
    answer.seconds = time.perf_counter() - start
    answer.settings = {"engine": "plain", "kernels": "torch"}
    return answer


def _failure(request: Request, error: Exception, arms: tuple[Arm, ...]) -> SampleFailure:
    """The failure that `error` means for `arms`; raises it again if no other sample could do better."""
    if ends_the_run(error):
        raise error
    if isinstance(error, FloatingPointError):
        return SampleFailure(request.index, str(error), arms)
    memory = "out of memory with a single arm: " if is_out_of_memory(error) else ""
    return SampleFailure(request.index, memory + failure_reason(error), arms)


class _Row:
    """One sequence: an arm's compressed cache, right after the prefill."""

    def __init__(self, loaded: LoadedModel, request: Request, arm: Arm):
        self.loaded, self.request = loaded, request
        policy = in_effect(arm.policy)
        budgets = policy.layer_budgets(request.compress_at, model_shape(loaded)["n_layers"])
        self.cache = PlainCache(policy, position=request.compress_at)

        def on_layer(states: LayerStates) -> None:
            self.cache.add(policy.compress(states, budgets[states.layer_index]))

        self.logits, _ = prefill(loaded, request, [arm], on_layer, kernels="torch")
        for token in request.question_ids:
            self.logits = self._feed(token)

    def _feed(self, token: int) -> Tensor:
        with torch.inference_mode(), attention_implementation(self.loaded.model):
            output = self.loaded.model(
                input_ids=torch.tensor([[token]], device=self.loaded.device),
                position_ids=torch.tensor([[self.cache.position]], device=self.loaded.device),
                past_key_values=self.cache,
                attention_context=self.cache,
                use_cache=True,
            )
        self.cache.advance()
        logits = output.logits[0, -1].float()
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"the model's logits are not finite after {self.cache.position} tokens")
        return logits

    def generate(self) -> tuple[list[int], str]:
        """Greedy answer: tokens without the stop token, and "stop" or "length"."""
        tokens: list[int] = []
        while True:
            logits = self.logits
            if len(tokens) < self.request.min_new_tokens:
                logits = logits.index_fill(0, torch.tensor(self.request.stop_ids, device=logits.device), -torch.inf)
            token = int(logits.argmax())
            if token in self.request.stop_ids:
                return tokens, "stop"
            tokens.append(token)
            if len(tokens) >= self.request.max_new_tokens:
                return tokens, "length"
            self.logits = self._feed(token)

    def force(self) -> tuple[list[float], Tensor]:
        """Negative log-likelihood of each gold token, and the log-probabilities `(n_gold, V)` that judged them."""
        judged = []
        for token in self.request.gold_ids[:-1]:
            judged.append(torch.log_softmax(self.logits, -1))
            self.logits = self._feed(token)
        judged.append(torch.log_softmax(self.logits, -1))
        log_probs = torch.stack(judged)
        gold = torch.tensor(self.request.gold_ids, device=log_probs.device)
        return (-log_probs.gather(1, gold[:, None])[:, 0]).tolist(), log_probs
