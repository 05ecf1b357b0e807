"""The README's plug-in: one file outside the package is a method."""

import json
import re
import sys
from pathlib import Path

from kvbench.cli import main

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_readme_s_method_runs_from_its_own_file(tmp_path, monkeypatch, capfd):
    (code,) = re.findall(r"```python\n# my_methods/newest\.py\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods" / "newest.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        sys, "argv",
        [
            "kvbench", "model=tiny-random", "task=passkey", "task.lengths=[200]", "task.limit=1",
            "protocol.max_new_tokens=3", "method=full", "method._target_=my_methods.newest.Newest", "budget=0.5",
        ],
    )  # fmt: skip
    assert main() == 0
    (arm,) = json.loads(capfd.readouterr().out.splitlines()[-1])["arms"]
    assert (arm["arm"], arm["method"], arm["n"]) == ("newest@0.5", "newest", 1)
    assert 0.49 < arm["budget_measured"] <= 0.5
    assert arm["kl"] > 0
