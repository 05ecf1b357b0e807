"""Write `docs/conformance.md`: what the conformance check says of every installed method.

    python scripts/docs_conformance.py

Run it after adding a method or changing what one does; `tests/check/test_check.py` asks for a row of every method
with the number of rules that it keeps.
"""

from __future__ import annotations

from pathlib import Path

from kvbench.check import check_policy
from kvbench.check.page import conformance_page
from kvbench.methods.registry import build_policy, load_policies

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conformance.md"


def main() -> None:
    """Check every method and replace the page."""
    reports = [check_policy(build_policy(name)) for name in load_policies()]
    PAGE.write_text(conformance_page(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
