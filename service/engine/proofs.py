"""Which bundles may be loaded: those that were tried before, in a process of their own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from camcal.models.bundle import BundleError, manifest_checksum
from camcal.models.untrusted import illegible
from camcal.service.children import command, environment
from camcal.service.settings import Settings

if sys.platform != "win32":
    import fcntl

KEPT = 16  # bundles that need no second trial
MAX_ANSWER = 16 * 2**10  # bytes
SHOWN = 500  # characters of a reason
TURN_S = 0.02  # between two looks whether another worker's trial has ended
CHOSEN = {"device", "sessions", "max_batch", "intra_threads", "max_model_bytes", "load_timeout_s", "load_bytes"}


class Proofs:
    """Remembers bundles by the checksum of their manifest, which vouches for every file.

    Workers that are forked from one process share their memory and take turns, so that each bundle is tried once, by
    whoever comes first.
    """

    def __init__(self) -> None:
        if sys.platform == "linux":
            self._shared = os.memfd_create("camcal-proofs")
        else:
            self._shared, path = tempfile.mkstemp(prefix="camcal-")
            os.unlink(path)
        weakref.finalize(self, os.close, self._shared)
        self._guard = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def require(self, settings: Settings) -> str:
        """The checksum of the manifest in the folder of `settings`, whose bundle has been tried.

        Raises:
            BundleError: if it was refused, ended the process that tried it, or took longer than `load_timeout_s`.
        """
        begun = time.monotonic()
        wanted = manifest_checksum(settings.bundle)
        with self._turn(begun + (settings.workers + 1) * settings.load_timeout_s):
            proven, refused = self._recall()
            if wanted in proven:
                return wanted
            # A refusal is told to those who asked before it; whoever asks later gets another trial.
            if refused is not None and refused["digest"] == wanted and refused["at"] >= begun:
                raise BundleError(refused["reason"])
            try:
                digest = self._try(settings)
            except BundleError as error:
                self._remember(proven, {"digest": wanted, "at": time.monotonic(), "reason": str(error)})
                raise
            self._remember([*proven, digest][-KEPT:], None)
            return digest

    def close(self) -> None:
        """End a trial that goes on, and begin no other."""
        with self._guard:
            self._closed = True
            if self._child is not None:
                _kill(self._child)

    def _try(self, settings: Settings) -> str:
        chosen = settings.model_dump(mode="json", include=CHOSEN) | {"bundle": str(settings.bundle.absolute())}
        with self._started(chosen) as child:
            said = _hear(child, time.monotonic() + settings.load_timeout_s)
        if said is None:
            raise BundleError(
                f"the bundle was not loaded and tried within {settings.load_timeout_s:g} s (CAMCAL_LOAD_TIMEOUT_S)"
            )
        answer = _parsed(said)
        if "digest" in answer:
            return answer["digest"]
        if "refused" in answer:
            reason = _one_line(answer["refused"])
            if re.search("alloc|memory", reason, re.IGNORECASE):  # as numpy and ONNX Runtime say in many ways
                reason += f"; a trial may take {settings.load_bytes} bytes (CAMCAL_LOAD_BYTES)"
            raise BundleError(reason)
        limits = f"{settings.load_timeout_s:g} s (CAMCAL_LOAD_TIMEOUT_S) and {settings.load_bytes} bytes of memory"
        raise BundleError(
            f"the process that tried the bundle {_ended(child.returncode)}; its limits are {limits} (CAMCAL_LOAD_BYTES)"
        )

    @contextlib.contextmanager
    def _started(self, chosen: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
        """The process; killed, with whatever it has started, at the end of the block."""
        with self._guard:
            if self._closed:
                raise BundleError("the service is shutting down")
            try:
                child = self._child = subprocess.Popen(
                    command("camcal.service.engine.probe", json.dumps(chosen)),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=environment(),
                    start_new_session=True,
                )
            except OSError as error:  # no process or file descriptor is left
                raise BundleError(f"no process could be started to try the bundle: {error.strerror}") from None
        try:
            yield child
        finally:
            _kill(child)
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
            self._child = None

    @contextlib.contextmanager
    def _turn(self, deadline: float) -> Iterator[None]:
        """Among several workers, one at a time."""
        if sys.platform == "win32":  # there are none
            yield
            return
        while True:
            try:
                fcntl.lockf(self._shared, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when its process ends
                break
            except OSError:
                if self._closed or time.monotonic() > deadline:
                    raise BundleError("another worker has been trying a bundle for too long") from None
                time.sleep(TURN_S)
        try:
            yield
        finally:
            fcntl.lockf(self._shared, fcntl.LOCK_UN)

    def _recall(self) -> tuple[list[str], dict[str, Any] | None]:
        os.lseek(self._shared, 0, os.SEEK_SET)
        try:
            proven, refused = json.loads(os.read(self._shared, MAX_ANSWER))
        except ValueError:  # it is empty, or the process that wrote it was killed
            return [], None
        return proven, refused

    def _remember(self, proven: list[str], refused: dict[str, Any] | None) -> None:
        os.ftruncate(self._shared, 0)
        os.lseek(self._shared, 0, os.SEEK_SET)
        os.write(self._shared, json.dumps([proven, refused]).encode())


def _hear(child: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """What the process writes until it ends, or a little more than is allowed; None if it has not ended in time."""
    assert child.stdout is not None
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while len(said) <= MAX_ANSWER:
            if (remaining_s := deadline - time.monotonic()) <= 0:
                return None
            if selector.select(remaining_s):
                part = os.read(child.stdout.fileno(), 4096)
                if not part:
                    # It is about to end; its exit status says how.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(1.0)
                    break
                said += part
    return said


def _parsed(said: bytes) -> dict[str, str]:
    """The answer of a process that may have been taken over: `digest` or `refused`, or nothing."""
    try:
        answer = json.loads(said) if len(said) <= MAX_ANSWER else None
    except (ValueError, RecursionError):
        return {}
    match answer:
        case {"digest": str(digest)} if len(digest) == 64 and digest.isalnum() and digest.isascii():
            return {"digest": digest}
        case {"refused": str(reason)}:
            return {"refused": reason}
    return {}


def _one_line(reason: str) -> str:
    """A reason without what could forge a line of the log."""
    return "".join("?" if illegible(character) else character for character in " ".join(reason.split()))[:SHOWN]


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(child.pid, signal.SIGKILL)
            else:
                child.kill()
