"""Strands: the token-by-token plan of one row of a decode batch.

A strand feeds some tokens that are known beforehand (the question under `before_question`, the gold answer of a forced
strand) and then, if it generates, whatever the model chooses. What the device needs is two integer tables, made here,
so that the decode loop itself never asks the host what to do next:

    feed[step]    token to feed at this step, or -1: feed what was chosen last
    target[step]  token whose likelihood under this step's logits is wanted, or -1
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.runtime.engine import Arm, Job


@dataclass
class Strand:
    """One row's plan.

    Attributes:
        job: the job it belongs to.
        arm: its arm.
        forced: whether it follows the gold answer (else it generates).
        feed: tokens fed at the first steps; after them a generating strand feeds its own choices.
        targets: per step, the token whose likelihood is wanted, or -1.
        n_steps: decode steps the strand needs at most.
        first_choice: tokens of the answer that the prefill has already chosen (after_question), in the output.
        answer_step: step whose choice is the first answer token that decoding itself produces.
        row: the strand's row in the cache.
    """

    job: Job
    arm: Arm
    forced: bool
    feed: list[int]
    targets: list[int]
    n_steps: int
    first_choice: list[int]
    answer_step: int
    row: int = -1

    def answer(self, chosen: list[int]) -> tuple[list[int], str] | None:
        """The answer among the tokens chosen so far.

        Args:
            chosen: token chosen at each step so far.

        Returns:
            (tokens without the stop token, "stop" or "length"), or None if the strand has to go on.
        """
        tokens = self.first_choice + chosen[self.answer_step :]
        stops = set(self.job.stop_ids)
        for position, token in enumerate(tokens[: self.job.max_new_tokens]):
            if token in stops and position >= self.job.min_new_tokens:
                return tokens[:position], "stop"
        if len(tokens) >= self.job.max_new_tokens:
            return tokens[: self.job.max_new_tokens], "length"
        return None


def generating_strand(job: Job, arm: Arm, first_token: int | None) -> Strand:
    """A strand that generates.

    Args:
        job: the job.
        arm: the arm.
        first_token: the token the prefill chose if the whole prompt was prefilled, else None.
    """
    question = list(job.question_ids)
    if question:
        n_steps = len(question) + job.max_new_tokens - 1
        return Strand(job, arm, False, question, [], n_steps, [], len(question) - 1)
    assert first_token is not None
    return Strand(job, arm, False, [first_token], [], job.max_new_tokens - 1, [first_token], 0)


def forced_strand(job: Job, arm: Arm) -> Strand:
    """A strand that follows the gold answer; needs at least one gold token."""
    question, gold = list(job.question_ids), list(job.gold_ids)
    feed = question + gold[:-1]
    # Without a question to read, the prefill's logits have already judged gold[0].
    targets = [-1] * (len(question) - 1) + gold if question else gold[1:]
    return Strand(job, arm, True, feed, targets, len(feed), [], 0)


def reference_rows(strands: list[Strand]) -> list[int]:
    """For each strand the index of its job's reference arm among strands of the same kind; its own index if none."""
    references = {(s.job.index, s.forced): i for i, s in enumerate(strands) if s.arm.key == s.job.reference.key}
    return [references.get((s.job.index, s.forced), i) for i, s in enumerate(strands)]
