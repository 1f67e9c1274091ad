"""Request bodies are freed with their responses, not by the next full garbage collection; freed memory is released."""

from __future__ import annotations

import gc
import logging
import platform
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from camcal.service.http import body
from tests.service.conftest import ClientFactory, GatedSession, TestClient, encoded, picture, png
from tests.service.crafted import CASES
from tests.service.http.routes.test_predict import RAW
from tests.service.test_live import wait_for

pytestmark = pytest.mark.skipif(sys.implementation.name != "cpython", reason="needs reference counts")


class Body(bytearray):
    """A body that can be weakly referenced."""


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Body]]]:
    """Weak references to all request bodies; the garbage collector is off meanwhile."""
    references: list[weakref.ref[Body]] = []

    def new() -> Body:
        body = Body()
        references.append(weakref.ref(body))
        return body

    monkeypatch.setattr(body, "bytearray", new, raising=False)
    monkeypatch.setattr(logging.getLogger("camcal"), "disabled", True)  # pytest would keep logged errors alive
    gc.collect()
    gc.disable()
    yield references
    gc.enable()


def freed(bodies: list[weakref.ref[Body]]) -> bool:
    return bool(bodies) and all(body() is None for body in bodies)


def send(client: TestClient, data: bytes, **headers: str) -> Any:  # the response of the client in use
    return client.post("/predict", content=data, headers=RAW | headers)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (png(), 200),
        (b"no image", 415),
        (encoded(picture())[:200], 422),
        (CASES["no-end.jpg"](), 422),  # in the process for large images
        (CASES["one-column.png"](), 413),
    ],
)
def test_after_a_response(
    client_factory: ClientFactory, bodies: list[weakref.ref[Body]], data: bytes, status: int
) -> None:
    assert send(client_factory(), data).status_code == status
    wait_for(lambda: freed(bodies))


def test_after_a_form_and_a_batch(client_factory: ClientFactory, bodies: list[weakref.ref[Body]]) -> None:
    client = client_factory()
    assert client.post("/predict", files={"image": b"no image"}).status_code == 415
    assert client.post("/predict", files={"other": b"x"}).status_code == 400
    images = [("image", png()), ("image", b"no image"), ("image", CASES["no-end.jpg"]())]
    assert client.post("/predict/batch", files=images).status_code == 200
    wait_for(lambda: freed(bodies))


def test_after_a_large_image(client_factory: ClientFactory, bodies: list[weakref.ref[Body]]) -> None:
    assert send(client_factory(decode_bytes=100), png()).status_code == 200
    wait_for(lambda: freed(bodies))


def test_after_a_deadline(client_factory: ClientFactory, gated: GatedSession, bodies: list[weakref.ref[Body]]) -> None:
    client = client_factory(session=gated)
    gated.close()
    first = threading.Thread(target=send, args=(client, png()))
    first.start()
    assert gated.waiting.acquire(timeout=20)
    assert send(client, png(), **{"X-Request-Timeout-Ms": "200"}).status_code == 504
    gated.open()
    first.join()
    wait_for(lambda: freed(bodies))


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_after_a_model_failure(
    client_factory: ClientFactory, gated: GatedSession, bodies: list[weakref.ref[Body]], path: str
) -> None:
    client = client_factory(session=gated)
    gated.failing = True
    assert client.post(path, files={"image": png()}).status_code == (500 if path == "/predict" else 200)
    wait_for(lambda: freed(bodies))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries release freed memory differently")
def test_freed_memory_is_released() -> None:
    """Blocks below one that is still in use, which glibc keeps for later."""
    script = """
import ctypes
from pathlib import Path
from camcal.service.memory import release_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(100_000) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
above, full = libc.malloc(100_000), resident()
for block in blocks:
    libc.free(block)
kept = resident()
release_memory()
print(full - kept, full - resident())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    before, after = map(int, found.split())
    assert before < 20_000_000 and after > 80_000_000
