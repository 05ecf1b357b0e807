"""A small set of documents that ships with the package, for question answering and summaries without any download.

Twelve fictional texts of about 230 words, written for this project, each with four questions and a summary: 60 rows in
the format of LongBench rows (`mini.jsonl`), scored like LongBench's with F1 and ROUGE-L. The prompts are our own.
A question follows the text and the document's other three questions with their answers, which show a small model how
short an answer is meant to be. The texts are far shorter than a benchmark's: this task shows the machinery at work, it
ranks nothing.

    python -m kvbench task=mini task.kind=qa task.limit=12
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from kvbench.tasks.base import Sample, Task
from kvbench.tasks.data import read_jsonl


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
    return (row for _, row in read_jsonl(Path(__file__).with_suffix(".jsonl")))


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
