import re
import subprocess
from pathlib import Path

import pytest
import torch

import camcal
from camcal.training import provenance


def test_the_version_is_the_projects() -> None:
    text = (provenance.ROOT / "pyproject.toml").read_text()
    assert f'version = "{camcal.__version__}"' in text


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
    assert provenance.made_with(torch.device("cpu")).commit == provenance.COMMIT != provenance.commit()


def test_the_code_s_digest_follows_every_file_of_networks_and_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    digests = set()
    for name, text in (("models/a.py", "1"), ("training/data/b.py", "2"), ("models/a.py", "3"), ("docs/c.py", "4")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        digests.add(provenance.code_digest.__wrapped__())
    assert len(digests) == 3  # what lies elsewhere does not count


def test_a_training_that_goes_on_elsewhere_names_both_places(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    first = provenance.also_made_with([], device)
    assert first == [provenance.made_with(device)]
    earlier = [first[0].model_copy(update={"date": "2020-01-01"})]
    assert provenance.also_made_with(earlier, device) == earlier
    monkeypatch.setattr(provenance, "COMMIT", "another")
    assert [made.commit for made in provenance.also_made_with(first, device)] == [first[0].commit, "another"]


def test_the_hardware_is_one_line() -> None:
    assert re.fullmatch(r".+, \d+ cores?, torch \d+\.\d+.*", provenance.hardware(torch.device("cpu")))
