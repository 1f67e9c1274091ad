import re
import subprocess
from pathlib import Path

import pytest
import torch

from training import provenance


def test_the_version_is_the_projects() -> None:
    text = (provenance.ROOT / "pyproject.toml").read_text()
    assert f'version = "{provenance.version()}"' in text


def test_the_commit_is_that_of_the_clone() -> None:
    found = provenance.commit()
    inside = subprocess.run(["git", "rev-parse", "HEAD"], cwd=provenance.ROOT, capture_output=True, text=True)
    if inside.returncode != 0:
        assert found is None
    else:
        assert found is not None and inside.stdout.startswith(found.rstrip("+"))


def test_a_copy_without_history_has_no_commit_or_the_one_that_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.delenv("CAMCAL_COMMIT", raising=False)
    assert provenance.commit() is None
    monkeypatch.setenv("CAMCAL_COMMIT", "abc123")
    assert provenance.commit() == "abc123"


def test_a_report_names_the_commit_that_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMCAL_COMMIT", "somebody committed meanwhile")
    assert provenance.made_with(torch.device("cpu"))["commit"] == provenance.COMMIT != provenance.commit()


def test_the_hardware_is_one_line() -> None:
    assert re.fullmatch(r".+, \d+ cores?, torch \d+\.\d+.*", provenance.hardware(torch.device("cpu")))
