"""LongBench v1 and LongBench-E: 21 data sets (13 with an `_e` twin), asked as the official `pred.py` asks them.

    python -m kvbench task=longbench/qasper data.root=DIR data.official=DIR

What differs between the data sets is in `kvbench.metrics.longbench.DATASETS`. Prompt templates and generation lengths
are the official configuration files, checked against pinned SHA-256 sums and never retyped, so their oddities survive.

Source: THUDM/LongBench at `OFFICIAL_COMMIT`, LongBench/pred.py; Bai et al. 2024, arXiv:2308.14508.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, DataError
from kvbench.metrics.longbench import DATASETS, ROWS, base_dataset
from kvbench.paths import user_path
from kvbench.tasks.base import Sample, Task
from kvbench.tasks.data import OFFICIAL_COMMIT, OFFICIAL_SHA256, Row, longbench_folder, named_folders, read_rows

FETCH = "python -m kvbench.fetch longbench"


def config_nodes() -> dict[str, dict[str, Any]]:
    """What Hydra composes for each data set; "_base" is what all of them share."""
    base = {"_target_": f"{__name__}.LongBench", "name": "${.dataset}", "limit": None}
    base |= {"root": "${data.root}", "official": "${data.official}"}
    return {"_base": base} | {dataset: {**base, **dataset_fields(dataset)} for dataset in ROWS}


def dataset_fields(dataset: str) -> dict[str, Any]:
    """The fields of `LongBench` that the table decides."""
    known = DATASETS[base := base_dataset(dataset)]
    return {
        "dataset": dataset, "language": known.language, "category": known.category, "metric": known.metric,
        "chat": known.chat, "first_line_only": known.first_line_only, "stop_newline": base == "samsum",
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LongBench(Task):
    """One LongBench data set.

    Attributes:
        dataset: official id, with `_e` for the LongBench-E sample of it.
        language: "en" or "zh"; decides nothing here, groups tables, as does `category`.
        first_line_only: only the first line of a prediction is scored; the metrics apply the rule by data set name.
        stop_newline: generation also stops at a newline token, after at least one token (samsum).
        root: folder with the rows, `<dataset>.jsonl` or .parquet, or a folder `data` of them; of several, joined as in
            PATH, the first that has them; None for `$KVBENCH_DATA`, else the fetched data.
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

    def all_samples(self) -> list[Sample]:
        """All rows of the data set in file order."""
        if self.first_line_only != (self.category == "few-shot"):
            problem = f"first_line_only={self.first_line_only} for {self.dataset}, category {self.category!r}"
            rule = "the official scorer takes the first line on few-shot data sets and on no others"
            raise ConfigError(f"{problem}: {rule}")
        prompts, lengths = official_config(self._official_folder())
        base = base_dataset(self.dataset)
        if base not in prompts:
            raise ConfigError(f"LongBench has no data set {self.dataset!r}; it has {', '.join(prompts)}")
        path = self._rows_file()
        samples: dict[str, Sample] = {}
        for line_number, fields in read_rows(path):
            row = Row(fields, f"{path}:{line_number}")
            sample = self._sample(row, prompts[base], lengths[base])
            if sample.id in samples:
                line = list(samples).index(sample.id) + 1
                problem = f"{row.where}: _id {sample.id!r} was seen in line {line}"
                raise DataError(f"{problem}; every row needs its own (were two files joined?)")
            samples[sample.id] = sample
        return list(samples.values())

    def _sample(self, row: Row, template: str, max_new_tokens: int) -> Sample:
        context, question, answers = row.text("context"), row.text("input"), row.texts("answers")
        classes = () if row.any("all_classes") is None else row.texts("all_classes")
        row_dataset = row.text("dataset")
        if not answers:
            raise DataError(f"{row.where}: field 'answers' is empty; a row without a reference cannot be scored")
        if self.metric == "classification" and not classes:
            problem = f"field 'all_classes' is empty, but {self.dataset} is scored by classification"
            raise DataError(f"{row.where}: {problem}")
        if base_dataset(row_dataset) != base_dataset(self.dataset):
            raise DataError(f"{row.where}: this is a row of {row_dataset!r}, expected {self.dataset!r}")
        prompt, question_start = render(template, context, question)
        return Sample(
            id=row.text("_id"), dataset=self.dataset, prompt=prompt, answers=answers, metric=self.metric,
            max_new_tokens=max_new_tokens, chat=self.chat, question_start=question_start, all_classes=classes,
            stop_newline=self.stop_newline, min_new_tokens=1 if self.stop_newline else 0, truncation="middle",
            length=row.count("length"),
            meta={
                "category": self.category, "language": self.language, "row_language": row.text("language"),
                "first_line_only": self.first_line_only,
            },
        )  # fmt: skip

    def _rows_file(self) -> Path:
        folders = named_folders(self.root) or (longbench_folder(),)
        names = f"{self.dataset}.jsonl", f"{self.dataset}.parquet"
        candidates = [folder / place / name for folder in folders for name in names for place in ("", "data")]
        if (found := next((path for path in candidates if path.is_file()), None)) is None:
            others = ", nor in another" * (len(folders) > 1)
            raise DataError(
                f"neither {candidates[0]} nor {candidates[1]} exists{others}; set data.root=DIR (or KVBENCH_DATA) to "
                f"the folder of the LongBench files, or neither and run `{FETCH}`"
            )
        return found

    def _official_folder(self) -> Path:
        if self.official is not None:
            return user_path(self.official)
        beside = (place for named in named_folders(self.root) for place in (named, named / "config"))
        found = next((folder for folder in beside if (folder / "dataset2prompt.json").is_file()), None)
        return found or longbench_folder() / "config"


def official_config(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Prompt template and generation limit in tokens of every LongBench data set, by id without `_e`."""
    found = []
    for file in ("dataset2prompt.json", "dataset2maxlen.json"):
        path = folder / file
        try:
            with path.open("rb") as opened:
                content = opened.read(2**20)  # they have a few thousand; the checksum tells if there is more
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}); set data.official=DIR to the folder of LongBench's "
                f"official configuration, or run `{FETCH}`"
            ) from None
        if (digest := hashlib.sha256(content).hexdigest()) != OFFICIAL_SHA256[file]:
            raise DataError(
                f"{path} has SHA-256 {digest[:12]}..., expected {OFFICIAL_SHA256[file][:12]}... (LongBench at "
                f"{OFFICIAL_COMMIT[:12]}); scores with other prompts are not comparable: run `{FETCH}`"
            )
        found.append(json.loads(content))
    return found[0], found[1]


def render(template: str, context: str, question: str) -> tuple[str, int | None]:
    """The template filled as officially (by `str.format`, so braces in the data are safe), and `question_start`.

    That is right after the context; None where the row has no question or the template asks it before the context.
    """
    before, _, after = template.partition("{context}")
    prompt = template.format(context=context, input=question)
    if not question or "{input}" not in after:
        return prompt, None
    return prompt, len(before.format(input=question)) + len(context)
