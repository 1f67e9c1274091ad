"""Blocks of the documents that say so are run, each document in a scratch folder that looks like a clone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest

from camcal.training.run import RunFolder
from tests.documents import ROOT, Block, blocks, documents

RUN = [document for document in documents() if any(b.marker in ("run", "run: background") for b in blocks(document))]
SHOWN_ADDRESS = "127.0.0.1:8000"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the files of a clone, photographs, and a `camcal` on its path."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("runs", "build", "dist", "site"):
            (folder / entry.name).symlink_to(entry)
    (folder / "folder").mkdir()
    for name in ("photo.jpg", "folder/photo.jpg"):
        shutil.copy(ROOT / "docs" / "images" / "platypus.jpg", folder / name)
    command = tmp_path / "bin" / "camcal"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m camcal "$@"\n')
    command.chmod(0o755)
    return folder


@pytest.mark.parametrize("document", RUN, ids=[str(document.relative_to(ROOT)) for document in RUN])
def test_blocks_run(document: Path, clone: Path, request: pytest.FixtureRequest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if "runs/digits" in document.read_text():
        run: RunFolder = request.getfixturevalue("digits_run")
        shutil.copytree(run.path, clone / "runs" / "digits")
    path = f"{clone.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CAMCAL_PORT": str(port), "CAMCAL_DRAIN_S": "0", "NO_PROXY": "*"}
    printed = ""
    with ExitStack() as services:
        for block in blocks(document):
            if block.marker == "output":
                assert [line for line in block.text.splitlines() if _words(line) not in printed] == [], str(block)
                continue
            words = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            words.append(block.text.replace(SHOWN_ADDRESS, f"127.0.0.1:{port}"))
            if block.marker == "run: background":
                services.enter_context(serving(block, words, clone, environment, port))
            elif block.marker == "run":
                ended = subprocess.run(
                    words, cwd=clone, env=environment, capture_output=True, text=True, timeout=600, check=False
                )
                assert ended.returncode == 0, f"{block}\n{ended.stdout}\n{ended.stderr}"
                assert "Traceback" not in ended.stderr
                printed = _words(ended.stdout)


def _words(text: str) -> str:
    """Columns may be wider or narrower."""
    return " ".join(text.split())


@contextmanager
def serving(block: Block, words: list[str], clone: Path, environment: dict[str, str], port: int) -> Iterator[None]:
    """The service that a block starts, from when it is ready."""
    log = clone.parent / "service.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            words, cwd=clone, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        opener = build_opener(ProxyHandler({}))
        while True:
            assert process.poll() is None, f"{block}\n{log.read_text()}"
            assert time.monotonic() < deadline, f"{block} is not ready\n{log.read_text()}"
            try:
                opener.open(f"http://127.0.0.1:{port}/health/ready", timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(0.1)
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM), log.read_text()
