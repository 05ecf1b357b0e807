"""What can be named on a command line, with a line about each, found without importing torch.

A method is read from its source, since importing it imports torch: its name, the first line of its docstring, its
options. So a typo is told in a fraction of a second, and shell completion answers while one types.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from kvbench.errors import ConfigError, nearest
from kvbench.paths import config_folder

PACKAGE = Path(__file__).parent
ENTRY_POINT_GROUP = "kvbench.policies"  # entry points of methods
WRITE = "write module:Class, its folder in the current directory or installed, or file.py:Class"
SENTENCE = re.compile(r"(.+?)(?:\.(?=\s|$)|$)")


class Method(NamedTuple):
    """A method as its source describes it."""

    target: str  # of its class, "module.Class"
    summary: str
    options: Mapping[str, Any]  # and their defaults: literal ones, None for others, "???" for none
    complete: bool  # whether all its base classes were found, so that there are no other options


def methods() -> dict[str, Method]:
    """All methods by name, sorted: those of this package, and what other distributions register as entry points."""
    found = {}
    for stem, classes in _own_classes().items():
        for node in classes.values():
            if name := _constant(node, "name"):
                found[name] = _method(f"{PACKAGE.name}.methods.{stem}.{node.name}", node)
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(entry_point.name, _by_module(entry_point.module, entry_point.attr))
    return dict(sorted(found.items()))


def method(name: str) -> Method:
    """A method by its name, `module:Class` or `file.py:Class`; `ConfigError` if there is no such."""
    source, colon, attribute = name.rpartition(":")
    if colon and source.endswith(".py") and not Path(source).is_file():
        raise ConfigError(f"method={name} cannot be loaded (there is no file {source}): {WRITE}")
    if colon:
        return _by_module(source, attribute, strict=True)
    if name not in (known := methods()):
        raise ConfigError(f"unknown method {name!r}:{nearest(name, known)} {listing('methods')}")
    return known[name]


def listing(what: str) -> str:
    """Where all names of a kind can be seen, as the end of a message."""
    return f"`kvbench ls {what}` lists all"


def files(group: str) -> dict[str, str]:
    """The YAML files of a configuration group by name, with the first sentence of the comment they begin with."""
    folder = config_folder() / group
    return {path.stem: _comment(path) for path in sorted(folder.glob("[!_]*.yaml"))}


@functools.cache
def summary(target: str) -> str:
    """The first sentence of the docstring of a class or function "module.name"; empty if its source is not found."""
    module, _, name = target.rpartition(".")
    file = _source(module)
    body = ast.parse(file.read_text(encoding="utf-8")).body if file else []
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next((_summary(node) for node in body if isinstance(node, kinds) and node.name == name), "")


def _comment(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() == "# @package _global_":
            continue
        if not line.startswith("# "):
            break
        lines.append(line[2:].strip())
    return _sentence(" ".join(lines))


def _sentence(text: str) -> str:
    match = SENTENCE.match(" ".join(text.split()))
    return match[1] if match else ""


def _by_module(module: str, name: str, strict: bool = False) -> Method:
    file = Path(module) if module.endswith(".py") else _source(module)
    if file is None and strict:
        raise ConfigError(f"method={module}:{name} cannot be loaded (there is no module {module}): {WRITE}")
    target = f"{module}.{name}"
    node = _classes(file).get(name) if file else None
    if strict and file and not node and name not in (known := _names(file)) and "*" not in known:
        problem = f"method={module}:{name} cannot be loaded ({file.name} has no {name})"
        raise ConfigError(f"{problem}:{nearest(name, known)} {WRITE}")
    return _method(target, node) if node else Method(target, "", {}, complete=False)


@functools.cache
def _source(module: str) -> Path | None:
    """The file of a module, found without importing it."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        stem = Path(folder, *rest)
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return file
    return None


@functools.cache
def _classes(file: Path) -> dict[str, ast.ClassDef]:
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):  # told when the module is imported
        return {}
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def _names(file: Path) -> set[str]:
    """What a module binds at its top level, "*" for all of another; everything ("*") if it cannot be read."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {"*"}
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    imports = (node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
    names |= {alias.asname or alias.name for node in imports for alias in node.names}
    return names | ({"*"} if "__getattr__" in names else set())


@functools.cache
def _own_classes() -> dict[str, dict[str, ast.ClassDef]]:
    return {path.stem: _classes(path) for path in sorted((PACKAGE / "methods").glob("*.py"))}


def _method(target: str, node: ast.ClassDef) -> Method:
    own = {name: found for classes in _own_classes().values() for name, found in classes.items()}
    fields, complete = _fields(node, own)
    return Method(target, _summary(node), fields, complete)


def _fields(node: ast.ClassDef, known: Mapping[str, ast.ClassDef]) -> tuple[dict[str, Any], bool]:
    """The fields of a dataclass, those of its bases first, and whether all bases were found."""
    fields: dict[str, Any] = {}
    complete = True
    for base in reversed(node.bases):
        name = ast.unparse(base).rpartition(".")[2]
        if name in known and known[name] is not node:
            inherited, found = _fields(known[name], known)
            fields |= inherited
            complete &= found
        elif name != "ABC":
            complete = False
    for statement in (part for part in node.body if isinstance(part, ast.AnnAssign)):
        if isinstance(statement.target, ast.Name) and not ast.unparse(statement.annotation).startswith("ClassVar"):
            fields[statement.target.id] = _default(statement.value)
    return fields, complete


def _default(value: ast.expr | None) -> Any:
    if value is None:
        return "???"
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None


def _constant(node: ast.ClassDef, name: str) -> str:
    for target, value in _assignments(node):
        if target == name and isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
    return ""


def _assignments(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None]]:
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                yield target.id, getattr(statement, "value", None)


def _summary(node: ast.ClassDef | ast.FunctionDef) -> str:
    return _sentence((ast.get_docstring(node) or "").partition("\n\n")[0])
