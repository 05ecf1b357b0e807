"""What an engine is asked (jobs) and what it answers (results), whichever engine runs.

A job is one sample with the arms still to be measured. An arm has two strands: it *generates* its own answer, and it is
*forced* along the gold answer, which gives the gold likelihood and the KL divergence to the full cache token by token.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbench.methods.base import Policy
from kvbench.models.load import LoadedModel
from kvbench.runtime.model_check import check_lengths, check_model


@dataclass(frozen=True)
class Arm:
    """One (method, budget) pair with its options.

    Attributes:
        key: name of the arm in records and tables, e.g. "kvmerger@0.35" or "kvmerger@0.35,sigma=3".
        policy: the policy, options and budget included.
    """

    key: str
    policy: Policy

    @classmethod
    def of(cls, policy: Policy) -> Arm:
        """The arm of a policy, named by what differs from the method's defaults."""
        share = repr(float(policy.budget)).removesuffix(".0")  # exact: two budgets never share a name
        budget = f"@{share}" if policy.budget < 1.0 or policy.steps else ""
        options = "".join(f",{name}={value}" for name, value in sorted(policy.options().items()))
        return cls(re.sub(r"\s+", "", policy.name + budget + options), policy)


@dataclass(frozen=True)
class Job:
    """One sample for an engine.

    Attributes:
        index: position of the sample in the plan; results carry it back.
        input_ids: the prompt, T tokens.
        compress_at: number of leading tokens that are prefilled and compressed; the rest (the question, under
            `before_question`) is read with the compressed cache. T under `after_question`.
        gold_ids: tokens of the gold answer to be forced; empty to skip likelihood and KL.
        arms: arms to measure.
        reference: the arm that KL is measured against (the full cache); need not be among `arms`.
        stop_ids: token ids that end an answer.
        max_new_tokens: generation limit.
        min_new_tokens: tokens before which a stop token may not be chosen.
        seed: seed of the policies for this sample.
    """

    index: int
    input_ids: tuple[int, ...]
    compress_at: int
    gold_ids: tuple[int, ...]
    arms: tuple[Arm, ...]
    reference: Arm
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    min_new_tokens: int = 0
    seed: int = 0

    @property
    def question_ids(self) -> tuple[int, ...]:
        """Tokens read with the compressed cache before the answer begins."""
        return self.input_ids[self.compress_at :]


@dataclass
class ArmResult:
    """What one arm did with one job.

    Attributes:
        arm: the arm.
        token_ids: generated tokens, without the stop token.
        finish: "stop" or "length".
        gold_nll: negative log-likelihood of each gold token, nats; empty if nothing was forced.
        kl: KL(full || arm) at each gold token, nats.
        slots_per_layer: slots kept at the end of compression, summed over KV heads.
        cache_bytes: bytes allocated for them.
        seconds: the arm's share of wall time.
    """

    arm: Arm
    token_ids: list[int]
    finish: str
    gold_nll: list[float]
    kl: list[float]
    slots_per_layer: list[int]
    cache_bytes: int
    seconds: float


@dataclass
class JobResult:
    """The results of a job's arms.

    Attributes:
        index: the job's index.
        arms: one result per arm of the job, in order.
        compressed_tokens: tokens that were in the cache when it was compressed.
        full_slots: slots of the full cache at compression, over all layers and heads.
        full_bytes: bytes of its keys and values.
        settings: what was really used: kernels, rows of the batch, notes (a halved batch, ...).
    """

    index: int
    arms: list[ArmResult]
    compressed_tokens: int
    full_slots: int
    full_bytes: int
    settings: dict[str, Any] = field(default_factory=dict)


class SampleFailure(Exception):
    """One sample cannot be completed, for some of its arms or for all; the run goes on with everything else.

    Args:
        index: the job's index.
        reason: one line.
        arms: the arms that failed.
    """

    def __init__(self, index: int, reason: str, arms: tuple[Arm, ...]):
        super().__init__(reason)
        self.index = index
        self.reason = reason
        self.arms = arms


def check_jobs(loaded: LoadedModel, jobs: Sequence[Job]) -> None:
    """Refuse a model that is not supported, or jobs longer than it can be asked: see `check_lengths`.

    Raises:
        ModelError: with the remedy.
    """
    answers = [max(job.max_new_tokens, len(job.gold_ids)) for job in jobs]
    ends = [len(job.input_ids) + n_tokens - 1 for job, n_tokens in zip(jobs, answers, strict=True)]
    check_lengths(loaded.model, [(job.compress_at, end) for job, end in zip(jobs, ends, strict=True)])


def never() -> bool:
    """The answer of a caller that does not want to stop an engine."""
    return False


class Engine(ABC):
    """Turns jobs into results."""

    @abstractmethod
    def run(
        self, loaded: LoadedModel, jobs: Sequence[Job], stopping: Callable[[], bool] = never
    ) -> Iterator[JobResult | SampleFailure]:
        """Run jobs; results come as they are finished, in any order.

        Args:
            loaded: model and tokenizer.
            jobs: the samples.
            stopping: asked before each batch; once it says yes, no further job is begun.

        Yields:
            A `JobResult` with the arms that were completed, a `SampleFailure` with those that raised (a policy's own
            error, missing memory, logits that are not finite): each arm of each job comes exactly once. All results of
            one job come one after the other.

        Raises:
            KvbenchError: for what has to be mended in the settings, e.g. a budget that is impossible for a prompt, or a
                model that is not supported (before the first job).
        """


def model_shape(loaded: LoadedModel) -> dict[str, int]:
    """Sizes of the attention of a model: `ModelFacts.shape`.

    Raises:
        ModelError: if the model is not supported.
    """
    return check_model(loaded.model).shape
