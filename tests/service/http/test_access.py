"""API keys through HTTP, and the wait of addresses that send wrong ones."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from camcal.models.bundle import Bundle
from camcal.service.http.access import MAX_ADDRESSES, Attempts
from camcal.service.keys import new_key
from tests.service.conftest import KEY, ClientFactory, TestClient, png
from tests.service.http.routes.test_predict import RAW, problem
from tests.service.test_keys import keys_file
from tests.service.test_live import process

ID = "a" * 22


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_wait_doubles_from_a_second_to_a_minute() -> None:
    now = 1000.0
    attempts = Attempts(2, lambda: now)
    assert [attempts.failed("a") for _ in range(9)] == [0, 0, 1, 2, 4, 8, 16, 32, 60]
    assert (attempts.wait_s("a"), attempts.wait_s("b")) == (60, 0)
    now += 59
    assert attempts.wait_s("a") == 1
    now += 2
    assert attempts.wait_s("a") == 0
    assert attempts.failed("a") == 60  # it is remembered
    now += 601
    assert attempts.failed("a") == 0


def test_addresses_are_bounded_and_the_oldest_is_forgotten() -> None:
    attempts = Attempts(1, lambda: 0.0)
    for number in range(MAX_ADDRESSES + 5):
        for _ in range(2):
            attempts.failed(str(number))
    assert len(attempts) == MAX_ADDRESSES
    assert (attempts.wait_s("0"), attempts.wait_s("5")) == (0, 1)


def test_no_limit_on_attempts() -> None:
    attempts = Attempts(0)
    assert {attempts.failed("a") for _ in range(100)} == {0} and len(attempts) == 0


def test_wrong_keys_make_an_address_wait(client_factory: ClientFactory, caplog: pytest.LogCaptureFixture) -> None:
    app = client_factory(api_key=KEY, key_attempts=2, trusted_proxies="127.0.0.1").app
    client = TestClient(app, client=("127.0.0.1", 4711))
    client.app.state.attempts = Attempts(2, lambda: 0.0)  # type: ignore[attr-defined]  # the time stands still

    def ask(key: str | None, address: str) -> Any:
        return client.get("/model", headers={"X-Forwarded-For": address} | (bearer(key) if key else {}))

    for _ in range(3):
        problem(ask("wrong", "203.0.113.7"), 401, "unauthorized")
    refused = ask(KEY, "203.0.113.7")
    assert "203.0.113.7 has sent too many invalid API keys" in problem(refused, 429, "too-many-attempts")
    assert refused.headers["retry-after"] == "1"
    problem(ask(None, "203.0.113.7"), 401, "unauthorized")
    assert ask(KEY, "203.0.113.8").is_success
    counted = client.get("/metrics").text
    for reason, count in (("wrong", 3), ("wait", 1), ("missing", 1), ("route", 0)):
        assert f'camcal_unauthorized_total{{reason="{reason}"}} {count}.0' in counted
    assert "203.0.113.7 has sent another invalid API key and has to wait for 1 s" in caplog.messages
    client.app.state.attempts = Attempts(2)  # type: ignore[attr-defined]
    assert ask(KEY, "203.0.113.7").is_success


def test_missing_key_is_no_attempt(client_factory: ClientFactory) -> None:
    client = client_factory(api_key=KEY, key_attempts=1)
    for _ in range(20):
        assert "send the API key as" in problem(client.get("/model"), 401, "unauthorized")
    assert client.get("/model", headers=bearer(KEY)).is_success


@pytest.mark.parametrize("group", ["predict", "cam", "model", "v2", "metrics"])
def test_key_opens_its_routes_alone(client_factory: ClientFactory, bundle: Bundle, tmp_path: Path, group: str) -> None:
    key, line = new_key("one", [group])
    client = client_factory(api_keys_file=keys_file(tmp_path, line), metrics_need_key=True)
    name = bundle.manifest.name
    routes = {
        "predict": [("POST", "/predict"), ("POST", "/predict/batch")],
        "cam": [("GET", f"/cam/{ID}"), ("DELETE", f"/cam/{ID}")],
        "model": [("GET", "/model")],
        "v2": [
            ("GET", f"/v2/models/{name}"),
            ("GET", f"/v2/models/{name}/ready"),
            ("POST", f"/v2/models/{name}/infer"),
        ],
        "metrics": [("GET", "/metrics")],
    }
    for other, calls in routes.items():
        for method, path in calls:
            answer = client.request(method, path, headers=bearer(key))
            assert (answer.status_code == 403) is (other != group), (method, path)
            assert client.request(method, path).status_code == 401
    said = f"the API key 'one' may not call this route; it may call {group}"
    refused = client.get("/model" if group != "model" else f"/cam/{ID}", headers=bearer(key))
    assert problem(refused, 403, "forbidden") == said
    for path in ("/", "/health/live", "/health/ready", "/v2/health/ready", "/v2", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_metrics_are_open_by_default(client_factory: ClientFactory) -> None:
    assert client_factory(api_key=KEY).get("/metrics").is_success
    closed = client_factory(api_key=KEY, metrics_need_key=True)
    problem(closed.get("/metrics"), 401, "unauthorized")
    assert closed.get("/metrics", headers=bearer(KEY)).is_success


@pytest.mark.parametrize("own", [True, False])
def test_rate_of_a_key(client_factory: ClientFactory, tmp_path: Path, own: bool) -> None:
    (slow, slow_line), (other, other_line) = new_key("slow", rate=0.01 if own else None), new_key("other", rate=1000)
    client = client_factory(api_keys_file=keys_file(tmp_path, slow_line, other_line), key_rate=0.5 if own else 0.01)
    assert client.get("/model", headers=bearer(slow)).is_success
    refused = client.get("/model", headers=bearer(slow))
    setting = "CAMCAL_API_KEYS_FILE" if own else "CAMCAL_KEY_RATE"
    said = problem(refused, 429, "rate-limited")
    assert said.startswith(f"key slow may send one request per 100 s ({setting}); wait for ")
    assert 90 < int(refused.headers["retry-after"]) <= 100
    for _ in range(3):
        assert client.get("/model", headers=bearer(other)).is_success


def predicted(client: TestClient, key: str) -> dict[str, Any]:
    body: dict[str, Any] = client.post("/predict", content=png(), headers=RAW | bearer(key)).json()
    return body


def test_heatmap_is_for_the_key_that_made_it(client_factory: ClientFactory, tmp_path: Path) -> None:
    (mine, my_line), (theirs, their_line) = new_key("mine"), new_key("theirs")
    client = client_factory(api_keys_file=keys_file(tmp_path, my_line, their_line), api_key=KEY)
    url = predicted(client, mine)["cam"]["url"]
    batch = client.post("/predict/batch", files={"image": png()}, headers=bearer(mine)).json()["results"][0]
    for path in (url, batch["cam"]["url"]):
        assert client.get(path, headers=bearer(mine)).is_success
        for key in (theirs, KEY):
            unknown = client.get(f"/cam/{ID}", headers=bearer(key))
            for method in ("GET", "DELETE"):
                answer = client.request(method, path, headers=bearer(key))
                assert problem(answer, 404, "not-found") == unknown.json()["detail"]
        etag = client.get(path, headers=bearer(mine)).headers["etag"]
        problem(client.get(path, headers=bearer(theirs) | {"If-None-Match": etag}), 404, "not-found")
    assert client.get(url, headers=bearer(mine)).is_success


def test_access_log_names_the_key(client_factory: ClientFactory, caplog: pytest.LogCaptureFixture) -> None:
    client = client_factory(api_key=KEY, access_log=True)
    with caplog.at_level(logging.INFO, "camcal.access"):
        predicted(client, KEY)
        predicted(client, "wrong")
    lines = [record.fields for record in caplog.records if record.name == "camcal.access"]  # type: ignore[attr-defined]
    assert [(line["key"], line["code"]) for line in lines] == [("default", 200), (None, 401)]
    assert KEY not in caplog.text and "wrong" not in caplog.messages[0]


def test_keys_change_without_a_restart(bundle: Bundle, tmp_path: Path) -> None:
    (old, old_line), (new, new_line) = new_key("mobile"), new_key("mobile")
    path = keys_file(tmp_path, old_line)
    with process(bundle, CAMCAL_WORKERS="2", CAMCAL_API_KEYS_FILE=str(path)) as (_, url):

        def answers(key: str) -> set[int]:
            return {httpx.get(f"{url}/model", headers=bearer(key)).status_code for _ in range(4)}  # of both workers

        assert answers(old) == {200}
        keys_file(tmp_path, "broken =")
        assert answers(old) == {200}
        keys_file(tmp_path, new_line)
        end = time.monotonic() + 30
        while answers(new) != {200}:
            assert time.monotonic() < end
            time.sleep(1.5)  # fewer wrong keys than make an address wait for long
        assert answers(old) == {401}
