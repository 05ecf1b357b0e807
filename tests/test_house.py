"""The rooms of docs/architecture.md: no import circle, neither among modules nor among rooms."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "kvbench"


def imports() -> dict[str, set[str]]:
    """Modules of the package that each module imports, functions' own imports included, type checkers' left out."""
    files = {file: file.relative_to(PACKAGE.parent).with_suffix("") for file in PACKAGE.rglob("*.py")}
    modules = {".".join(name.parts).removesuffix(".__init__"): file for file, name in files.items()}
    found: dict[str, set[str]] = {}
    for module, file in modules.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        typing_only = {id(node) for block in blocks for node in ast.walk(block)}
        nodes = [node for node in ast.walk(tree) if id(node) not in typing_only]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= submodules & set(modules) or {node.module}
        found[module] = {name for name in names if name in modules} - {module, "kvbench"}
    return found


def room(module: str) -> str:
    """The folder below the package, or the module itself at the top."""
    return ".".join(module.split(".")[:2])


def test_no_import_circle_among_modules_and_rooms() -> None:
    graph = imports()
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    rooms: dict[str, set[str]] = {}
    for module, imported in graph.items():
        rooms.setdefault(room(module), set()).update(room(name) for name in imported if room(name) != room(module))
    tuple(TopologicalSorter(rooms).static_order())
