"""The installed package and its command."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import pytest

import camcal
from camcal.service.settings import DEFAULT_BUNDLE
from tests.service.conftest import png

SOURCE = Path(__file__).resolve().parents[1] / "src"
DECOYS = ("models", "training", "service")


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """A user's folder that has packages with the names of our folders."""
    for name in DECOYS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
    return tmp_path


def test_public_names() -> None:
    assert set(camcal.__all__) <= set(dir(camcal))
    assert all(getattr(camcal, name) is not None for name in camcal.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = camcal.nothing


def test_import_loads_neither_torch_nor_onnx_runtime(tmp_path: Path) -> None:
    heavy = ("torch", "onnxruntime", "fastapi", "numpy", "PIL")
    code = f"import sys, camcal; print([name for name in {heavy} if name in sys.modules], camcal.__version__)"
    assert run("-c", code, cwd=tmp_path).stdout == f"[] {camcal.__version__}\n"


def test_clone_works_without_being_installed() -> None:
    code = "import camcal; print(camcal.__version__, camcal.__file__)"
    ended = run("-S", "-c", code, cwd=SOURCE)  # -S: without installed packages
    assert ended.stdout.split() == [camcal.__version__, str(SOURCE / "camcal" / "__init__.py")]


def test_nothing_else_is_installed_at_top_level() -> None:
    names = {path.parts[0] for path in files("camcal") or [] if ".." not in path.parts}
    assert names and all(name.startswith(("camcal", "__editable__.camcal", "__pycache__")) for name in names)
    assert not names & {*DECOYS}


def test_user_packages_with_the_same_names_are_not_imported(decoys: Path) -> None:
    (decoys / "photo.png").write_bytes(png())
    path = os.pathsep.join(filter(None, (str(decoys), os.environ.get("PYTHONPATH"))))
    for arguments in (
        ("-c", "import camcal; camcal.create_app; import camcal.training.data"),
        ("-m", "camcal", "--help"),
        ("-m", "camcal", "predict", "photo.png", "--bundle", str(DEFAULT_BUNDLE)),
        ("-m", "camcal", "serve", "--help"),
    ):
        result = run(*arguments, cwd=decoys, PYTHONPATH=path)
        assert result.returncode == 0, (arguments, result.stderr)


def test_version(tmp_path: Path) -> None:
    assert run("-m", "camcal", "--version", cwd=tmp_path).stdout == f"camcal {camcal.__version__}\n"


def test_completion(tmp_path: Path) -> None:
    command = "import sys; sys.argv[0] = 'camcal'; from camcal.__main__ import main; main()"
    request = {"_CAMCAL_COMPLETE": "complete_bash", "COMP_WORDS": "camcal se", "COMP_CWORD": "1"}
    assert run("-c", command, cwd=tmp_path, **request).stdout.split() == ["serve"]
