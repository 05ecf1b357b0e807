"""docs/first_look.ipynb: its cells are plain Python, run from top to bottom, and its page shows them."""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "docs" / "first_look.ipynb").read_text("utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_valid_and_was_run_in_order():
    assert NOTEBOOK["nbformat"] == 4
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert sum(bool(cell["outputs"]) for cell in CELLS) >= len(CELLS) - 1  # loading prints nothing
    for cell in CELLS:
        compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.model
def test_every_cell_runs_and_prints_where_the_kept_output_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    printed = runpy.run_path(str(ROOT / "scripts" / "run_notebook.py"))["run_cells"](NOTEBOOK)
    kept = ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in CELLS]
    assert [len(text.splitlines()) for text in printed] == [len(text.splitlines()) for text in kept]
    assert printed[1] == kept[1]  # question and tokens hang on no arithmetic


@pytest.mark.skipif(importlib.util.find_spec("griffe") is None, reason="the documentation's packages are not installed")
def test_the_page_shows_cells_and_outputs():
    page = runpy.run_path(str(ROOT / "scripts" / "docs_reference.py"), run_name="test")["notebook_page"]()
    assert page.count("```python") == len(CELLS)
    assert all("".join(cell["source"]) in page for cell in NOTEBOOK["cells"])
    assert all("".join(output["text"]) in page for cell in CELLS for output in cell["outputs"])


def test_the_front_page_shows_the_readme_s_snippet():
    """Which tests/runtime/test_generate.py runs."""
    (snippet,) = re.findall(r"```python\n.*?```", (ROOT / "docs" / "index.md").read_text("utf-8"), re.DOTALL)
    assert snippet in (ROOT / "README.md").read_text("utf-8")
