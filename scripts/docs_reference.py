"""Write the generated parts of the documentation while `mkdocs build` runs: methods, options, modules.

Called by the plug-in mkdocs-gen-files. Pages exist in the build only; the navigation is `docs/SUMMARY.md`, where a
line that ends in a folder, as `* [Reference](reference/)`, takes in what this script lists.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from griffe import Docstring

from kvbench.fields import in_words
from kvbench.methods.base import Policy
from kvbench.methods.registry import load_policies, method_config

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = ("__main__", "_triton")  # command lines have --help; kernels are documented by their twins


def methods() -> dict[str, type[Policy]]:
    """The project's own methods by name; those of other distributions have pages of their own."""
    return {name: kind for name, kind in load_policies().items() if kind.__module__.startswith("kvbench.")}


def meanings(kind: type) -> dict[str, str]:
    """What is said of each field of a class and its bases: in `Attributes:`, or in a comment on the field's line."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        found |= dict(re.findall(r"^    (\w+):.*?  # (.+)$", inspect.getsource(base), re.MULTILINE))
        for section in Docstring(inspect.cleandoc(vars(base)["__doc__"] or "")).parse("google", warnings=False):
            if section.kind.value == "attributes":
                found |= {field.name: " ".join(field.description.split()) for field in section.value}
    return found


def option_table(kind: type, defaults: dict[str, Any]) -> str:
    """A row for each of these fields of a dataclass: what it takes, its default, its meaning."""
    hints, said = get_type_hints(kind, include_extras=True), meanings(kind)
    rows = ["| option | takes | default | meaning |", "|---|---|---|---|"]
    for name, value in defaults.items():
        cells = (f"`{name}`", in_words(hints[name]), f"`{written(value)}`", said.get(name, ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def written(value: Any) -> str:
    """A default as the command line and YAML spell it."""
    if isinstance(value, dict):
        return " ".join(str(item) if key == "_target_" else f"{key}={item}" for key, item in value.items())
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else str(value)


def method_page(name: str, kind: type[Policy]) -> str:
    """A method's page: the docstrings of module and class, its facts and options, and docs/methods/NAME.md if any."""
    module, policy = inspect.getmodule(kind), kind()
    assert isinstance(module, ModuleType)
    idea, _, text = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    head, *variants = (cls for cls in methods().values() if cls.__module__ == kind.__module__)
    if variants:  # the module's docstring is about the class that stands first in it
        head = min((head, *variants), key=lambda cls: inspect.getsourcelines(cls)[1])
    if kind is not head:
        own, _, _ = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:")
        idea, _, text = (
            own.partition("\n\n")[0],
            "",
            f"{own}\n\nIt is a variant of [{head.name}]({head.name}.md):\n\n{text}",
        )
    facts = {
        "command line": f"`method={name} budget=0.35`",
        "Python": f"`{kind.__module__}.{kind.__qualname__}(budget=0.35)`",
        "reads of the prompt, beside keys and values": ", ".join(f"`{need}`" for need in sorted(policy.needs))
        or "nothing",
        "while decoding": "keeps its size" if policy.steps else "grows by a slot for every new token",
        "fewest slots a layer": policy.minimum_tokens,
        "code": f"[{kind.__module__}](../reference/{'/'.join(module.__name__.split('.'))}.md)",
    }
    defaults = {option: value for option, value in method_config(kind).items() if option != "_target_"}
    notes = ROOT / "docs" / "methods" / f"{name}.md"
    return "\n".join([
        f"# {kind.__name__}\n\n{idea}\n\n| | |\n|---|---|",
        *(f"| {label} | {value} |" for label, value in facts.items()),
        f"\n## The method\n\n{text}\n\n## Options\n\n`method.OPTION=VALUE`; in Python a keyword of the class.\n",
        option_table(kind, defaults),
        notes.read_text(encoding="utf-8").partition("\n")[2] if notes.exists() else "",
    ])  # fmt: skip


def method_index() -> str:
    """The page that lists all methods."""
    rows = []
    for name, kind in methods().items():
        steps = "constant" if kind.steps is True else "grows"
        rows.append(
            f"| [{kind.__name__}]({name}.md) | `{name}` | {(kind.__doc__ or '').partition(chr(10))[0]} | {steps} |"
        )
    return "\n".join([
        "# Every method\n\nOne page each: where it comes from, its formula, our deviations, its options.\n",
        "| | `method=` | in a line | cache while decoding |\n|---|---|---|---|",
        *rows,
        "\nSymbols: a prompt of T tokens keeps m slots; $k_j$, $v_j$ are key and value of token j, $q_i$ the query of "
        "token i, $A_{ij}$ its attention to j; s in front of a product scales logits. What the page names as deviation "
        "is where we leave paper or official code. Your own: [Write a method](../plugins.md).\n",
    ])  # fmt: skip


def module_pages() -> dict[str, str]:
    """A page of docstrings for every public module, by its path below `reference/`."""
    pages = {}
    for path in sorted((ROOT / "kvbench").rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("")
        if module.name.endswith(HIDDEN) or not path.read_text(encoding="utf-8").strip():
            continue
        parts = module.parts[:-1] if module.name == "__init__" else module.parts
        file = "/".join([*parts, "index.md"] if module.name == "__init__" else parts)
        dotted = ".".join(parts)
        pages[file.removesuffix(".md") + ".md"] = (
            f"# {dotted}\n\n::: {dotted}\n    options:\n      show_root_heading: false\n"
        )
    return pages


def main() -> None:
    """Write all pages, and for each folder of them the list that the navigation takes in."""
    import mkdocs_gen_files

    def write(path: str, text: str) -> None:
        with mkdocs_gen_files.open(path, "w") as file:
            file.write(text)

    own = methods()
    write("methods/index.md", method_index())
    for name, kind in own.items():
        write(f"methods/{name}.md", method_page(name, kind))
    titles = sorted((kind.__name__, name) for name, kind in own.items())
    write(
        "methods/SUMMARY.md",
        "".join(f"* [{title}]({name}.md)\n" for title, name in [("Every method", "index"), *titles]),
    )
    nav = mkdocs_gen_files.Nav()
    for file, text in module_pages().items():
        write(f"reference/{file}", text)
        nav[tuple(file.removesuffix(".md").removesuffix("/index").split("/"))] = file
    with mkdocs_gen_files.open("reference/SUMMARY.md", "w") as summary:
        summary.writelines(nav.build_literate_nav())


if __name__ == "<run_path>":  # as mkdocs-gen-files does; tests read the functions
    main()
