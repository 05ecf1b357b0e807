"""Turn LaTeX into MathML while mkdocs builds, so that browsers draw formulas without a script, a font or a network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?:div|span) class="arithmatex">\\(?P<open>[\[(])(?P<latex>.*?)\\[\])]</(?:div|span)>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with every page's HTML, in which `pymdownx.arithmatex` has marked the formulas."""

    def drawn(found: re.Match[str]) -> str:
        latex = html.unescape(found["latex"])
        if found["open"] == "(":
            return convert(latex)
        return f'<div class="formula">{convert(latex, display="block")}</div>'

    return FORMULA.sub(drawn, content)
