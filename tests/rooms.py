"""The rooms of camcal, and which of them imports which: python -m tests.rooms

Prints the map of the rooms in CONTRIBUTING.md as a Mermaid diagram, drawn from the imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"camcal": ROOT / "src" / "camcal"} | {
    f"camcal.{name}": ROOT / name for name in ("models", "training", "service")
}


def modules() -> dict[str, Path]:
    """Each module of camcal, by its name."""
    found = {}
    for package, folder in SOURCES.items():
        for file in sorted(folder.glob("*.py") if package == "camcal" else folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


def imports() -> Iterator[tuple[str, str]]:
    """Each (importer, imported) of two modules of camcal, inside functions too."""
    known = modules()
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                imported = target if target in known else target.rpartition(".")[0]
                if imported in known:
                    yield name, imported


def room(module: str) -> str:
    """The package that holds `module`; of a module within a room within a room, the outer one."""
    packages = [name for name, file in modules().items() if file.name == "__init__.py"]
    name = module if module in packages else module.rpartition(".")[0]
    return ".".join(name.split(".")[:3])


def edges() -> dict[str, set[str]]:
    """For each room, the others that it imports."""
    found: dict[str, set[str]] = {}
    rooms = {name: room(name) for name in modules()}
    for importer, imported in imports():
        source, target = rooms[importer], rooms[imported]
        found.setdefault(source, set())
        if source != target and target != "camcal":  # the top holds what all rooms share
            found[source].add(target)
    return found


def diagram() -> str:
    """The rooms as a Mermaid diagram; a room that is reached through another is not drawn again."""
    graph = edges()
    order = list(TopologicalSorter(graph).static_order())
    reach: dict[str, set[str]] = {}
    for name in order:
        reach[name] = set().union(*({other, *reach[other]} for other in graph.get(name, ())))
    lines = ["graph TD"]
    for name in reversed(order):
        direct = graph.get(name, set())
        for other in sorted(direct):
            if not any(other in reach[between] for between in direct):
                lines.append(f"    {_label(name)} --> {_label(other)}")
    return "\n".join(lines)


def _label(name: str) -> str:
    short = name.removeprefix("camcal.") if name != "camcal" else "camcal"
    return short.replace(".", "/")


if __name__ == "__main__":
    print(diagram())
