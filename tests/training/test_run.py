from pathlib import Path

import pytest

from camcal.training.run import RunError, RunFolder


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path).claimed():
        with pytest.raises(RunError, match=f"{tmp_path} is in use by another training"), RunFolder(tmp_path).claimed():
            pass
        with RunFolder(tmp_path.parent).claimed():  # another folder
            pass
    with RunFolder(tmp_path).claimed():
        assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="cannot be created: it, or a folder above it, is a file"):
            RunFolder(path).make()
    RunFolder(tmp_path / "run").make()
    RunFolder(tmp_path / "run").make()
