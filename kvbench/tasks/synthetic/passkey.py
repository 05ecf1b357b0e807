"""Pass key retrieval: one number in a dull, repetitive text, asked for at the end.

After the pass-key test of Mohtashami and Jaggi, "Landmark Attention" (2023, arXiv:2305.16300), with our own filler and
wording. The assistant's turn is opened with "The pass key is the number", so the first token the model writes, which
the uncompressed prefill predicts, is a space or a digit; all others come from the compressed cache.

    python -m kvbench task=passkey task.lengths=[1024,4096] task.depths=[0.1,0.5,0.9] task.samples_per_cell=10
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.tasks.base import Sample
from kvbench.tasks.synthetic.filler import (
    DULL_CHARACTERS_PER_TOKEN,
    characters_for,
    dull_filler,
    generator_for,
    hide,
)
from kvbench.tasks.synthetic.grid import Digits, NeedleGrid

INSTRUCTION = (
    "There is a pass key hidden in the text below. Find it and remember it, you will be asked for it at the end."
)
NEEDLE = "The pass key is the number {key}. Remember it."
QUESTION = "What is the pass key?"
ANSWER_PREFIX = "The pass key is the number"


@dataclass(frozen=True, kw_only=True)
class PassKey(NeedleGrid):
    """Random keys of `digits` digits, each hidden at its depth in dull filler."""

    name: str = "passkey"
    digits: Digits = 6

    def _sample(self, length_tokens: int, depth: float, repeat: int) -> Sample:
        sample_id = f"{self.name}-{length_tokens}-{depth:g}-{self.seed}-{repeat}"
        generator = generator_for(sample_id, self.digits)
        key = str(generator.randrange(10 ** (self.digits - 1), 10**self.digits))
        needle = NEEDLE.format(key=key)
        target_characters = characters_for(length_tokens, DULL_CHARACTERS_PER_TOKEN)
        fixed_characters = len(INSTRUCTION) + len(needle) + len(QUESTION) + 5
        filler = dull_filler(target_characters - fixed_characters, start=generator.randrange(7))
        context = f"{INSTRUCTION}\n\n{hide(filler, [(depth, needle)])}\n\n"
        return Sample(
            id=sample_id,
            dataset=self.name,
            prompt=context + QUESTION,
            answers=(key,),
            metric="needle",
            max_new_tokens=self.digits + 4,
            answer_prefix=ANSWER_PREFIX,
            question_start=len(context),
            meta={"length_tokens": length_tokens, "depth": depth},
        )
