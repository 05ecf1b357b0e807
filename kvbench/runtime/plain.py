"""The plain engine: one arm, one sample, one token at a time. Slow; the oracle the fused engine is tested against.

It runs torch operations only, wherever it runs: prefill, compression, attention and steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.base import LayerStates
from kvbench.methods.full import in_effect
from kvbench.models.load import LoadedModel
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.engine import Arm, ArmResult, Engine, Job, JobResult, SampleFailure, check_jobs, model_shape, never
from kvbench.runtime.failures import ends_the_run, failure_reason, is_out_of_memory
from kvbench.runtime.plain_cache import PlainCache
from kvbench.runtime.prefill import prefill


@dataclass(frozen=True)
class PlainEngine(Engine):
    """Prefills anew for every strand of every arm, and decodes it alone (see module docstring)."""

    def run(
        self, loaded: LoadedModel, jobs: Sequence[Job], stopping: Callable[[], bool] = never
    ) -> Iterator[JobResult | SampleFailure]:
        """Run jobs one after the other; see `Engine.run`."""
        check_jobs(loaded, jobs)
        for job in jobs:
            if stopping():
                return
            yield from self._run_job(loaded, job)

    def _run_job(self, loaded: LoadedModel, job: Job) -> Iterator[JobResult | SampleFailure]:
        shape = model_shape(loaded)
        full_slots = job.compress_at * shape["n_layers"] * shape["n_kv_heads"]
        full_bytes = full_slots * 2 * shape["head_dim"] * loaded.dtype.itemsize
        results = []
        try:
            reference = _Row(loaded, job, job.reference).force()[1] if job.gold_ids else None
        except Exception as error:
            yield _failure(job, error, job.arms)
            return
        for arm in job.arms:
            try:
                results.append(_run_arm(loaded, job, arm, reference))
            except Exception as error:
                yield _failure(job, error, (arm,))
        if results:
            settings = {"engine": "plain", "kernels": "torch"}
            yield JobResult(job.index, results, job.compress_at, full_slots, full_bytes, settings)


def _run_arm(loaded: LoadedModel, job: Job, arm: Arm, reference: Tensor | None) -> ArmResult:
    """One arm's answer, and its likelihood and KL against the reference's log-probabilities `(n_gold, V)`."""
    start = time.perf_counter()
    row = _Row(loaded, job, arm)
    token_ids, finish = row.generate()
    gold_nll: list[float] = []
    kl: list[float] = []
    if reference is not None:
        gold_nll, log_probs = _Row(loaded, job, arm).force()
        kl = (reference.exp() * (reference - log_probs)).sum(-1).tolist()
    return ArmResult(
        arm=arm, token_ids=token_ids, finish=finish, gold_nll=gold_nll, kl=kl,
        slots_per_layer=row.cache.slots_per_layer, cache_bytes=row.cache.n_bytes, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _failure(job: Job, error: Exception, arms: tuple[Arm, ...]) -> SampleFailure:
    """The failure that `error` means for `arms`; raises it again if no other sample could do better."""
    if ends_the_run(error):
        raise error
    if isinstance(error, FloatingPointError):
        return SampleFailure(job.index, str(error), arms)
    memory = "out of memory with a single arm: " if is_out_of_memory(error) else ""
    return SampleFailure(job.index, memory + failure_reason(error), arms)


class _Row:
    """One strand: an arm's compressed cache, right after the prefill."""

    def __init__(self, loaded: LoadedModel, job: Job, arm: Arm):
        self.loaded, self.job = loaded, job
        policy = in_effect(arm.policy)
        budgets = policy.layer_budgets(job.compress_at, model_shape(loaded)["n_layers"])
        self.cache = PlainCache(policy, position=job.compress_at)

        def on_layer(states: LayerStates) -> None:
            self.cache.add(policy.compress(states, budgets[states.layer_index]))

        self.logits, _ = prefill(loaded, job, [arm], on_layer, kernels="torch")
        for token in job.question_ids:
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
            if len(tokens) < self.job.min_new_tokens:
                logits = logits.index_fill(0, torch.tensor(self.job.stop_ids, device=logits.device), -torch.inf)
            token = int(logits.argmax())
            if token in self.job.stop_ids:
                return tokens, "stop"
            tokens.append(token)
            if len(tokens) >= self.job.max_new_tokens:
                return tokens, "length"
            self.logits = self._feed(token)

    def force(self) -> tuple[list[float], Tensor]:
        """Negative log-likelihood of each gold token, and the log-probabilities `(n_gold, V)` that judged them."""
        judged = []
        for token in self.job.gold_ids[:-1]:
            judged.append(torch.log_softmax(self.logits, -1))
            self.logits = self._feed(token)
        judged.append(torch.log_softmax(self.logits, -1))
        log_probs = torch.stack(judged)
        gold = torch.tensor(self.job.gold_ids, device=log_probs.device)
        return (-log_probs.gather(1, gold[:, None])[:, 0]).tolist(), log_probs
