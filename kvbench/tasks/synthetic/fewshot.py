"""Many-shot classification: words sorted into classes by examples alone, then one word that no example showed.

With `labels=invented` each class is named by a made-up word, dealt anew for every sample, so the model must read the
rule from its cache; with `labels=categories` the classes carry their real names and the cache matters less. Labels are
quoted: the first token of every answer is then the same (SmolLM2 writes ` "`), so the uncompressed prefill, which
predicts that token, cannot decide a sample.

    python -m kvbench task=fewshot task.labels=categories task.n_classes=6 'task.lengths=[2048]'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Literal

from kvbench.fields import Seed, Within
from kvbench.tasks.base import Sample, Task
from kvbench.tasks.synthetic.filler import LengthTokens, characters_for, check_total, generator_for
from kvbench.tasks.synthetic.words import CATEGORIES

CHARACTERS_PER_TOKEN = {"invented": 2.02, "categories": 2.7}
ANSWER_PREFIX = " ->"
INVENTED = ("blorn", "cavik", "dupra", "fesk", "gorp", "hilto", "mavu", "plim", "rozz", "zent")
MAX_NEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class FewShot(Task):
    """Lists of `word -> label` lines that end in a word without a label.

    Attributes:
        lengths: prompt lengths in tokens, at the fixed ratios of this module.
        samples_per_length: samples for each length.
        n_classes: classes in one sample, drawn from the categories of `words.py`; chance is 1 / n_classes.
        labels: "invented" (made-up words, dealt anew for every sample) or "categories" (the real names).
        seed: seed of words, classes, labels and their order.
    """

    name: str = "fewshot"
    lengths: Sequence[LengthTokens] = (1280,)
    samples_per_length: Annotated[int, Within(1, 1_000_000)] = 20
    n_classes: Annotated[int, Within(2, len(CATEGORIES))] = 4
    labels: Literal["invented", "categories"] = "invented"
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Refuse parameters that make no prompt, or more text than anybody reads.

        Raises:
            ConfigError: if a value is of the wrong type or out of range.
        """
        super().__post_init__()
        check_total(self.lengths, self.samples_per_length)

    def all_samples(self) -> list[Sample]:
        """All samples; the first ones cover every length once, so that a `limit` thins them evenly."""
        return [
            self._sample(length_tokens, repeat)
            for repeat in range(self.samples_per_length)
            for length_tokens in self.lengths
        ]

    def _sample(self, length_tokens: int, repeat: int) -> Sample:
        sample_id = f"{self.name}-{self.labels}-{self.n_classes}-{length_tokens}-{self.seed}-{repeat}"
        generator = generator_for(sample_id)
        label_of = self._draw_labels(generator)
        question_category = list(label_of)[generator.randrange(self.n_classes)]
        question_word = generator.choice(CATEGORIES[question_category])
        lines = [
            f"{word}{ANSWER_PREFIX} {label}\n"
            for category, label in label_of.items()
            for word in CATEGORIES[category]
            if word != question_word
        ]
        target_characters = characters_for(length_tokens, CHARACTERS_PER_TOKEN[self.labels])
        characters = target_characters - len(question_word + ANSWER_PREFIX)
        context = _repeat_shuffled(lines, characters, generator)
        return Sample(
            id=sample_id,
            dataset=self.name,
            prompt=context + question_word,
            answers=(label_of[question_category],),
            metric="first_word",
            max_new_tokens=MAX_NEW_TOKENS,
            chat=False,
            answer_prefix=ANSWER_PREFIX,
            question_start=len(context),
            stop_newline=True,
            meta={"length_tokens": length_tokens, "labels": list(label_of.values())},
        )

    def _draw_labels(self, generator: Random) -> dict[str, str]:
        """Categories of one sample and their labels, in quotation marks."""
        categories = generator.sample(sorted(CATEGORIES), self.n_classes)
        names = categories if self.labels == "categories" else generator.sample(INVENTED, self.n_classes)
        return {category: f'"{name}"' for category, name in zip(categories, names, strict=True)}


def _repeat_shuffled(lines: Sequence[str], characters: int, generator: Random) -> str:
    """All lines in random order, again and again in another order, until the next line would exceed `characters`."""
    text: list[str] = []
    used_characters = 0
    while True:
        for line in generator.sample(lines, len(lines)):
            used_characters += len(line)
            if used_characters > characters:
                return "".join(text)
            text.append(line)
