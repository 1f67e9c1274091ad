"""A browser for the tests of the pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.browser import Tab, browser, find_chromium
from tests.service.conftest import png


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A tab of a real browser."""
    if (executable := find_chromium()) is None:
        pytest.skip("no Chromium or Chrome found: apt-get install chromium")
    with browser(executable, tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def tab(chromium: Tab) -> Iterator[Tab]:
    """The same, in which no error may have been logged by the end of the test."""
    chromium.open("about:blank")  # nothing more comes from the page of the test before
    chromium.console_errors.clear()
    yield chromium
    chromium.run("0")  # what was logged meanwhile has come
    assert chromium.console_errors == []


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png(7, (300, 200)))
    return path
