"""Answers over a compressed context: what the harness asks, put to our engine as jobs. Needs no `lm_eval`.

A request is a context and what follows it. The context is compressed once, like every prompt here, except its last
`question_tokens` tokens, which are read with the compressed cache:

* a *continuation* (`loglikelihood`, all multiple-choice tasks) is forced token by token along the compressed cache, as
  the engine forces a gold answer; its tokens enter the cache uncompressed. Its log-likelihood is the sum over its
  tokens, and it counts as greedy if the same cache, left alone, generates exactly these tokens;
* an *answer* (`generate_until`) is generated greedily from the compressed cache, until a stop string, an end-of-turn
  token or the limit.

With `question_tokens=0` the whole context is compressed, and the first token of every continuation and answer is the
prefill's, which had the full cache: the papers' protocol, but then an answer of one token (a letter) never sees the
compressed cache. Hence the default of 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kvbench.errors import BudgetError, ConfigError, ModelError
from kvbench.methods.base import Policy
from kvbench.methods.full import Full, in_effect
from kvbench.models.load import LoadedModel
from kvbench.models.prompt import stop_token_ids
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.requests import Answer, Arm, Engine, Request, SampleFailure, model_shape

SHORT_CONTEXTS = ("refuse", "full")


@dataclass(frozen=True)
class Continuation:
    """What is asked about a continuation.

    Attributes:
        context_ids: tokens of the context, at least one.
        continuation_ids: tokens to force.
    """

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """What is asked about an answer.

    Attributes:
        context_ids: tokens of the context, at least one.
        stop_texts: texts that end the answer; they are not part of it.
        max_new_tokens: limit in tokens.
    """

    context_ids: tuple[int, ...]
    stop_texts: tuple[str, ...]
    max_new_tokens: int


@dataclass
class Tally:
    """What was really done, over all requests so far.

    Attributes:
        requests: requests answered.
        truncated: contexts whose beginning was cut to fit the model.
        kept_whole: contexts too short for the method's budget that were left uncompressed.
        kept_slots: slots kept, summed over requests, layers and KV heads.
        full_slots: slots of the full cache, likewise.
    """

    requests: int = 0
    truncated: int = 0
    kept_whole: int = 0
    kept_slots: int = 0
    full_slots: int = 0

    @property
    def budget_measured(self) -> float | None:
        """Kept slots over full slots, or None before the first request."""
        return self.kept_slots / self.full_slots if self.full_slots else None


@dataclass
class CompressedAnswers:
    """A model that reads every context through one method's compressed cache.

    Attributes:
        loaded: model and tokenizer.
        policy: the method with its budget and options.
        engine: what runs the jobs.
        question_tokens: last tokens of a context that are read with the compressed cache; see the module's docstring.
        short_context: "refuse" a context that is too short for the method's budget, or keep it "full" and count it.
        seed: seed of the policies; a request's own seed also depends on its context, not on its place.
        tally: what was done.

    Raises:
        ConfigError: if an option is out of range.
    """

    loaded: LoadedModel
    policy: Policy
    engine: Engine = field(default_factory=FusedEngine)
    question_tokens: int = 1
    short_context: str = "refuse"
    seed: int = 0
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        """Validate the options."""
        if isinstance(self.question_tokens, bool) or not isinstance(self.question_tokens, int):
            raise ConfigError(f"question_tokens={self.question_tokens!r} is no integer: give 0 or more")
        if self.question_tokens < 0:
            raise ConfigError(f"question_tokens={self.question_tokens} is negative: give 0 or more")
        if self.short_context not in SHORT_CONTEXTS:
            raise ConfigError(f"short_context={self.short_context!r} is not one of {', '.join(SHORT_CONTEXTS)}")
        self._spellings: dict[tuple[str, ...], tuple[int, ...]] = {}

    @property
    def max_tokens(self) -> int:
        """Most tokens of a context and what follows it together."""
        return self.loaded.max_context_tokens

    def likelihoods(self, requests: Sequence[Continuation]) -> Iterator[tuple[int, float, bool]]:
        """Log-likelihoods of continuations; results come as they are finished, in any order.

        Yields:
            The request's index, the sum of the log-probabilities of its tokens (nats), and whether it is greedy.

        Raises:
            BudgetError: if a context is too short for the method's budget, unless `short_context` is "full".
            ModelError: if a continuation alone exceeds the model's context, or the engine fails.
        """
        jobs = []
        for index, request in enumerate(requests):
            if request.continuation_ids:
                jobs.append(self._job(index, request.context_ids, (), len(request.continuation_ids), request))
            else:
                yield index, 0.0, True
        for index, result in self._run(jobs):
            greedy = tuple(result.token_ids) == requests[index].continuation_ids
            yield index, -sum(result.gold_nll), greedy

    def texts(self, requests: Sequence[Prompt]) -> Iterator[tuple[int, str]]:
        """Greedy answers; results come as they are finished, in any order.

        Yields:
            The request's index and the answer, up to the first stop text.

        Raises:
            BudgetError: as `likelihoods`.
            ModelError: likewise.
        """
        ends = stop_token_ids(self.loaded, stop_newline=False)
        jobs = [
            self._job(index, request.context_ids, (*ends, *self._opening(request.stop_texts)), request.max_new_tokens)
            for index, request in enumerate(requests)
        ]
        for index, result in self._run(jobs):
            text = str(self.loaded.tokenizer.decode(result.token_ids, skip_special_tokens=True))
            for stop in filter(None, requests[index].stop_texts):
                text = text.partition(stop)[0]
            yield index, text

    def _job(
        self,
        index: int,
        context_ids: tuple[int, ...],
        stop_ids: tuple[int, ...],
        new_tokens: int,
        forced: Continuation | None = None,
    ) -> Request:
        context_ids = self._fitting(context_ids, new_tokens)
        compress_at = max(1, len(context_ids) - self.question_tokens)
        arm = self._arm(compress_at)
        digest = hashlib.sha256(f"{self.seed}|{context_ids}".encode()).digest()
        return Request(
            index=index,
            input_ids=context_ids,
            compress_at=compress_at,
            gold_ids=forced.continuation_ids if forced else (),
            arms=(arm,),
            reference=arm,  # no KL is asked for, so no further row is spent on the full cache
            stop_ids=stop_ids,
            max_new_tokens=new_tokens,
            seed=int.from_bytes(digest[:4], "big") >> 1,
        )

    def _fitting(self, context_ids: tuple[int, ...], new_tokens: int) -> tuple[int, ...]:
        """The context's last tokens, as many as fit; the harness cuts on the left, and so do we."""
        room = self.max_tokens - new_tokens
        if self.loaded.max_prompt_tokens is not None:
            room = min(room, self.loaded.max_prompt_tokens)
        if room < 1:
            raise ModelError(
                f"{new_tokens} new tokens leave no room for a context in the {self.max_tokens} tokens of model "
                f"{self.loaded.name}: ask for fewer (max_gen_toks) or use a model with a longer context"
            )
        self.tally.truncated += len(context_ids) > room
        return context_ids[-room:]

    def _arm(self, n_tokens: int) -> Arm:
        try:
            in_effect(self.policy).layer_budgets(n_tokens, model_shape(self.loaded)["n_layers"])
        except BudgetError as error:
            if self.short_context == "refuse":
                raise BudgetError(f"{error}; or keep such contexts whole with short_context=full") from error
            self.tally.kept_whole += 1
            return Arm.of(Full())
        return Arm.of(self.policy)

    def _opening(self, stop_texts: tuple[str, ...]) -> tuple[int, ...]:
        """Tokens whose text begins with a stop text: at these the engine may stop without losing a character."""
        stop_texts = tuple(filter(None, stop_texts))
        if stop_texts not in self._spellings:
            self._spellings[stop_texts] = tuple(i for i, text in enumerate(self._texts) if text.startswith(stop_texts))
        return self._spellings[stop_texts]

    @cached_property
    def _texts(self) -> list[str]:
        """What each token adds to a text (some tokenizers drop the space of a token that stands alone)."""
        tokenizer = self.loaded.tokenizer
        before = tokenizer.encode("a", add_special_tokens=False)
        start = len(str(tokenizer.decode(before)))
        texts = tokenizer.batch_decode([[*before, token] for token in range(len(tokenizer))])
        return [str(text)[start:] for text in texts]

    def _run(self, jobs: list[Request]) -> Iterator[tuple[int, Answer]]:
        for result in self.engine.run(self.loaded, jobs):
            if isinstance(result, SampleFailure):
                raise ModelError(f"request {result.index} cannot be answered: {result.reason}")
            self.tally.requests += 1
            self.tally.kept_slots += sum(result.slots_per_layer)
            self.tally.full_slots += result.full_slots
            yield result.index, result
