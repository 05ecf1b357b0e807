"""Write the two small data sets of this folder's tasks, from kvbench's own synthetic tasks; no download.

python docs/lm_eval/write_data.py     # kvbench_fewshot.jsonl and kvbench_passkey.jsonl into the current folder
"""

import json
import re
import sys
from pathlib import Path

from kvbench.tasks.synthetic import FewShot, PassKey

N_SAMPLES = 20


def main(length_tokens: int = 640) -> None:
    """Write both files, with contexts of about so many tokens."""
    fewshot = [
        {
            "context": sample.prompt + sample.answer_prefix,
            "choices": sorted(set(re.findall(r'-> ("\w+")', sample.prompt))),
            "answer": sample.answers[0],
        }
        for sample in FewShot(name="fewshot", lengths=(length_tokens,), samples_per_length=N_SAMPLES).samples()
    ]
    passkey = [
        {"context": f"{sample.prompt}\n{sample.answer_prefix}", "answer": sample.answers[0]}
        for sample in PassKey(name="passkey", lengths=(length_tokens,), samples_per_cell=N_SAMPLES // 5).samples()
    ]
    for name, rows in (("kvbench_fewshot", fewshot), ("kvbench_passkey", passkey)):
        lines = (json.dumps(row) + "\n" for row in rows)
        Path(f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
