"""The import rules between packages."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter

import pytest

from tests.rooms import ROOT, diagram, edges, imports, modules


def test_rooms_have_no_circular_imports() -> None:
    order = list(TopologicalSorter(edges()).static_order())
    assert order.index("camcal.training.data") < order.index("camcal.training.fitting")


@pytest.mark.parametrize(
    ("package", "forbidden"), [("service", "training"), ("models", "training"), ("models", "service")]
)
def test_package_never_imports(package: str, forbidden: str) -> None:
    assert any(name.startswith(f"camcal.{package}.") for name in modules())
    both = [
        f"{importer} imports {imported}"
        for importer, imported in imports()
        if f"{importer}.".startswith(f"camcal.{package}.") and f"{imported}.".startswith(f"camcal.{forbidden}.")
    ]
    assert both == []


def test_diagram_in_contributing_is_current() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shown = re.findall(r"^```mermaid\n(.*?)\n```$", text, flags=re.MULTILINE | re.DOTALL)
    assert shown == [diagram()], "python -m tests.rooms draws the diagram"
