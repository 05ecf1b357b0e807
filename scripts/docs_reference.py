"""Write the generated parts of the documentation while `mkdocs build` runs: methods, options, modules.

Called by the plug-in mkdocs-gen-files. Pages exist in the build only; the navigation is `docs/SUMMARY.md`, where a
line that ends in a folder, as `* [Reference](reference/)`, takes in what this script lists.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from griffe import Docstring
from hydra.core.config_store import ConfigStore
from hydra.utils import get_class, get_object
from omegaconf import OmegaConf

from kvbench.config import register
from kvbench.fields import in_words
from kvbench.methods.base import Policy
from kvbench.methods.registry import load_policies, method_config
from kvbench.models.config import ModelConfig
from kvbench.paths import config_folder

ROOT = Path(__file__).resolve().parent.parent
ARXIV, LINK = r"arXiv\s(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)"
GROUPS = {
    "model": ("model.md", "The language model"),
    "task": ("task.md", "What is asked and how it is scored"),
    "method": ("../methods/index.md", "One compression method, at `budget`; each has a page"),
    "arms": ("arms.md", "The set of methods and budgets that run where no method is named"),
    "engine": ("engine.md", "How arms are run"),
    "experiment": ("experiment.md", "One table or figure of the paper: its arms, tasks and models"),
    "hydra/launcher": ("launcher.md", "Where the jobs of a sweep run"),
}
HIDDEN = ("__main__", "_triton")  # command lines have --help; kernels are documented by their twins


def methods() -> dict[str, type[Policy]]:
    """The project's own methods by name; those of other distributions have pages of their own."""
    return {name: kind for name, kind in load_policies().items() if kind.__module__.startswith("kvbench.")}


def meanings(kind: type) -> dict[str, str]:
    """What is said of each field of a class and its bases: in `Attributes:`, or in a comment beside or above it."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        source = inspect.getsource(base)
        above = re.findall(r"^((?:    # .+\n)+)    (\w+):", source, re.MULTILINE)
        found |= {name: " ".join(comment.replace("#", " ").split()) for comment, name in above}
        found |= dict(re.findall(r"^    (\w+):.*?  # (.+)$", source, re.MULTILINE))
        for section in Docstring(inspect.cleandoc(vars(base)["__doc__"] or "")).parse("google", warnings=False):
            if section.kind.value == "attributes":
                found |= {field.name: " ".join(field.description.split()) for field in section.value}
    return found


def option_list(kind: type, defaults: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> str:
    """An entry for each of these fields of a dataclass: its default, what it takes, its meaning."""
    hints, said = get_type_hints(kind, include_extras=True), {**meanings(kind), **(comments or {})}
    return "\n".join(
        f"`{name}={written(value)}` ({in_words(hints[name])})\n" + (f":   {said[name]}\n" if name in said else "")
        for name, value in defaults.items()
    )


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
    text = re.sub(ARXIV, LINK, re.sub(r"^   (?=\S)", "    ", text, flags=re.MULTILINE))  # Markdown wants four in lists
    reads = ", ".join(f"`{need}`" for need in sorted(policy.needs)) or "nothing"
    facts = {
        "command line": f"`method={name} budget=0.35`",
        "Python": f"`kvbench.{kind.__name__}(budget=0.35)`",
        "reads beside keys and values": reads,
        "while decoding": "keeps its size" if policy.steps else "grows by a slot for every new token",
        "fewest slots a layer": policy.minimum_tokens,
        "code": f"[{kind.__module__}](../reference/{'/'.join(module.__name__.split('.'))}.md)",
    }
    defaults = {option: value for option, value in method_config(kind).items() if option != "_target_"}
    notes = ROOT / "docs" / "methods" / f"{name}.md"
    (label, value), *others = facts.items()
    lines = [
        f"# {kind.__name__}\n\n{idea}\n",
        f"| {label} | {value} |\n|---|---|",
        *(f"| {label} | {value} |" for label, value in others),
        f"\n## The method\n\n{text}",
        notes.read_text(encoding="utf-8").partition("\n")[2] if notes.exists() else "",
        f"## Options\n\n`method.OPTION=VALUE`; in Python a keyword of the class.\n\n{option_list(kind, defaults)}\n",
    ]
    return "\n".join(lines)


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


def options_page() -> str:
    """The page of the configuration's top level: config.yaml as it is, Hydra's own part left out."""
    groups = "\n".join(f"| [`{group}=`]({page}) | {line} |" for group, (page, line) in GROUPS.items())
    manual = (config_folder() / "config.yaml").read_text(encoding="utf-8").partition("\nhydra:")[0]
    return f"""# Every option

What a run does is one configuration, composed from groups. `python -m kvbench --cfg job` shows it composed, with your
words in it, and stops; `--help` lists the groups. These pages are made from the files and classes the program reads.

| group | chooses |
|---|---|
{groups}

## Beside the groups

