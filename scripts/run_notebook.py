"""Run docs/first_look.ipynb without Jupyter and write the text it prints back into it.

    python scripts/run_notebook.py            run it, keep the outputs
    python scripts/run_notebook.py --check    run it, write nothing

Cells are plain Python; as in Jupyter, the value of a last line that is an expression is shown.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "first_look.ipynb"


def run_cells(notebook: dict[str, Any]) -> list[str]:
    """Run the code cells one after the other in one namespace; what each has printed and shown."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for index, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]), f"cell {index + 1}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(tree, f"cell {index + 1}", "exec", dont_inherit=True), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), f"cell {index + 1}", "eval", dont_inherit=True), names)
                if value is not None:
                    print(value)
        printed.append(output.getvalue())
    return printed


def main(arguments: list[str]) -> None:
    """Run the notebook, and unless only checking, keep what its cells print."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    printed = iter(run_cells(notebook))
    for number, cell in enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), 1):
        text = next(printed)
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell.update(execution_count=number, outputs=[stream] if text else [])
    if "--check" not in arguments:
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
