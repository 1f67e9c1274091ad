from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from camcal.service.children import command, environment


def test_package_of_the_same_name_in_the_working_directory_is_not_imported(tmp_path: Path) -> None:
    package = tmp_path / "camcal"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    child = subprocess.run(command("camcal", "--help"), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "serve" in child.stdout


def test_settings_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMCAL_API_KEY", "a secret")
    monkeypatch.setenv("OTHER", "1")
    assert "CAMCAL_API_KEY" not in environment()
    assert environment()["OTHER"] == "1"