```yaml
{manual}```
"""


def group_page(group: str) -> str:
    """Every file of a group: what its first comment says, then its options, or YAML if no class has them."""
    register()
    spelled = f"`{group}=NAME`; an option of it: `{group.replace('/', '.')}.OPTION=VALUE`"
    parts = [f"# {group}\n\n{GROUPS[group][1]}: {spelled}.\n"]
    if group == "model":
        shared = {field.name: default_of(field) for field in dataclasses.fields(ModelConfig)}
        parts.append(f"## What every model takes\n\n{option_list(ModelConfig, shared)}\n")
    for file in sorted((config_folder() / group).glob("[!_]*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        n_head = next(index for index, line in enumerate(lines) if not line.startswith("#"))
        head = [line[2:] for line in lines[:n_head] if not line.startswith("# @package")]
        parts.append(f"## {file.stem}\n\n{prose(head)}\n")
        values = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(values, dict)
        kind = get_class(values["_target_"]) if str(values.get("_target_", "")).startswith("kvbench.") else None
        if kind and dataclasses.is_dataclass(kind) and "defaults" not in values:
            known = {field.name: values.get(field.name, default_of(field)) for field in dataclasses.fields(kind)}
            parts.append(option_list(kind, known, comments_of(lines)) + "\n" if known else "It has no options.\n")
        else:
            parts.append("```yaml\n" + "\n".join(lines[n_head:]) + "\n```\n")
    if group == "task":
        parts += benchmarks()
    return "\n".join(parts)


def benchmarks() -> list[str]:
    """The tasks that no file defines, by the class that reads them, each class's options once."""
    by_class: dict[str, list[str]] = {}
    for name, node in sorted(ConfigStore.instance().repo["task"].items()):
        if "/" in name:  # LongBench's short names are the same tasks once more
            by_class.setdefault(node.node["_target_"], []).append(name.removesuffix(".yaml"))
    parts = []
    for target, names in by_class.items():
        made_by = get_object(target)
        kind = made_by if isinstance(made_by, type) else get_type_hints(made_by)["return"]
        known = {field.name: default_of(field) for field in dataclasses.fields(kind)}
        note = "" if kind is made_by else f"{inspect.cleandoc(made_by.__doc__ or '')}\n\n"
        line, listed = inspect.cleandoc(kind.__doc__ or "").partition("\n")[0], ", ".join(f"`{name}`" for name in names)
        parts.append(f"## {kind.__name__}\n\n{line}\n\n{listed}\n\n{note}{option_list(kind, known)}\n")
    return parts


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; "set by the name" where each task of a benchmark brings its own."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "set by the name" if value is dataclasses.MISSING else value


def comments_of(lines: list[str]) -> dict[str, str]:
    """What stands behind each key of a YAML file, with the lines that go on below it."""
    said: dict[str, str] = {}
    key = ""
    for line in lines:
        if found := re.match(r"(\w+):.*?\s# (.*)", line):
            key, said[found[1]] = found[1], found[2]
        elif key and (more := re.match(r"\s+# (.*)", line)):
            said[key] += f" {more[1]}"
        else:
            key = ""
    return said


def prose(lines: list[str]) -> str:
    """A comment as Markdown: lines that are indented are commands."""
    text, was_code = [], False
    for line in lines:
        is_code = line.startswith("  ")
        if is_code != was_code:
            text.append("```" if was_code else "\n```")
        text.append(line.strip())
        was_code = is_code
    return "\n".join([*text, "```"] if was_code else text)


def notebook_page() -> str:
    """docs/first_look.ipynb as a page: its texts, its cells, what they printed."""
    parts = []
    for cell in json.loads((ROOT / "docs" / "first_look.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [f"```text\n{''.join(output['text'])}```" for output in cell.get("outputs", [])]
    return "\n\n".join([*parts, "The notebook: [first_look.ipynb](first_look.ipynb).\n"])


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
    write("first_look.md", notebook_page())
    write("methods/index.md", method_index())
    for name, kind in own.items():
        write(f"methods/{name}.md", method_page(name, kind))
    titles = sorted(((kind.__name__, name) for name, kind in own.items()), key=lambda title: title[0].lower())
    write(
        "methods/SUMMARY.md",
        "".join(f"* [{title}]({name}.md)\n" for title, name in [("Every method", "index"), *titles]),
    )
    for group, (page, _) in GROUPS.items():
        if not page.startswith("../"):
            write(f"options/{page}", group_page(group))
    write("options/index.md", options_page())
    listed = [("Every option", "index.md"), *((group, page) for group, (page, _) in GROUPS.items())]
    write("options/SUMMARY.md", "".join(f"* [{title}]({page})\n" for title, page in listed if "/" not in page))
    nav = mkdocs_gen_files.Nav()
    for file, text in module_pages().items():
        write(f"reference/{file}", text)
        nav[tuple(file.removesuffix(".md").removesuffix("/index").split("/"))] = file
    with mkdocs_gen_files.open("reference/SUMMARY.md", "w") as summary:
        summary.writelines(nav.build_literate_nav())


if __name__ == "<run_path>":  # as mkdocs-gen-files does; tests read the functions
    main()
