"""Clients of the service with a small real bundle, and a session whose inference a test can block."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from camcal.models.bundle import Bundle
from camcal.service.engine.batching import Batcher, InferenceResult
from camcal.service.engine.session import ImageBatch, Outputs, Session
from camcal.service.http.app import create_app
from camcal.service.settings import PREFIX, Settings

with warnings.catch_warnings():
    # Starlette's next major version replaces httpx as its client library.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient as TestClient

ClientFactory = Callable[..., TestClient]

KEY = "0123456789-secret"  # the weakest API key that is accepted


class GatedSession(Session):
    """A real session whose inference blocks between `close` and `open`, and fails while `failing` is set."""

    def __init__(self, bundle: Bundle, **options: Any) -> None:
        self._open = threading.Event()
        self._open.set()
        self.waiting = threading.Semaphore(0)  # released once for each blocked batch
        self.sizes: list[int] = []
        self.failing = False
        super().__init__(bundle, **options)

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def run(self, images: ImageBatch, top_k: int, alone: bool = True) -> Outputs:
        if not self._open.is_set():
            self.waiting.release()
            assert self._open.wait(20)
        if self.failing:
            raise ArithmeticError("boom")
        self.sizes.append(len(images))
        return super().run(images, top_k, alone)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove settings of the developer's environment."""
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def bundle(digits_bundle: Path) -> Bundle:
    return Bundle.load(digits_bundle)


@pytest.fixture(scope="session")
def session(bundle: Bundle) -> Session:
    return Session(bundle, device="cpu", threads=1)


@pytest.fixture
def gated(bundle: Bundle) -> Iterator[GatedSession]:
    gated = GatedSession(bundle, device="cpu", threads=1, pad=True)
    yield gated
    gated.open()


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one for each image that is submitted to the batcher, after it was decoded."""
    submit, submitted = Batcher.submit, list[object]()

    async def record(*args: Any, **options: Any) -> InferenceResult:
        submitted.append(args)
        return await submit(*args, **options)

    monkeypatch.setattr(Batcher, "submit", record)
    return submitted


@pytest.fixture
def current(tmp_path: Path, bundle: Bundle) -> Callable[[Path], Path]:
    """Atomically points the symbolic link `current` at a bundle and returns the link; it starts at `bundle`."""

    def point(target: Path) -> Path:
        (tmp_path / "next").symlink_to(target)
        os.replace(tmp_path / "next", tmp_path / "current")
        return tmp_path / "current"

    point(bundle.path)
    return point


@pytest.fixture
def client_factory(session: Session) -> Iterator[ClientFactory]:
    """Starts an app and returns its client. Keyword arguments are settings; `session` replaces the session."""
    with ExitStack() as stack:

        def make(session: Session = session, **settings: Any) -> TestClient:
            options = {"timeout_s": 60} | settings  # long enough for a busy machine
            merged = Settings(bundle=session.bundle.path, max_batch=session.max_batch, **options)
            return stack.enter_context(TestClient(create_app(merged, session)))

        yield make


@pytest.fixture
def client(client_factory: ClientFactory) -> TestClient:
    return client_factory()


def picture(seed: int = 0, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Image.Image:
    """A smooth random image."""
    small = np.random.default_rng(seed).integers(0, 256, size=(6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(seed: int = 0, size: tuple[int, int] = (60, 40)) -> bytes:
    return encoded(picture(seed, size))
