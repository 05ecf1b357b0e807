"""A small set of documents that ships with the package, for question answering and summaries without any download.

Twelve fictional texts of about 230 words, written for this project, each with four questions and a summary: 60 rows in
the format of LongBench rows (`data/mini.jsonl`), scored like LongBench's with F1 and ROUGE-L. The prompts are our own.
The texts are far shorter than a benchmark's: this task shows the machinery at work, it ranks nothing.

    python -m kvbench task=mini task.kind=qa task.limit=12
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError
from kvbench.tasks.base import Sample, Task
from kvbench.tasks.jsonl import read_jsonl

DATA = Path(__file__).parent / "data" / "mini.jsonl"
QUESTION = "Question: {input}\nAnswer with a few words taken from the text."
SUMMARY_REQUEST = "Summarise the text in four short sentences."
KINDS = {"qa": "mini_qa", "summary": "mini_summary"}


@dataclass(frozen=True, kw_only=True)
class Mini(Task):
    """Questions and summary requests about the bundled documents.

    Attributes:
        kind: "all", "qa" (48 questions, metric qa_f1) or "summary" (12 requests, metric rouge_l).
    """

    name: str = "mini"
    kind: str = "all"

    def __post_init__(self) -> None:
        """Refuse an unknown kind.

        Raises:
            ConfigError: if there is no such kind.
        """
        if self.kind != "all" and self.kind not in KINDS:
            raise ConfigError(f"kind={self.kind!r} is unknown; known are all, {', '.join(KINDS)}")

    def all_samples(self) -> list[Sample]:
        """One sample for each row, document by document.

        Raises:
            DataError: if the installed data file is missing or damaged.
        """
        return [_sample(row) for row in rows() if self.kind == "all" or row["dataset"] == KINDS[self.kind]]


def rows() -> Iterator[dict[str, Any]]:
    """The bundled rows in LongBench's format.

    Raises:
        DataError: if the installed data file is missing or damaged.
    """
    for _, row in read_jsonl(DATA):
        yield row


def _sample(row: dict[str, Any]) -> Sample:
    is_question = row["dataset"] == KINDS["qa"]
    context = f"Read this text.\n\n{row['context']}\n\n"
    return Sample(
        id=row["_id"],
        dataset=row["dataset"],
        prompt=context + (QUESTION.format(input=row["input"]) if is_question else SUMMARY_REQUEST),
        answers=tuple(row["answers"]),
        metric="qa_f1" if is_question else "rouge_l",
        max_new_tokens=20 if is_question else 96,
        answer_prefix="Answer:" if is_question else "",
        question_start=len(context),
        length=row["length"],
    )
