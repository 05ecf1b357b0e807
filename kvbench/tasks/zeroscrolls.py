"""ZeroSCROLLS: ten tasks whose rows hold the complete prompt.

    python -m kvbench task=zeroscrolls/quality data.root=DIR
    python -m kvbench task=zeroscrolls/quality task.split=test task.export_only=true

The second command makes predictions for rows without references; `python -m kvbench.export zeroscrolls RUN` writes the
leaderboard's CSV from them. What differs between the tasks is in `kvbench.metrics.zeroscrolls.TASKS`.

Source: hub data set tau/zero_scrolls; Shaham et al. 2023, arXiv:2305.14196; experiments/hf/run_hf_model.py of
tau-nlp/zero_scrolls for the truncation.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Annotated, Any, Literal

from kvbench.errors import ConfigError, DataError, printable
from kvbench.fields import Within
from kvbench.metrics.zeroscrolls import PREFIX, TASKS
from kvbench.tasks.base import Sample, Task
from kvbench.tasks.data import Row, named_folders, open_member, parse_jsonl, zeroscrolls_folder

logger = logging.getLogger(__name__)

SPLITS = ("validation", "test")
INDICES = ("document_start_index", "document_end_index", "query_start_index", "query_end_index")


def config_nodes() -> dict[str, dict[str, Any]]:
    """What Hydra composes for each task; "_base" is what all of them share."""
    base = {
        "_target_": f"{__name__}.ZeroScrolls", "name": f"{PREFIX}${{.task}}", "limit": None, "split": "validation",
        "export_only": False, "chat": True, "root": "${data.root}",
    }  # fmt: skip
    own = {name: {"task": name, "metric": t.metric, "max_new_tokens": t.max_new_tokens} for name, t in TASKS.items()}
    return {"_base": base} | {name: {**base, **fields} for name, fields in own.items()}


@dataclass(frozen=True, kw_only=True)
class ZeroScrolls(Task):
    """One ZeroSCROLLS task.

    Attributes:
        max_new_tokens: generation limit in tokens; the official runners reserve as much for the output.
        split: "validation" (about 20 rows, meant for a look) or "test".
        export_only: take rows without references too; they are asked and exported, never scored.
        root: folder with `<task>/<split>.jsonl` or `<task>.zip`; None for `$KVBENCH_DATA`, else the fetched data.
    """

    task: str
    metric: str
    max_new_tokens: Annotated[int, Within(1)]
    split: Literal["validation", "test"] = "validation"
    export_only: bool = False
    chat: bool = True
    root: str | None = None

    @property
    def dataset(self) -> str:
        """Name in records and tables."""
        return f"{PREFIX}{self.task}"

    def all_samples(self) -> list[Sample]:
        """The split's questions in first-seen order; rows with one id are one question with several references."""
        if self.task not in TASKS:
            raise ConfigError(f"ZeroSCROLLS has no task.task={self.task!r}: give one of {', '.join(TASKS)}")
        self._check_splits()
        samples: dict[str, Sample] = {}
        with self._open(self.split) as (file, name):
            for line_number, fields in parse_jsonl(file, name):
                sample = self._sample(Row(fields, f"{name}:{line_number}"))
                first = samples.setdefault(sample.id, sample)
                if first is sample:
                    continue
                if first.prompt != sample.prompt:
                    where, known = f"{name}:{line_number}", printable(sample.id)
                    logger.warning("%s: id %s again with another input; the first counts", where, known)
                samples[sample.id] = replace(first, answers=(*first.answers, *sample.answers))
        if (n_unscored := sum(not sample.answers for sample in samples.values())) and not self.export_only:
            raise DataError(
                f"{name}: {n_unscored} of {len(samples)} rows have no output to score against; set "
                "task.split=validation, or task.export_only=true to make leaderboard predictions without scoring them"
            )
        return list(samples.values())

    def _sample(self, row: Row) -> Sample:
        prompt = row.text("input")
        answers = () if row.any("output") is None else (row.text("output"),)
        indices = [row.count(field) for field in INDICES]
        if max(indices) > len(prompt) or indices[0] > indices[2]:
            raise DataError(
                f"{row.where}: {', '.join(INDICES)} are {indices}; they must lie within the {len(prompt)} characters "
                "of the input, the query after the document"
            )
        return Sample(
            id=row.text("id"), dataset=self.dataset, prompt=prompt, answers=answers, metric=self.metric,
            max_new_tokens=self.max_new_tokens, chat=self.chat, question_start=indices[2], truncation="document_end",
            meta={
                "task": self.task, "split": self.split, "query_start": indices[2], "query_end": indices[3],
                "document_end": indices[1], "truncation_separator": row.text("truncation_seperator"),
            },
        )  # fmt: skip

    @contextlib.contextmanager
    def _open(self, split: str) -> Iterator[tuple[IO[bytes], str]]:
        """The split's rows, open for reading, and what errors call them."""
        folders = named_folders(self.root) or (zeroscrolls_folder(self.task),)
        places = [(folder / self.task / f"{split}.jsonl", folder / f"{self.task}.zip") for folder in folders]
        path, archive = next((place for place in places if place[0].is_file() or place[1].is_file()), places[0])
        if archive.is_file() and not path.is_file():
            with open_member(archive, (f"{self.task}/{split}.jsonl", f"{split}.jsonl")) as (member, name):
                yield member, f"{archive}/{name}"
            return
        try:
            with path.open("rb") as file:
                yield file, str(path)
        except FileNotFoundError:
            raise DataError(
                f"neither {path} nor {archive} exists; set data.root=DIR (or KVBENCH_DATA) to the folder of the "
                f"ZeroSCROLLS files, or neither and run `python -m kvbench.fetch zeroscrolls/{self.task}`"
            ) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None

    def _check_splits(self) -> None:
        """Detect a release in which both splits are one file, as in the qasper.zip of 2025 (lm-eval issue 1083)."""
        digests = set()
        for split in SPLITS:
            try:
                with self._open(split) as (file, _):
                    digest = hashlib.sha256()
                    while piece := file.read(2**20):
                        digest.update(piece)
                    digests.add(digest.digest())
            except DataError:
                if split == self.split:
                    raise
                return
        if len(digests) == 1:
            message = f"{self.task}: validation and test are the same file, a known defect of the 2025 qasper.zip"
            if self.split == "test":
                raise DataError(f"{message}; its test questions are missing, so use another release of the data")
            logger.warning("%s; the rows are used as validation", message)
