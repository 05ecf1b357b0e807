"""Every method has a page, made from docstrings: source, formula, and a meaning for every option."""

import dataclasses
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest

from kvbench.methods.registry import load_policies

ROOT = Path(__file__).resolve().parents[2]
OWN = {name: kind for name, kind in load_policies().items() if kind.__module__.startswith("kvbench.")}


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("griffe", reason="the documentation's packages are not installed: pip install --group dev")
    return runpy.run_path(str(ROOT / "scripts" / "docs_reference.py"), run_name="test")


@pytest.mark.parametrize("name", OWN)
def test_the_module_says_what_the_page_needs(name):
    module = inspect.cleandoc(sys.modules[OWN[name].__module__].__doc__)
    said = f"{module}\n\n{inspect.getdoc(OWN[name])}"
    assert re.match(r"[^\n]+: [^\n]+\.\n\n", module), (
        "the module's docstring begins with one line: its name, a colon, the idea"
    )
    assert re.search(r"^(Source: |No paper )", module, re.MULTILINE), (
        "a paragraph begins with Source: (or No paper ...)"
    )
    assert re.search(r"(?:^|\n\n) *\$\$.+?\$\$(?:\n\n|$)", said, re.DOTALL), "no formula: a paragraph $$...$$"
    assert said.count("$$") % 2 == 0


@pytest.mark.parametrize("name", OWN)
def test_a_page_has_formula_options_with_their_meanings_and_notes(pages, name):
    page = pages["method_page"](name, OWN[name])
    assert page.startswith(f"# {OWN[name].__name__}\n")
    assert "$$" in page
    rows = dict(re.findall(r"^`(\w+)=[^`]*` \(.+\)\n:   (.*)$", page, re.MULTILINE))
    assert rows.keys() == {field.name for field in dataclasses.fields(OWN[name])}
    assert not [option for option, meaning in rows.items() if not meaning], "Attributes: says nothing of these"
    notes = ROOT / "docs" / "methods" / f"{name}.md"
    assert not notes.exists() or notes.read_text(encoding="utf-8").partition("\n")[2] in page


def test_the_list_has_all_and_hand_written_texts_belong_to_methods(pages):
    assert re.findall(r"\((\w+)\.md\)", pages["method_index"]()) == list(OWN)
    assert {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")} <= set(OWN)


def test_formulas_become_mathml():
    pytest.importorskip(
        "latex2mathml", reason="the documentation's packages are not installed: pip install --group dev"
    )
    draw = runpy.run_path(str(ROOT / "scripts" / "docs_math.py"))["on_page_content"]
    marked = r'<p><span class="arithmatex">\(a &lt; b\)</span></p><div class="arithmatex">\[\frac{1}{m}\]</div>'
    drawn = draw(marked)
    assert "arithmatex" not in drawn
    assert re.findall(r'display="(\w+)"', drawn) == ["inline", "block"]
    assert "<mfrac>" in drawn
    for name, kind in OWN.items():
        for text in (sys.modules[kind.__module__].__doc__, kind.__doc__):
            for formula in re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL):
                unknown = re.findall(r"\\\w+", draw(rf'<div class="arithmatex">\[{formula}\]</div>'))
                assert not unknown, f"{name}: latex2mathml does not know these"
