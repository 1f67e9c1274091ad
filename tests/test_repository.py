"""The repository itself: who may import whom, what the locks pin, what is tracked and documented."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from camcal.models.timm_trunk import PIP_PACKAGES
from tests.documents import make_targets

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {"serve": ["cpu"], "gpu": ["gpu"], "dev": ["cpu", "train", "dev"], "docs": ["cpu"]}
GROUPS = {"docs": "docs", "uv": "lock", "sbom": "sbom"}  # lock → the dependency group that it pins
# What only training needs; the lock for serving brings none of it.
TRAINING_ONLY = ("torch", "torchvision", "onnx", "onnxscript", "safetensors", "sklearn", "scipy", "matplotlib")


def run_without_training_packages(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter in which every package that only training needs cannot be imported."""
    # None in sys.modules makes Python's own import raise ModuleNotFoundError.
    block = f"import sys\nsys.modules.update(dict.fromkeys({TRAINING_ONLY!r}))\n"
    return subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_every_module_of_service_imports_without_torch() -> None:
    result = run_without_training_packages(
        "import importlib, pkgutil, camcal.service\n"
        "names = [m.name for m in pkgutil.walk_packages(camcal.service.__path__, 'camcal.service.')]\n"
        "for name in names:\n"
        "    if not name.endswith('__main__'):\n"
        "        importlib.import_module(name)\n"
        "assert len(names) > 5, names\n"
        "assert not [n for n in sys.modules if n.startswith('camcal.training')]\n"
    )
    assert result.returncode == 0, result.stderr


def test_command_line_starts_without_torch() -> None:
    result = run_without_training_packages(
        "from camcal.__main__ import main\nsys.argv = ['camcal', 'serve', '--help']\nmain()\n"
    )
    assert result.returncode == 0, result.stderr
    assert "serve" in result.stdout


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def lock_text(lock: str) -> str:
    return (ROOT / "requirements" / f"{lock}.txt").read_text()


