"""Write the reference part of the documentation while `mkdocs build` runs: one page per module, from its docstrings.

Called by the plug-in mkdocs-gen-files. Pages exist in the build only; the navigation is `docs/SUMMARY.md`, where the
line `* [Reference](reference/)` takes in what this script lists.
"""

from __future__ import annotations

from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = ("__main__", "_triton")  # command lines have --help; kernels are documented by their twins


def main() -> None:
    """One page per public module, and the list of them."""
    nav = mkdocs_gen_files.Nav()
    for path in sorted((ROOT / "kvbench").rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("")
        parts = module.parts[:-1] if module.name == "__init__" else module.parts
        if module.name.endswith(HIDDEN) or not path.read_text(encoding="utf-8").strip():
            continue
        page = Path("reference", *parts, "index.md") if module.name == "__init__" else Path("reference", *parts)
        page = page if page.suffix else page.with_suffix(".md")
        nav[parts] = page.relative_to("reference").as_posix()
        with mkdocs_gen_files.open(page, "w") as file:
            file.write(f"# {'.'.join(parts)}\n\n::: {'.'.join(parts)}\n    options:\n      show_root_heading: false\n")
    with mkdocs_gen_files.open("reference/SUMMARY.md", "w") as file:
        file.writelines(nav.build_literate_nav())


main()
