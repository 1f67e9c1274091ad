"""Only bundles that passed a test in a separate process may be loaded."""

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

MAX_PROVEN = 16  # number of bundles whose test is remembered
MAX_RESULT_BYTES = 16 * 2**10
MAX_REASON = 500  # characters
POLL_S = 0.02  # interval at which a worker checks whether another worker's test has ended
TESTED_SETTINGS = {
    "device",
    "sessions",
    "max_batch",
    "intra_threads",
    "max_model_bytes",
    "load_timeout_s",
    "load_bytes",
}


class Proofs:
    """Tests bundles, and remembers those that passed by their manifest's checksum. The manifest lists all checksums.

    Forked workers share one memory file and take turns, so that each bundle is tested only once.
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
        """Test the bundle of `settings`, unless it has passed before. Returns the checksum of its manifest.

        Raises:
            BundleError: if the bundle is refused, crashes the test process, or exceeds `load_timeout_s`.
        """
        started = time.monotonic()
        current = manifest_checksum(settings.bundle)
        with self._lock(started + (settings.workers + 1) * settings.load_timeout_s):
            proven, refused = self._recall()
            if current in proven:
                return current
            # A refusal also answers the calls that were waiting for it. Later calls start another test.
            if refused is not None and refused["digest"] == current and refused["at"] >= started:
                raise BundleError(refused["reason"])
            try:
                digest = self._test(settings)
            except BundleError as error:
                self._remember(proven, {"digest": current, "at": time.monotonic(), "reason": str(error)})
                raise
            self._remember([*proven, digest][-MAX_PROVEN:], None)
            return digest

    def close(self) -> None:
        """Stop a running test, and start no other."""
        with self._guard:
            self._closed = True
            if self._child is not None:
                _kill(self._child)

    def _test(self, settings: Settings) -> str:
        values = settings.model_dump(mode="json", include=TESTED_SETTINGS) | {"bundle": str(settings.bundle.absolute())}
        with self._process(values) as child:
            output = _read_output(child, time.monotonic() + settings.load_timeout_s)
        if output is None:
            raise BundleError(
                f"loading and testing the bundle took more than {settings.load_timeout_s:g} s (CAMCAL_LOAD_TIMEOUT_S)"
            )
        result = _parse(output)
        if "digest" in result:
            return result["digest"]
        if "refused" in result:
            reason = _one_line(result["refused"])
            if re.search("alloc|memory", reason, re.IGNORECASE):  # numpy and ONNX Runtime have many such messages
                reason += f"; the memory limit is {settings.load_bytes} bytes (CAMCAL_LOAD_BYTES)"
            raise BundleError(reason)
        limits = f"{settings.load_timeout_s:g} s (CAMCAL_LOAD_TIMEOUT_S) and {settings.load_bytes} bytes of memory"
        raise BundleError(
            f"the process that tests the bundle {_describe_exit(child.returncode)}; "
            f"its limits are {limits} (CAMCAL_LOAD_BYTES)"
        )

    @contextlib.contextmanager
    def _process(self, values: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
        """Start the test process. At the end of the block it is killed together with its children."""
        with self._guard:
            if self._closed:
                raise BundleError("the service is shutting down")
            try:
                child = self._child = subprocess.Popen(
                    command("camcal.service.engine.probe", json.dumps(values)),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=environment(),
                    start_new_session=True,
                )
            except OSError as error:  # too many processes or open files
                raise BundleError(f"cannot start a process to test the bundle: {error.strerror}") from None
        try:
            yield child
        finally:
            _kill(child)
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
            self._child = None

    @contextlib.contextmanager
    def _lock(self, deadline: float) -> Iterator[None]:
        """Let only one worker test a bundle at a time."""
        if sys.platform == "win32":  # always a single worker
            yield
            return
        while True:
            try:
                fcntl.lockf(self._shared, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
                break
            except OSError:
                if self._closed or time.monotonic() > deadline:
                    raise BundleError("timeout while waiting for another worker to test a bundle") from None
                time.sleep(POLL_S)
        try:
            yield
        finally:
            fcntl.lockf(self._shared, fcntl.LOCK_UN)

    def _recall(self) -> tuple[list[str], dict[str, Any] | None]:
        os.lseek(self._shared, 0, os.SEEK_SET)
        try:
            proven, refused = json.loads(os.read(self._shared, MAX_RESULT_BYTES))
        except ValueError:  # empty, or its writer was killed
            return [], None
        return proven, refused

    def _remember(self, proven: list[str], refused: dict[str, Any] | None) -> None:
        os.ftruncate(self._shared, 0)
        os.lseek(self._shared, 0, os.SEEK_SET)
        os.write(self._shared, json.dumps([proven, refused]).encode())


def _read_output(child: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """Read until end of file, or until the output is too long. Returns None on timeout."""
    assert child.stdout is not None
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while len(output) <= MAX_RESULT_BYTES:
            if (remaining_s := deadline - time.monotonic()) <= 0:
                return None
            if selector.select(remaining_s):
                part = os.read(child.stdout.fileno(), 4096)
                if not part:
                    # The process is about to end; wait for its exit status.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(1.0)
                    break
                output += part
    return output


def _parse(output: bytes) -> dict[str, str]:
    """The result of the test: `digest`, `refused`, or empty. A hostile bundle may have taken over the process."""
    try:
        result = json.loads(output) if len(output) <= MAX_RESULT_BYTES else None
    except (ValueError, RecursionError):
        return {}
    match result:
        case {"digest": str(digest)} if len(digest) == 64 and digest.isalnum() and digest.isascii():
            return {"digest": digest}
        case {"refused": str(reason)}:
            return {"refused": reason}
    return {}


def _one_line(reason: str) -> str:
    """`reason` without characters that could forge a log line."""
    return "".join("?" if illegible(character) else character for character in " ".join(reason.split()))[:MAX_REASON]


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(child.pid, signal.SIGKILL)
            else:
                child.kill()
