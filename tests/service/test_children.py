from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from camcal.service.children import command, environment


def test_another_package_of_the_same_name_in_the_working_directory_is_not_taken(tmp_path: Path) -> None:
    package = tmp_path / "camcal"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('taken')")
    ended = subprocess.run(command("camcal", "--help"), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "serve" in ended.stdout


def test_settings_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMCAL_API_KEY", "a secret that nobody needs to know")
    monkeypatch.setenv("OTHER", "1")
    assert "CAMCAL_API_KEY" not in environment()
    assert environment()["OTHER"] == "1"
