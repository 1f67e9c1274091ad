"""The packages of camcal and which of them imports which: `python -m tests.rooms`.

Prints the diagram in CONTRIBUTING.md, drawn from the imports.
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


def rooms() -> dict[str, str]:
    """For each module the room that holds it: its package, to the second level below camcal."""
    found = {}
    for name, file in modules().items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = ".".join(package.split(".")[:3])
    return found


def edges() -> dict[str, set[str]]:
    """For each room, the others that it imports; the modules on top of camcal, which all may import, are left out."""
    found: dict[str, set[str]] = {}
    room_of = rooms()
    for importer, imported in imports():
        source, target = room_of[importer], room_of[imported]
        found.setdefault(source, set())
        if source != target and target != "camcal":
            found[source].add(target)
    return found


def diagram() -> str:
    """The rooms as a Mermaid diagram; an arrow that a longer way implies is left out.

    Raises:
        CycleError: if rooms import each other in a circle.
    """
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
    return name.removeprefix("camcal.").replace(".", "/")


if __name__ == "__main__":
    print(diagram())
