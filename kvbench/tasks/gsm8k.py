"""GSM8K: 1,319 word problems, each solved step by step in free text; what eviction while decoding is judged on.

    python -m kvbench task=gsm8k task.limit=100 method=h2o budget=0.5

The prompt is short and the answer long, so a method shows what it does while it decodes. Asked zero-shot, in the chat
frame of the model and in our own words: GSM8K has no official prompt for chat models, so scores compare within a table,
not with papers that show examples. Nothing but the question is there: `protocol.compress=before_question` is refused.

Source: openai/grade-school-math at `COMMIT` (MIT); Cobbe et al. 2021, arXiv:2110.14168.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from kvbench.errors import DataError
from kvbench.fields import Within
from kvbench.tasks.base import Sample, Task
from kvbench.tasks.data import Row, Source, fetched, named_folders, read_rows, web_file

COMMIT = "3101c7d5072418e28b9008a6636bde82a006892c"
URL = f"https://raw.githubusercontent.com/openai/grade-school-math/{COMMIT}/grade_school_math/data/test.jsonl"
SHA256 = "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
REQUEST = 'Solve this step by step. Then write the result, a single number, on a last line that begins with "Answer:".'
_CALCULATION = re.compile(r"<<[^<>]*>>")  # the data's notes for a calculator, which no model is to write


def gsm8k_folder() -> Path:
    """Folder with the official `test.jsonl`, fetched on first use; `DataError` if that is not possible."""

    def write(folder: Path) -> Source:
        (folder / "test.jsonl").write_bytes(web_file(URL, SHA256))
        return {"url": URL, "commit": COMMIT, "sha256": SHA256}

    return fetched({"url": URL, "sha256": SHA256}, write, "gsm8k", "data.root=DIR")


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Task):
    """The test problems.

    Attributes:
        max_new_tokens: generation limit in tokens, for steps and result together.
        root: folder with `gsm8k/test.jsonl` or `test.jsonl` (fields `question`, `answer`); None for `$KVBENCH_DATA`,
            else the fetched file.
    """

    name: str = "gsm8k"
    max_new_tokens: Annotated[int, Within(1)] = 512
    root: str | None = None

    def all_samples(self) -> list[Sample]:
        """All problems in file order, numbered from 1; the gold answer is the worked solution with its result."""
        path = self._rows_file()
        return [self._sample(number, Row(fields, f"{path}:{number}")) for number, fields in read_rows(path)]

    def _sample(self, number: int, row: Row) -> Sample:
        solution = _CALCULATION.sub("", row.text("answer"))
        if not re.search(r"#### *-?[\d,.]*\d", solution):
            raise DataError(f"{row.where}: field 'answer' has no number after ####: a row without one cannot be scored")
        return Sample(
            id=f"test-{number}", dataset="gsm8k", prompt=f"{row.text('question')}\n\n{REQUEST}", answers=(solution,),
            metric="last_number", max_new_tokens=self.max_new_tokens,
        )  # fmt: skip

    def _rows_file(self) -> Path:
        folders = named_folders(self.root) or (gsm8k_folder(),)
        candidates = [folder / name for folder in folders for name in ("gsm8k/test.jsonl", "test.jsonl")]
        if (found := next(filter(Path.is_file, candidates), None)) is None:
            raise DataError(
                f"neither {candidates[0]} nor {candidates[1]} exists; set data.root=DIR (or KVBENCH_DATA) to the "
                "folder of the GSM8K file, or neither and run `python -m kvbench.fetch gsm8k`"
            )
        return found
