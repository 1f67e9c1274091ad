from pathlib import Path

import pytest
import torch

from camcal.training.checkpoints import load_network, load_tensors, save_tensors
from camcal.training.run import RunError, RunFolder


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.safetensors"
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save_tensors(path, {"a": tensor}, {"epoch": 3, "classes": ["é"]})
    tensors, meta = load_tensors(path)
    assert torch.equal(tensors["a"], tensor) and meta == {"epoch": 3, "classes": ["é"]}
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_a_missing_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="checkpoint.safetensors is missing: has `camcal train` finished in"):
        load_network(RunFolder(tmp_path).checkpoint)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02}q\x00."])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(RunError, match="is not a camcal checkpoint"):
        load_tensors(tmp_path / "x.safetensors")


def test_a_checkpoint_of_another_network_is_refused(digits_run: RunFolder, tmp_path: Path) -> None:
    tensors, meta = load_tensors(digits_run.network)
    del tensors["network.head.weight"]
    save_tensors(tmp_path / "x.safetensors", tensors, meta)
    with pytest.raises(RunError, match="does not fit this version of camcal: .*head.weight"):
        load_network(tmp_path / "x.safetensors")


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
