"""The API documentation: Swagger UI in a real browser, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from camcal.service.engine.session import Session
from camcal.service.http.app import create_app, openapi
from camcal.service.settings import Settings
from tests.service.browser import Tab
from tests.service.test_live import running

PREDICT, GET_CAM = "#operations-predict-predict", "#operations-heatmaps-get_cam"


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    with running(create_app(Settings(bundle=session.bundle.path, max_batch=session.max_batch), session)) as url:
        yield url


def opened(tab: Tab, url: str) -> list[str]:
    """Open the documentation; the operations that it lists, with their tags."""
    tab.open(f"{url}/docs")
    tab.wait("document.querySelector('.opblock') !== null")
    return list(tab.run("[...document.querySelectorAll('.opblock')].map((block) => block.id)"))


def test_all_operations_are_listed(tab: Tab, url: str) -> None:
    document = openapi(create_app())
    paths: dict[str, dict[str, dict[str, str]]] = document["paths"]  # type: ignore[assignment]
    expected = [f"operations-{o['tags'][0]}-{o['operationId']}" for path in paths.values() for o in path.values()]
    assert sorted(opened(tab, url)) == sorted(expected)


def test_all_operations_unfold(tab: Tab, url: str) -> None:
    for name in opened(tab, url):
        tab.run(f"document.querySelector('#{name} .opblock-summary-control').click()")
        tab.wait(f"document.querySelector('#{name} .responses-wrapper .response') !== null")
    assert "sum to the score they explain" in tab.text(".info .description")
    assert "Number of classes to return" in tab.text(PREDICT)


def test_an_image_is_classified_and_its_heatmap_shown(tab: Tab, url: str, photo: Path) -> None:
    opened(tab, url)
    for operation in (PREDICT, GET_CAM):
        tab.run(f"document.querySelector('{operation} .opblock-summary-control').click()")
        tab.wait(f"document.querySelector('{operation} .try-out__btn') !== null")
        tab.run(f"document.querySelector('{operation} .try-out__btn').click()")
        tab.wait(f"document.querySelector('{operation} button.execute') !== null")
    tab.choose(f"{PREDICT} input[type=file]", photo)
    tab.run(f"document.querySelector('{PREDICT} button.execute').click()")
    answer = f"document.querySelector('{PREDICT} .live-responses-table .highlight-code code')"
    prediction = tab.wait(f"{answer} && JSON.parse({answer}.innerText)")
    assert prediction["image"] == {"width": 300, "height": 200}

    tab.run(f"document.querySelector('{GET_CAM} tr[data-param-name=id] input').focus()")
    tab.call("Input.insertText", text=prediction["id"])
    tab.run("document.activeElement.blur()")  # Swagger UI reads it now, or after a while
    tab.run(f"document.querySelector('{GET_CAM} button.execute').click()")
    assert tab.wait(f"document.querySelector('{GET_CAM} .live-responses-table img')?.naturalWidth") == 384


def test_descriptions_are_plain_text_and_markup(tab: Tab, url: str) -> None:
    opened(tab, url)
    for html, shown in (("<p>a <code>b</code></p>", "a b"), ("<b onclick='x()'>a</b>", "<b onclick='x()'>a</b>")):
        element = "const element = document.createElement('div')"
        script = f"{element}; element.innerHTML = {json.dumps(html)}; return element.textContent"
        assert tab.run(f"(() => {{ {script}; }})()") == shown
