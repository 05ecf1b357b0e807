"""LongBench v1 and LongBench-E: 21 data sets (13 with an `_e` twin), asked as the official `pred.py` asks them.

    python -m kvbench task=longbench/qasper data.root=DIR data.official=DIR

Rows are the official JSONL files. Prompt templates and generation lengths are the official configuration files, checked
against pinned SHA-256 sums and never retyped, so their oddities (typos, trailing spaces) survive.

Source: THUDM/LongBench at `OFFICIAL_COMMIT`, LongBench/pred.py; Bai et al. 2024, arXiv:2308.14508.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, DataError
from kvbench.paths import user_path
from kvbench.tasks.base import Sample, Task
from kvbench.tasks.fetched import OFFICIAL_COMMIT, OFFICIAL_SHA256, longbench_folder
from kvbench.tasks.jsonl import any_field, count_field, read_jsonl, text_field, text_list_field

MAX_OFFICIAL_BYTES = 2**20  # the official files have a few thousand
FETCH = "python -m kvbench.fetch longbench"


@dataclass(frozen=True, kw_only=True)
class LongBench(Task):
    """One LongBench data set.

    Attributes:
        dataset: official id, with `_e` for the LongBench-E sample of it.
        language: "en" or "zh"; decides nothing here, groups tables.
        category: one of the six official categories; groups tables.
        metric: name of a metric in `kvbench.metrics`.
        chat: whether the model's chat wrapper goes around the prompt.
        first_line_only: only the first line of a prediction is scored; the metrics apply the rule by data set name.
        stop_newline: generation also stops at a newline token, after at least one token (samsum).
        root: folder with `<dataset>.jsonl` or `data/<dataset>.jsonl`; None for `$KVBENCH_DATA`, else the fetched data.
        official: folder with `dataset2prompt.json` and `dataset2maxlen.json`; None for beside the rows, else the
            fetched ones.
    """

    dataset: str
    language: str
    category: str
    metric: str
    chat: bool = True
    first_line_only: bool = False
    stop_newline: bool = False
    root: str | None = None
    official: str | None = None

    @property
    def base_dataset(self) -> str:
        """The id without `_e`: the key of prompts, lengths and metrics."""
        return self.dataset.removesuffix("_e")

    def all_samples(self) -> list[Sample]:
        """All rows of the data set in file order, as samples.

        Raises:
            ConfigError: if the data set is not one of LongBench's.
            DataError: if a file is missing, malformed or (official configuration) does not match its checksum.
        """
        if self.first_line_only != (self.category == "few-shot"):
            raise ConfigError(
                f"first_line_only={self.first_line_only} for {self.dataset}, category {self.category!r}: the official "
                "scorer takes the first line on few-shot data sets and on no others"
            )
        prompts, lengths = official_config(self._official_folder())
        if self.base_dataset not in prompts:
            raise ConfigError(f"LongBench has no data set {self.dataset!r}; it has {', '.join(prompts)}")
        path = self._rows_file()
        samples: list[Sample] = []
        first_line_of: dict[str, int] = {}
        for line_number, row in read_jsonl(path):
            where = f"{path}:{line_number}"
            sample = self._sample(row, where, prompts[self.base_dataset], lengths[self.base_dataset])
            if sample.id in first_line_of:
                raise DataError(
                    f"{where}: _id {sample.id!r} was seen in line {first_line_of[sample.id]}; every row needs its own "
                    "(were two files joined?)"
                )
            first_line_of[sample.id] = line_number
            samples.append(sample)
        return samples

    def _sample(self, row: dict[str, Any], where: str, template: str, max_new_tokens: int) -> Sample:
        context = text_field(row, "context", where)
        question = text_field(row, "input", where)
        answers = text_list_field(row, "answers", where)
        classes = () if any_field(row, "all_classes", where) is None else text_list_field(row, "all_classes", where)
        row_dataset = text_field(row, "dataset", where)
        if not answers:
            raise DataError(f"{where}: field 'answers' is empty; a row without a reference cannot be scored")
        if self.metric == "classification" and not classes:
            raise DataError(f"{where}: field 'all_classes' is empty, but {self.dataset} is scored by classification")
        if row_dataset.removesuffix("_e") != self.base_dataset:
            raise DataError(f"{where}: this is a row of {row_dataset!r}, expected {self.dataset!r}")
        prompt, question_start = render(template, context, question)
        return Sample(
            id=text_field(row, "_id", where),
            dataset=self.dataset,
            prompt=prompt,
            answers=answers,
            metric=self.metric,
            max_new_tokens=max_new_tokens,
            chat=self.chat,
            question_start=question_start,
            all_classes=classes,
            stop_newline=self.stop_newline,
            min_new_tokens=1 if self.stop_newline else 0,
            truncation="middle",
            length=count_field(row, "length", where),
            meta={
                "category": self.category,
                "language": self.language,
                "row_language": text_field(row, "language", where),
                "first_line_only": self.first_line_only,
            },
        )

    def _rows_file(self) -> Path:
        named = self.root or os.environ.get("KVBENCH_DATA")
        folder = user_path(named) if named else longbench_folder()
        candidates = (folder / f"{self.dataset}.jsonl", folder / "data" / f"{self.dataset}.jsonl")
        for path in candidates:
            if path.is_file():
                return path
        raise DataError(
            f"neither {candidates[0]} nor {candidates[1]} exists; set data.root=DIR (or KVBENCH_DATA) to the folder of "
            f"the LongBench files, or neither and run `{FETCH}`"
        )

    def _official_folder(self) -> Path:
        if self.official is not None:
            return user_path(self.official)
        named = self.root or os.environ.get("KVBENCH_DATA")
        beside = (user_path(named), user_path(named) / "config") if named else ()
        return (
            next((folder for folder in beside if (folder / "dataset2prompt.json").is_file()), None)
            or longbench_folder() / "config"
        )


def official_config(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Prompt template and generation limit in tokens of every LongBench data set, by id without `_e`.

    Args:
        folder: holds the official `dataset2prompt.json` and `dataset2maxlen.json`.

    Raises:
        DataError: if a file is missing or is not byte for byte the official one.
    """
    return json.loads(_verified(folder, "dataset2prompt.json")), json.loads(_verified(folder, "dataset2maxlen.json"))


def _verified(folder: Path, file: str) -> bytes:
    path = folder / file
    try:
        with path.open("rb") as opened:
            content = opened.read(MAX_OFFICIAL_BYTES)  # the checksum tells if there is more
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); set data.official=DIR to the folder of LongBench's official "
            f"configuration, or run `{FETCH}`"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != OFFICIAL_SHA256[file]:
        raise DataError(
            f"{path} has SHA-256 {found[:12]}..., expected {OFFICIAL_SHA256[file][:12]}... (LongBench at "
            f"{OFFICIAL_COMMIT[:12]}); scores with other prompts are not comparable: run `{FETCH}`"
        )
    return content


def render(template: str, context: str, question: str) -> tuple[str, int | None]:
    """Fill a template as the official code does (`str.format`, so braces in the data are safe).

    Args:
        template: has `{context}` and may have `{input}`.
        context: the row's `context`.
        question: the row's `input`, possibly empty.

    Returns:
        The prompt and the character index right after the context, from where the question runs to the end; None where
        the row has no question or the template asks it before the context.
    """
    before, _, after = template.partition("{context}")
    prompt = template.format(context=context, input=question)
    if not question or "{input}" not in after:
        return prompt, None
    return prompt, len(before.format(input=question)) + len(context)
