from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from camcal.models.bundle import MODEL_FILE, Bundle, BundleError, manifest_checksum
from camcal.service.engine.model import load_proven
from camcal.service.engine.proofs import Proofs
from camcal.service.settings import Settings
from tests.service import hostile
from tests.service.test_live import wait_for

TIMEOUT_S = 120.0  # for a test that should pass, even on a busy machine


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of all started processes."""
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def record(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        commands.append(command)
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", record)
    return commands


def settings(folder: Path, **options: object) -> Settings:
    return Settings(bundle=folder, max_batch=1, intra_threads=1, **{"load_timeout_s": TIMEOUT_S} | options)  # type: ignore[arg-type]


def test_bundle_is_tested_once(bundle: Bundle, trials: list[list[str]]) -> None:
    proofs = Proofs()
    assert proofs.require(settings(bundle.path)) == bundle.digest
    assert proofs.require(settings(bundle.path)) == bundle.digest
    assert len(trials) == 1
    assert load_proven(settings(bundle.path), proofs)[0].bundle.digest == bundle.digest


@pytest.mark.parametrize("name", [name for name in hostile.HOSTILE if name not in hostile.ENDLESS])
def test_hostile_bundle_is_refused(bundle: Bundle, tmp_path: Path, name: str) -> None:
    spoil, message = hostile.HOSTILE[name]
    folder = hostile.make(bundle.path, tmp_path / "bundle", spoil)
    with pytest.raises(BundleError) as refused:
        Proofs().require(settings(folder))
    assert re.search(message, str(refused.value)), refused.value
    assert len(str(refused.value)) <= 600 and str(refused.value).isprintable()


@pytest.mark.parametrize("name", hostile.ENDLESS)
def test_endless_bundle_times_out(bundle: Bundle, tmp_path: Path, name: str, trials: list[list[str]]) -> None:
    spoil, message = hostile.HOSTILE[name]
    folder, proofs = hostile.make(bundle.path, tmp_path / "bundle", spoil), Proofs()
    for _ in range(2):  # a second call starts another test
        started = time.monotonic()
        with pytest.raises(BundleError, match=message):
            proofs.require(settings(folder, load_timeout_s=1.5))
        assert time.monotonic() - started < 15
    assert len(trials) == 2


def test_close_stops_a_running_test(bundle: Bundle, tmp_path: Path, trials: list[list[str]]) -> None:
    folder, proofs = hostile.make(bundle.path, tmp_path / "bundle", hostile.endless_graph), Proofs()
    refused: list[str] = []

    def require() -> None:
        with pytest.raises(BundleError) as error:
            proofs.require(settings(folder))
        refused.append(str(error.value))

    thread = threading.Thread(target=require)
    thread.start()
    wait_for(lambda: len(trials) == 1)
    proofs.close()
    thread.join(20)
    assert len(refused) == 1 and "killed by SIGKILL" in refused[0] or "shutting down" in refused[0]
    with pytest.raises(BundleError, match="shutting down"):
        proofs.require(settings(folder))


@pytest.mark.parametrize("spoil", [lambda folder: None, hostile.not_finite])
def test_workers_share_one_test(bundle: Bundle, tmp_path: Path, spoil: hostile.Spoil) -> None:
    folder = hostile.make(bundle.path, tmp_path / "bundle", spoil)
    fork = multiprocessing.get_context("fork")
    proofs, answers, started = Proofs(), fork.SimpleQueue(), fork.SimpleQueue()

    def work() -> None:
        popen = subprocess.Popen

        def record(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            started.put(command)
            return popen(command, **options)

        subprocess.Popen = record  # type: ignore[assignment,misc]
        try:
            answers.put(proofs.require(settings(folder, workers=3)))
        except BundleError as error:
            answers.put(str(error))

    workers = [fork.Process(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    (answer,) = {answers.get() for _ in workers}
    for worker in workers:
        worker.join()
    assert answer == manifest_checksum(folder) or "logits is not finite" in answer
    started.get()
    assert started.empty()


def test_only_the_tested_bundle_is_loaded(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, proofs = hostile.make(bundle.path, tmp_path / "bundle", lambda folder: None), Proofs()
    proofs.require(settings(folder))
    hostile.not_finite(folder)  # a new manifest, which is tested again
    with pytest.raises(BundleError, match="not finite"):
        load_proven(settings(folder), proofs)
    other = hostile.make(bundle.path, tmp_path / "other", lambda folder: None)
    proofs.require(settings(other))
    hostile.all_ones(folder)
    (other / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes())  # with the tested manifest
    with pytest.raises(BundleError, match="was changed"):
        load_proven(settings(other), proofs)


def test_test_process_gets_no_secrets(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    environments: list[dict[str, str]] = []
    popen = subprocess.Popen

    def record(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        environments.append(options["env"])
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", record)
    monkeypatch.setenv("CAMCAL_API_KEY", "a-key-of-the-service-1")
    Proofs().require(settings(bundle.path))
    assert environments and not [name for name in environments[0] if name.startswith("CAMCAL_")]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('[' * 10_000)", "exited with code 0"),
        ("print('x' * 10**8)", "the process that tests the bundle"),
        ("import os; os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        ('print(\'{"digest": "no"}\')', "exited with code 0"),
        ('print(\'{"refused": "one\\\\n\\\\u001btwo"}\')', r"^one \?two$"),
    ],
)
def test_output_of_the_test_process_is_not_trusted(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    """A hostile bundle may take over the process that tests it."""
    popen = subprocess.Popen

    def other(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([command[0], "-c", program], **options)

    monkeypatch.setattr(subprocess, "Popen", other)
    with pytest.raises(BundleError, match=message):
        Proofs().require(settings(bundle.path))


def test_test_process_ends_with_the_server(bundle: Bundle, tmp_path: Path) -> None:
    folder = hostile.make(bundle.path, tmp_path / "bundle", hostile.endless_graph)
    fork = multiprocessing.get_context("fork")
    parent = fork.Process(target=lambda: Proofs().require(settings(folder)))
    parent.start()

    def trial() -> list[str]:
        command = ["pgrep", "-g", "0", "-P", str(parent.pid)]
        return subprocess.run(command[:1] + command[3:], capture_output=True, text=True).stdout.split()

    wait_for(lambda: bool(trial()))
    (child,) = map(int, trial())
    wait_for(lambda: "camcal.service.engine.probe" in Path(f"/proc/{child}/cmdline").read_text())
    # Before its call to prctl, the process can outlive its parent, until its own timeout.
    wait_for(lambda: Path(f"/proc/{child}/oom_score_adj").read_text().strip() == "1000")
    parent.kill()
    parent.join()
    wait_for(lambda: not os.path.exists(f"/proc/{child}") or "Z (zombie)" in Path(f"/proc/{child}/status").read_text())
