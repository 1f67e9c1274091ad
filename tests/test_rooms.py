"""Which package may import which."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter

import pytest

from tests.rooms import ROOT, diagram, edges, imports, modules


def test_no_room_imports_another_in_a_circle() -> None:
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


def test_contributing_shows_the_rooms_as_they_are() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shown = re.findall(r"^```mermaid\n(.*?)\n```$", text, flags=re.MULTILINE | re.DOTALL)
    assert shown == [diagram()], "python -m tests.rooms draws the diagram"
