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

PATIENT_S = 120.0  # for a trial that should succeed, on a machine that is busy with something else


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the processes that were started."""
    started: list[list[str]] = []
    popen = subprocess.Popen

    def noted(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(command)
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", noted)
    return started


def settings(folder: Path, **chosen: object) -> Settings:
    return Settings(bundle=folder, max_batch=1, intra_threads=1, **{"load_timeout_s": PATIENT_S} | chosen)  # type: ignore[arg-type]


def test_a_bundle_is_tried_once(bundle: Bundle, trials: list[list[str]]) -> None:
    proofs = Proofs()
    assert proofs.require(settings(bundle.path)) == bundle.digest
    assert proofs.require(settings(bundle.path)) == bundle.digest
    assert len(trials) == 1
    assert load_proven(settings(bundle.path), proofs)[0].bundle.digest == bundle.digest


@pytest.mark.parametrize("name", [name for name in hostile.HOSTILE if name not in hostile.ENDLESS])
def test_hostile_bundle_is_refused(bundle: Bundle, tmp_path: Path, name: str) -> None:
    spoil, said = hostile.HOSTILE[name]
    folder = hostile.make(bundle.path, tmp_path / "bundle", spoil)
    with pytest.raises(BundleError) as refused:
        Proofs().require(settings(folder))
    assert re.search(said, str(refused.value)), refused.value
    assert len(str(refused.value)) <= 600 and str(refused.value).isprintable()


@pytest.mark.parametrize("name", hostile.ENDLESS)
def test_endless_bundle_is_given_up(bundle: Bundle, tmp_path: Path, name: str, trials: list[list[str]]) -> None:
    spoil, said = hostile.HOSTILE[name]
    folder, proofs = hostile.make(bundle.path, tmp_path / "bundle", spoil), Proofs()
    for _ in range(2):  # whoever asks again gets another trial
        begun = time.monotonic()
        with pytest.raises(BundleError, match=said):
            proofs.require(settings(folder, load_timeout_s=1.5))
        assert time.monotonic() - begun < 15
    assert len(trials) == 2


def test_the_end_of_the_service_ends_a_trial(bundle: Bundle, tmp_path: Path, trials: list[list[str]]) -> None:
    folder, proofs = hostile.make(bundle.path, tmp_path / "bundle", hostile.endless_graph), Proofs()
    refused: list[str] = []

    def ask() -> None:
        with pytest.raises(BundleError) as error:
            proofs.require(settings(folder))
        refused.append(str(error.value))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: len(trials) == 1)
    proofs.close()
    thread.join(20)
    assert len(refused) == 1 and "ended by SIGKILL" in refused[0] or "shutting down" in refused[0]
    with pytest.raises(BundleError, match="shutting down"):
        proofs.require(settings(folder))


@pytest.mark.parametrize("spoil", [lambda folder: None, hostile.not_finite])
def test_workers_share_one_trial(bundle: Bundle, tmp_path: Path, spoil: hostile.Spoil) -> None:
    folder = hostile.make(bundle.path, tmp_path / "bundle", spoil)
    fork = multiprocessing.get_context("fork")
    proofs, answers, started = Proofs(), fork.SimpleQueue(), fork.SimpleQueue()

    def work() -> None:
        popen = subprocess.Popen

        def noted(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            started.put(command)
            return popen(command, **options)

        subprocess.Popen = noted  # type: ignore[assignment,misc]
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


def test_what_was_tried_is_what_is_loaded(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, proofs = hostile.make(bundle.path, tmp_path / "bundle", lambda folder: None), Proofs()
    proofs.require(settings(folder))
    hostile.not_finite(folder)  # another manifest: it gets a trial of its own
    with pytest.raises(BundleError, match="not finite"):
        load_proven(settings(folder), proofs)
    other = hostile.make(bundle.path, tmp_path / "other", lambda folder: None)
    proofs.require(settings(other))
    hostile.all_ones(folder)
    (other / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes())  # under the manifest that was tried
    with pytest.raises(BundleError, match="was changed"):
        load_proven(settings(other), proofs)


def test_the_trial_gets_no_secrets(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    environments: list[dict[str, str]] = []
    popen = subprocess.Popen

    def noted(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        environments.append(options["env"])
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setenv("CAMCAL_API_KEY", "a-key-of-the-service-1")
    Proofs().require(settings(bundle.path))
    assert environments and not [name for name in environments[0] if name.startswith("CAMCAL_")]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('[' * 10_000)", "ended with code 0"),
        ("print('x' * 10**8)", "the process that tried the bundle"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ('print(\'{"digest": "no"}\')', "ended with code 0"),
        ('print(\'{"refused": "one\\\\n\\\\u001btwo"}\')', r"^one \?two$"),
    ],
)
def test_an_answer_is_not_believed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, program: str, said: str) -> None:
    """The process may have been taken over by what it loads."""
    popen = subprocess.Popen

    def other(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([command[0], "-c", program], **options)

    monkeypatch.setattr(subprocess, "Popen", other)
    with pytest.raises(BundleError, match=said):
        Proofs().require(settings(bundle.path))


def test_trial_ends_with_the_service(bundle: Bundle, tmp_path: Path) -> None:
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
    # Until it has asked the kernel to end with its parent, it can outlive it, for the time limit and two seconds.
    wait_for(lambda: Path(f"/proc/{child}/oom_score_adj").read_text().strip() == "1000")
    parent.kill()
    parent.join()
    wait_for(lambda: not os.path.exists(f"/proc/{child}") or "Z (zombie)" in Path(f"/proc/{child}/status").read_text())
