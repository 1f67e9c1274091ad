"""A bounded part of `make fuzz`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from camcal.service.engine.decoding import decode
from tests.fuzz import api, cases, images
from tests.fuzz.mutations import mutant, mutants
from tests.fuzz.targets import BUNDLE
from tests.service.crafted import CASES
from tests.soak.server import ROOT


def test_mutants_are_the_same_for_the_same_seed() -> None:
    first = list(mutants(60, seed=3))
    assert first == list(mutants(60, seed=3))
    assert len({data for _, data in first}) > 55
    assert [data for _, data in mutants(60, seed=4)] != [data for _, data in first]
    assert all(mutant(name) == data for name, data in first)


def test_mutants_are_decoded_or_refused() -> None:
    findings = images.decoded(900, seed=1)
    assert findings.faults == []
    assert {"decoded", "UndecodableImageError", "UnsupportedFormatError"} <= {what for what, _ in findings.rows}


def test_fault_of_decoding_is_found(monkeypatch: object) -> None:
    def broken(data: bytes, *rest: object) -> object:
        if data.startswith(b"GIF"):
            raise KeyError("boom")
        return decode(data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "decode", broken)  # type: ignore[attr-defined]
    assert any("KeyError" in fault for fault in images.decoded(30, seed=1).faults)


def test_mutants_over_http(tmp_path: Path) -> None:
    findings = images.over_http(150, 2, BUNDLE, tmp_path / "log")
    assert [fault for fault in findings.faults if "memory" not in fault] == []  # too few to tell


def test_small_crafted_images_over_http(tmp_path: Path) -> None:
    names = [name for name in CASES if name.startswith("cut-at-0.5") or name.endswith((".svg", ".zip", "empty"))]
    findings = cases.over_http(names, BUNDLE, tmp_path / "log")
    assert findings.faults == []
    assert dict(findings.rows).keys() >= {"answered 422", "answered 415"}


def test_requests_from_openapi(tmp_path: Path) -> None:
    findings = api.requests(1, 0, BUNDLE, tmp_path, phases="fuzzing")
    assert findings.faults == []
    assert all(figure.endswith("requests") for _, figure in findings.rows)


def test_command_names_what_it_can_fuzz() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "nothing"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "crafted" in ended.stderr
