"""What a task is: a name, samples, and the metric each sample is scored with; and a mixture of tasks.

Sample ids and texts depend on the task's parameters and seed alone, so that a resumed run, a second machine or another
shard asks the same questions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from kvbench.errors import ConfigError
from kvbench.fields import Within, check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "Callable[[], PreTrainedTokenizerBase]"
"""Gives the tokenizer of the model to be asked; called by tasks that need it alone, for it may have to be fetched."""


def no_tokenizer() -> PreTrainedTokenizerBase:
    """Stands where no model is known; `ConfigError` for a task that needs one."""
    raise ConfigError("this task is made for a model's tokenizer, and none is given: call samples(tokenizer)")


@dataclass(frozen=True)
class Sample:
    """One question with everything needed to ask and score it.

    Attributes:
        id: unique within the data set; stable between runs.
        dataset: name used in records and tables ("qasper", "passkey").
        prompt: the whole user message, before truncation and chat wrapper.
        answers: reference answers; the first one is the gold text of the likelihood and KL measurements.
        answer_prefix: text that opens the assistant's turn (part of the prompt, never scored).
        question_start: character index in `prompt` from which the question (not the context) runs to the end, or None
            where a task cannot tell; needed for `protocol.compress=before_question`.
        all_classes: label set of classification tasks.
        stop_newline: stop at a newline token (LongBench's samsum).
        min_new_tokens: tokens before which no stop is allowed.
        truncation: what to cut when the prompt is too long: "middle" (LongBench), "document_end" (ZeroSCROLLS, needs
            `query_start` and `truncation_separator` in `meta`) or "refuse".
        length: the data set's own length field, if any.
        meta: further fields a scorer or exporter needs.
    """

    id: str
    dataset: str
    prompt: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    chat: bool = True
    answer_prefix: str = ""
    question_start: int | None = None
    all_classes: tuple[str, ...] = ()
    stop_newline: bool = False
    min_new_tokens: int = 0
    truncation: str = "refuse"
    length: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A source of samples; subclasses are frozen dataclasses whose fields are the task's configuration.

    Attributes:
        name: the task's name in configuration and tables.
        limit: use only the first `limit` samples; None for all. Not part of a run's identity.
    """

    name: str
    limit: Annotated[int, Within(1)] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "task")

    @abstractmethod
    def all_samples(self) -> list[Sample]:
        """All samples in their fixed order; `DataError` if data is missing or malformed."""

    def samples_for(self, tokenizer: Tokenizer) -> list[Sample]:
        """The same for one model's tokenizer; a task whose texts depend on it answers here."""
        return self.all_samples()

    def samples(self, tokenizer: Tokenizer = no_tokenizer) -> list[Sample]:
        """The samples to run; `ConfigError` if two of all share data set and id, as their records would."""
        samples = self.samples_for(tokenizer)
        seen: set[tuple[str, str]] = set()
        for sample in samples:
            if (sample.dataset, sample.id) in seen:
                remedy = "give other parameters (or, in a mixture, other names)"
                raise ConfigError(f"sample {sample.id} occurs twice in task {self.name}: {remedy}")
            seen.add((sample.dataset, sample.id))
        return samples[: self.limit]


@dataclass(frozen=True, kw_only=True)
class Mix(Task):
    """The samples of several tasks, one of each in turn, so that a `limit` keeps the mixture.

    Attributes:
        tasks: the parts by any key (the key makes them addressable on the command line); a part's own `limit` holds.
    """

    name: str = "mix"
    tasks: Mapping[str, Task] = field(default_factory=dict)

    def all_samples(self) -> list[Sample]:
        """The parts' samples in turn; `ConfigError` if there are no parts."""
        return self.samples_for(no_tokenizer)

    def samples_for(self, tokenizer: Tokenizer) -> list[Sample]:
        """The same, with parts that need the tokenizer."""
        if not self.tasks:
            raise ConfigError(f"task {self.name} mixes 0 tasks: name at least 1 in task.tasks")
        rounds = zip_longest(*(task.samples(tokenizer) for task in self.tasks.values()))
        return [sample for turn in rounds for sample in turn if sample is not None]
