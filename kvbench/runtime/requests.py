"""What an engine is asked (requests) and what it answers, whichever engine runs; what may fail without ending a run.

A request is one sample with the arms still to be measured. Each arm *generates* its own answer, and is *forced* along
the gold answer, which gives the gold likelihood and the KL divergence to the full cache token by token.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvbench.errors import ConfigError, KvbenchError, ModelError
from kvbench.methods.base import Policy
from kvbench.methods.full import in_effect
from kvbench.models.load import LoadedModel
from kvbench.runtime.model_check import check_lengths, check_model, output_weights

RECONSTRUCTION = "reconstruction"
"""The need of methods for which the model repeats the prompt; see `kvbench.runtime.reconstruct`."""
SINK_TOKENS, CHUNK_TOKENS, OVERLAP_TOKENS = 4, 2000, 8
"""First tokens in no chunk; a chunk's tokens, and those of the chunk before that open a demand: KVzip's 2,000 and 8."""

OUT_OF_MEMORY_ON_CPU = "DefaultCPUAllocator"
"""PyTorch's CPU allocator reports missing memory as a plain RuntimeError that begins with its name."""


@dataclass(frozen=True)
class Arm:
    """One (method, budget) pair with its options."""

    key: str
    """Its name in records and tables, e.g. "kvmerger@0.35" or "kvmerger@0.35,sigma=3"."""
    policy: Policy

    @classmethod
    def of(cls, policy: Policy) -> Arm:
        """The arm of a policy, named by what differs from the method's defaults."""
        share = repr(float(policy.budget)).removesuffix(".0")  # exact: two budgets never share a name
        budget = f"@{share}" if policy.budget < 1.0 or policy.steps else ""
        options = "".join(f",{name}={value}" for name, value in sorted(policy.options().items()))
        return cls(re.sub(r"\s+", "", policy.name + budget + options), policy)


@dataclass(frozen=True)
class Request:
    """One sample for an engine.

    Attributes:
        index: position of the sample in the plan; answers carry it back.
        input_ids: the prompt, T tokens.
        compress_at: number of leading tokens that are prefilled and compressed; the rest (the question, under
            `before_question`) is read with the compressed cache. T under `after_question`.
        gold_ids: tokens of the gold answer to be forced; empty to skip likelihood and KL.
        arms: those to measure.
        reference: the arm that KL is measured against (the full cache); need not be among `arms`.
        stop_ids: tokens that end an answer.
        min_new_tokens: tokens before which a stop token may not be chosen.
        seed: of the policies for this sample.
        demand_ids: how the model is asked to repeat its prompt, where no question is in it: the demand for the first
            chunk, for a later one, which goes on with the last tokens before it, and what opens the answer.
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
    demand_ids: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None

    def repetitions(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """The prompt's chunks: first token, end, and the tokens fed to have it repeated, the chunk itself among them.

        `ConfigError` if the prompt is not one to repeat.
        """
        if self.demand_ids is None:
            raise ConfigError(
                "demand_ids=None with a method that has the model repeat a prompt without its question: set "
                "protocol.compress=before_question (kvbench.compress and lm_eval cannot run it), or leave it out"
            )
        (first, later, opening), found = self.demand_ids, []
        sinks = min(SINK_TOKENS, self.compress_at)
        for start in range(sinks, self.compress_at, CHUNK_TOKENS):
            end = min(start + CHUNK_TOKENS, self.compress_at)
            last_words = self.input_ids[max(sinks, start - OVERLAP_TOKENS) : start]
            demand = first if start == sinks else later + last_words
            found.append((start, end, demand + opening + self.input_ids[start:end]))
        return found

    @property
    def question_ids(self) -> tuple[int, ...]:
        """Tokens read with the compressed cache before the answer begins."""
        return self.input_ids[self.compress_at :]


@dataclass
class Answer:
    """What one arm did with one request.

    Attributes:
        index: the request's.
        slots_per_layer: slots kept at the end of compression, summed over KV heads.
        cache_bytes: bytes allocated for them.
        compressed_tokens: tokens that were in the cache when it was compressed.
        full_slots: slots of the full cache at compression, over all layers and heads.
        full_bytes: bytes of its keys and values.
        seconds: the arm's share of wall time.
        token_ids: generated tokens, without the stop token.
        finish: "stop" or "length".
        gold_nll: negative log-likelihood of each gold token, nats; empty if nothing was forced.
        kl: KL(full || arm) at each gold token, nats.
        settings: what was really used: kernels, rows of the batch, notes (a halved batch, ...).
    """

    index: int
    arm: Arm
    slots_per_layer: list[int]
    cache_bytes: int
    compressed_tokens: int
    full_slots: int
    full_bytes: int
    seconds: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    finish: str = "length"
    gold_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def blank(cls, loaded: LoadedModel, request: Request, arm: Arm, slots: list[int], n_bytes: int) -> Answer:
        """An answer without a token yet: what an arm's cache takes, beside what the full cache would."""
        shape = model_shape(loaded)
        full_slots = request.compress_at * shape["n_layers"] * shape["n_kv_heads"]
        full_bytes = full_slots * 2 * shape["head_dim"] * loaded.dtype.itemsize
        return cls(request.index, arm, slots, n_bytes, request.compress_at, full_slots, full_bytes)


