"""Needle in a haystack: facts that end in a number, hidden in real prose; one of them is asked for.

After Kamradt, "Needle In A Haystack" (2023, https://github.com/gkamradt/LLMTest_NeedleInAHaystack): a grid of lengths
and depths that makes a heat map. With several facts (as in the multi-key task of RULER, Hsieh et al. 2024,
arXiv:2404.06654) finding any number is not enough. The hay is described in `prose.py`, the facts stand in `facts.py`.

    python -m kvbench task=niah 'task.lengths=[512,1024,2048]' 'task.depths=[0,0.25,0.5,0.75,1]' task.n_facts=1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.errors import ConfigError
from kvbench.tasks.base import Sample, Task
from kvbench.tasks.synthetic.facts import FACTS
from kvbench.tasks.synthetic.filler import PROSE_CHARACTERS_PER_TOKEN, characters_for, generator_for, hide
from kvbench.tasks.synthetic.prose import prose_filler

INSTRUCTION = "Some numbers are hidden in this text. Remember them: you will be asked for one of them at the end."


@dataclass(frozen=True, kw_only=True)
class NeedleInHaystack(Task):
    """A grid of lengths and depths, `samples_per_cell` questions each.

    Attributes:
        lengths: prompt lengths in tokens, at the fixed ratio of `filler.py`.
        depths: places of the fact that is asked for, 0 at the beginning of the text, 1 at its end.
        samples_per_cell: samples for each pair of length and depth.
        n_facts: facts in the text, the asked one included; the others stand at random depths.
        digits: digits of a number.
        seed: seed of hay, facts and the places of the others.
    """

    name: str = "niah"
    lengths: Sequence[int] = (1024,)
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples_per_cell: int = 4
    n_facts: int = 4
    digits: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse parameters that make no prompt.

        Raises:
            ConfigError: if a number is out of range.
        """
        if not 1 <= self.n_facts <= len(FACTS):
            raise ConfigError(f"n_facts={self.n_facts}: ask for 1 to {len(FACTS)}")
        if self.digits < 2:
            raise ConfigError(
                f"digits={self.digits}: a number needs at least 2, as the first may come from the uncompressed prompt"
            )
        if self.samples_per_cell < 1:
            raise ConfigError(f"samples_per_cell={self.samples_per_cell}: ask for at least 1")

    def all_samples(self) -> list[Sample]:
        """All samples; the first ones cover the whole grid once, so that a `limit` thins it evenly."""
        return [
            self._sample(length_tokens, depth, repeat)
            for repeat in range(self.samples_per_cell)
            for length_tokens in self.lengths
            for depth in self.depths
        ]

    def _sample(self, length_tokens: int, depth: float, repeat: int) -> Sample:
        sample_id = f"{self.name}-{self.n_facts}x{self.digits}-{length_tokens}-{depth:g}-{self.seed}-{repeat}"
        generator = generator_for(sample_id)
        facts = generator.sample(FACTS, self.n_facts)
        numbers = [str(generator.randrange(10 ** (self.digits - 1), 10**self.digits)) for _ in facts]
        depths = [depth, *(generator.random() for _ in facts[1:])]
        needles = [f"{fact.statement} {number}." for fact, number in zip(facts, numbers, strict=True)]
        fixed_characters = len(INSTRUCTION) + sum(len(needle) + 1 for needle in needles) + len(facts[0].question) + 4
        target_characters = characters_for(length_tokens, PROSE_CHARACTERS_PER_TOKEN)
        hay = prose_filler(target_characters - fixed_characters, generator)
        context = f"{INSTRUCTION}\n\n{hide(hay, list(zip(depths, needles, strict=True)))}\n\n"
        return Sample(
            id=sample_id,
            dataset=self.name,
            prompt=context + facts[0].question,
            answers=(numbers[0],),
            metric="needle",
            max_new_tokens=self.digits + 4,
            answer_prefix=facts[0].statement,
            question_start=len(context),
            meta={"length_tokens": length_tokens, "depth": depth, "other_numbers": numbers[1:]},
        )