def pins(lock: str) -> dict[str, str]:
    """Package → version of one lock."""
    return dict(re.findall(r"^([a-z0-9-]+)(?:\[.*?\])?==([^\s;]+)", lock_text(lock), flags=re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_pins_what_pyproject_asks_for(lock: str) -> None:
    project = pyproject()["project"]
    asked = [*project["dependencies"], *pyproject()["build-system"]["requires"]]
    asked += [line for extra in LOCKS[lock] for line in project["optional-dependencies"][extra]]
    check_pins(lock, asked)


@pytest.mark.parametrize("lock", GROUPS)
def test_lock_pins_its_group(lock: str) -> None:
    check_pins(lock, pyproject()["dependency-groups"][GROUPS[lock]])


def check_pins(lock: str, asked: list[str]) -> None:
    pinned = pins(lock)
    for requirement in map(Requirement, asked):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in requirements/{lock}.txt; run make lock"
        assert version in requirement.specifier, f"{requirement.name}=={version} is not {requirement}; run make lock"


@pytest.mark.parametrize("lock", [*LOCKS, "uv", "sbom"])
def test_every_pin_has_a_hash(lock: str) -> None:
    # An entry is one logical line: the pin, then its hashes behind backslashes.
    entries = [line for line in lock_text(lock).replace("\\\n", " ").splitlines() if line and line.lstrip()[0] != "#"]
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9-]+(\[[a-z0-9, -]+\])?==\S+ ", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry


def test_lock_names_the_extras_that_packages_ask_for() -> None:
    # Before 23.3, pip takes the newest `coverage` for somebody's `coverage[toml]`, whatever `coverage` is pinned to.
    locked = dict(re.findall(r"^([a-z0-9-]+)\[(.*?)\]==", lock_text("dev"), flags=re.MULTILINE))
    for name in pins("dev"):
        with contextlib.suppress(PackageNotFoundError):  # of another platform
            for requirement in map(Requirement, requires(name) or []):
                if requirement.extras and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                    found = locked.get(canonicalize_name(requirement.name), "").split(", ")
                    assert requirement.extras <= {*found}, f"{name} asks for {requirement}; run make lock"


@pytest.mark.parametrize("lock", [*LOCKS, "uv", "sbom"])
def test_lock_names_no_index_and_no_place(lock: str) -> None:
    # Neither an address nor a path can be written without a slash.
    assert [line for line in lock_text(lock).splitlines() if "/" in line or "--index" in line or "--find" in line] == []


@pytest.mark.parametrize("lock", ["serve", "gpu"])
def test_lock_for_serving_has_no_training_package(lock: str) -> None:
    assert pins(lock).keys() & {*TRAINING_ONLY, "scikit-learn"} == set()


@pytest.mark.parametrize("lock", ["serve", "gpu"])
def test_what_is_tested_is_what_is_served(lock: str) -> None:
    tested = pins("dev")
    # The CUDA libraries differ: torch and ONNX Runtime each bring the releases they were built for.
    shared = [name for name in pins(lock).keys() & tested.keys() if not name.startswith("nvidia-")]
    assert {name: pins(lock)[name] for name in shared} == {name: tested[name] for name in shared}


def test_locks_take_one_onnxruntime() -> None:
    assert "onnxruntime-gpu" not in pins("serve")
    assert "onnxruntime" not in pins("gpu")


def test_locked_build_backend_is_the_one_that_builds() -> None:
    assert pyproject()["dependency-groups"]["build"] == pyproject()["build-system"]["requires"]


def citation() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    return found


def test_changelog_and_citation_have_this_version() -> None:
    version = pyproject()["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert citation()["version"] == version


def test_notice_names_the_pretrained_weights_and_is_packed() -> None:
    notice = (ROOT / "NOTICE").read_text()
    assert [package for package in PIP_PACKAGES.values() if package not in notice] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license-files"] == ["LICENSE", "NOTICE"]
    assert {"!LICENSE", "!NOTICE"} <= set((ROOT / ".dockerignore").read_text().splitlines())


def test_one_address_of_the_repository() -> None:
    """Or none, as long as it has none."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    project = pyproject()["project"]["urls"].get("Repository")
    assert (site.get("repo_url"), citation().get("repository-code")) == (project, project)


def test_biome_has_one_version() -> None:
    sources = (".pre-commit-config.yaml", ".github/workflows/ci.yml")
    found = {re.findall(r"@biomejs/biome@([\d.]+)", (ROOT / name).read_text())[0] for name in sources}
    found |= set(re.findall(r"/schemas/([\d.]+)/", (ROOT / "biome.json").read_text()))
    assert len(found) == 1


def test_no_tracked_file_is_over_13_mb() -> None:
    files = [ROOT / name for name in tracked()]
    assert [str(file) for file in files if file.is_file() and file.stat().st_size > 13_000_000] == []


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([a-z-]+)  +\S", shown, flags=re.MULTILINE)) == make_targets()


def tracked() -> list[str]:
    """The files of the repository; those of a branch that is being worked on need not be committed."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


def build(kind: str, source: Path, out: Path) -> Path:
    """The wheel or sdist of the folder `source`, built without a network by the locked setuptools."""
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(out)!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    (built,) = out.glob("camcal-*")
    return built


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, with its links."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def built_wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", clone, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(built_wheel: Path) -> dict[str, int]:
    """Name and checksum of each file of the wheel but its own records."""
    return contents(built_wheel)


def contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        (names,) = (archive.read(name) for name in archive.namelist() if name.endswith("top_level.txt"))
        assert names.split() == [b"camcal"]
        return {info.filename: info.CRC for info in archive.infolist() if ".dist-info/" not in info.filename}


def test_wheel_holds_every_file_of_the_packages_and_no_other(wheel: dict[str, int]) -> None:
    inside = [ROOT / name for name in tracked() if name.startswith(("models/", "training/", "service/"))]
    files = [file for path in inside for file in ([path] if path.is_file() else path.glob("*.json"))]  # a linked folder
    of_packages = {f"camcal/{file.relative_to(ROOT)}" for file in files}
    on_top = {name.removeprefix("src/") for name in tracked() if (ROOT / name).is_file() and name.startswith("src/")}
    assert set(wheel) == of_packages | on_top


def test_installed_camcal_prints_the_results(built_wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site-packages"
    with zipfile.ZipFile(built_wheel) as archive:
        archive.extractall(installed)
    code = (
        f"import camcal; assert camcal.__file__.startswith({str(installed)!r}); import camcal.__main__ as c; c.main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "results"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "CIFAR-100-LT, imbalance 100" in ended.stdout


def test_sdist_builds_the_same_wheel_and_holds_tests_and_documents(
    clone: Path, wheel: dict[str, int], tmp_path: Path
) -> None:
    for name in ("sdist", "wheel"):
        (tmp_path / name).mkdir()
    sdist = build("sdist", clone, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert contents(build("wheel", source, tmp_path / "wheel")) == wheel
    others = {name for name in tracked() if not name.startswith(("models/", "training/", "service/", "src/", "."))}
    assert {name for name in others if not (source / name).exists()} == set()


def test_image_installs_each_lock_with_its_hashes() -> None:
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert set(re.findall(r"COPY requirements/(\w+)\.txt", dockerfile)) == {"serve", "gpu"}
    assert "--require-hashes" in dockerfile


@pytest.mark.parametrize(
    "module",
    [
        "camcal.service.engine.session",
        "camcal.training.export.bundle",
        "camcal.training.export.precision",
        "camcal.models.bundle",
    ],
)
def test_onnx_runtime_never_starts_with_its_usage_reports_on(module: str) -> None:
    watch = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime' and os.environ.get('ORT_DISABLE_TELEMETRY') != '1':\n"
        "            raise SystemExit('on')\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {module}, onnxruntime\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    ended = subprocess.run([sys.executable, "-c", watch], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