class SampleFailure(Exception):
    """One sample cannot be completed by some or all of its arms, for a reason of one line; the run goes on."""

    def __init__(self, index: int, reason: str, arms: tuple[Arm, ...]):
        super().__init__(reason)
        self.index, self.reason, self.arms = index, reason, arms


class Engine(ABC):
    """Turns requests into answers."""

    @abstractmethod
    def run(
        self, loaded: LoadedModel, requests: Sequence[Request], stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[Answer | SampleFailure]:
        """Run requests; outcomes come as they are finished, those of one request one after the other.

        `stopping` is asked before each batch; once it says yes, no further request is begun.

        Yields:
            An `Answer` for each arm that was completed, a `SampleFailure` with arms that raised (a policy's own error,
            missing memory, logits that are not finite): each arm of each request comes exactly once.

        Raises:
            KvbenchError: for what has to be mended in the settings, e.g. a budget that is impossible for a prompt.
        """

    @staticmethod
    def check(loaded: LoadedModel, requests: Sequence[Request]) -> None:
        """Refuse a model that is not supported, or requests longer than it can be asked, in one line each."""
        spans = [(r.compress_at, len(r.input_ids) + max(r.max_new_tokens, len(r.gold_ids)) - 1) for r in requests]
        needs = {need for request in requests for arm in request.arms for need in in_effect(arm.policy).needs}
        if "output_weight" in needs:
            output_weights(loaded.model)
        if RECONSTRUCTION in needs:
            longest = [max((len(ids) for *_, ids in r.repetitions()), default=0) + r.compress_at for r in requests]
            spans += [(r.compress_at, end) for r, end in zip(requests, longest, strict=True)]
            if max(longest) > loaded.max_context_tokens:
                raise ModelError(
                    f"{max(longest)} tokens of a prompt and what is repeated of it exceed the context of "
                    f"{loaded.max_context_tokens} tokens of model {loaded.name}: lower model.max_prompt_tokens, or "
                    "leave out methods that need 'reconstruction'"
                )
        check_lengths(loaded.model, spans)


def model_shape(loaded: LoadedModel) -> dict[str, int]:
    """Sizes of the attention of a model, `ModelFacts.shape`; `ModelError` if the model is not supported."""
    return check_model(loaded.model).shape


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU, in PyTorch's CPU allocator or in Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY_ON_CPU in str(error)


def ends_the_run(error: Exception) -> bool:
    """Whether no other sample can do better: an error to mend in the settings, or a device that is lost.

    A CUDA error other than missing memory leaves the context unusable: every later call of the process fails.
    """
    if isinstance(error, KvbenchError):
        return True
    lost = getattr(torch, "AcceleratorError", ())  # new in torch 2.8; before, such an error looks like any other
    return isinstance(error, lost) and not is_out_of_memory(error)
