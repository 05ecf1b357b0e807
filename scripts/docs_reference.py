"""Write two parts of the documentation while `mkdocs build` runs: every module, and every method with its options.

Called by the plug-in mkdocs-gen-files. Pages exist in the build only; the navigation is `docs/SUMMARY.md`, where the
line `* [Reference](reference/)` takes in what this script lists.
"""

from __future__ import annotations

from pathlib import Path

import mkdocs_gen_files

from kvbench.methods.registry import load_policies

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = ("__main__", "_triton")  # command lines have --help; kernels are documented by their twins


def write_methods() -> None:
    """One page of all installed methods: a line each, then what each class says of its options."""
    own = {name: kind for name, kind in load_policies().items() if kind.__module__.startswith("kvbench.")}
    rows = [
        f"| [`{name}`](#{kind.__module__}.{kind.__qualname__}) | {(kind.__doc__ or '').splitlines()[0]} |"
        for name, kind in own.items()
    ]
    with mkdocs_gen_files.open("methods/index.md", "w") as file:
        file.write("# Every method and its options\n\nAn option is a field of the class: `method.OPTION=VALUE`.\n\n")
        file.write("\n".join(["| `method=` | in a line |", "|---|---|", *rows]) + "\n")
        for kind in own.values():
            file.write(f"\n::: {kind.__module__}.{kind.__qualname__}\n    options: {{members: false}}\n")


def main() -> None:
    """One page per public module, and the list of them."""
    write_methods()
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
