"""Needle in a haystack: facts that end in a number, hidden in real prose; one of them is asked for.

After Kamradt, "Needle In A Haystack" (2023, https://github.com/gkamradt/LLMTest_NeedleInAHaystack): a grid of lengths
and depths that makes a heat map. With several facts (as in the multi-key task of RULER, Hsieh et al. 2024,
arXiv:2404.06654) finding any number is not enough. The hay is described in `prose.py`, the facts stand in `facts.py`.

    python -m kvbench task=niah 'task.lengths=[512,1024,2048]' 'task.depths=[0,0.25,0.5,0.75,1]' task.n_facts=1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from kvbench.fields import Within
from kvbench.tasks.base import Sample
from kvbench.tasks.synthetic.facts import FACTS
from kvbench.tasks.synthetic.filler import PROSE_CHARACTERS_PER_TOKEN, characters_for, generator_for, hide
from kvbench.tasks.synthetic.grid import NeedleGrid
from kvbench.tasks.synthetic.prose import prose_filler

INSTRUCTION = "Some numbers are hidden in this text. Remember them: you will be asked for one of them at the end."


@dataclass(frozen=True, kw_only=True)
class NeedleInHaystack(NeedleGrid):
    """Facts at random depths, one of them at the depth of the cell and asked for.

    Attributes:
        n_facts: facts in the text, the asked one included; the others stand at random depths.
    """

    name: str = "niah"
    n_facts: Annotated[int, Within(1, len(FACTS))] = 4

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
