"""Headers for browsers, other web pages, and other host names."""

from __future__ import annotations

import pytest

from camcal.models.bundle import Bundle
from camcal.service.http.routes import model
from camcal.service.settings import Settings
from tests.service.conftest import KEY, ClientFactory, TestClient, png
from tests.service.http.routes.test_predict import RAW, problem

APP = "https://app.example.org"
PREFLIGHT = {"Origin": APP, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}


def test_every_answer_has_the_headers(client: TestClient) -> None:
    url = client.post("/predict", content=png(), headers=RAW).json()["cam"]["url"]
    for answer in (
        client.get("/"),
        client.get("/model"),
        client.get("/metrics"),
        client.get("/health/ready"),
        client.get("/nope"),
        client.get(url),
        client.get(f"/cam/{'a' * 22}"),
        client.post("/predict", content=png(), headers=RAW),
        client.post("/predict", content=b"no image", headers=RAW),
    ):
        headers = answer.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert not {"server", "access-control-allow-origin", "set-cookie"} & set(headers)
        assert len(headers.get_list("content-security-policy")) == len(headers.get_list("cache-control")) == 1


def test_only_heatmaps_and_the_page_may_be_kept(client: TestClient) -> None:
    predicted = client.post("/predict", content=png(), headers=RAW)
    assert client.get(predicted.json()["cam"]["url"]).headers["cache-control"].startswith("private, max-age=")
    assert client.get("/page.js").headers["cache-control"] == "no-cache"
    for answer in (predicted, client.get("/nope"), client.get("/model"), client.get(f"/cam/{'a' * 22}")):
        assert answer.headers["cache-control"] == "no-store"


def test_no_other_page_by_default(client: TestClient) -> None:
    assert client.options("/predict", headers=PREFLIGHT).status_code == 405
    assert "access-control-allow-origin" not in client.get("/model", headers={"Origin": APP}).headers


def test_page_of_an_allowed_origin(client_factory: ClientFactory) -> None:
    client = client_factory(cors_origins=(APP,), api_key=KEY)
    asked = client.options("/predict", headers=PREFLIGHT)
    assert (asked.status_code, asked.content) == (204, b"")
    assert asked.headers["access-control-allow-origin"] == APP
    assert "X-API-Key" in asked.headers["access-control-allow-headers"]
    assert "DELETE" in asked.headers["access-control-allow-methods"]
    assert asked.headers["x-request-id"]
    for key, status in ((KEY, 200), ("wrong", 401)):
        answer = client.post("/predict", content=png(), headers=RAW | {"Origin": APP, "X-API-Key": key})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == APP
        assert "Origin" in answer.headers["vary"]
        exposed = answer.headers["access-control-expose-headers"]
        assert {"X-Request-Id", "Server-Timing", "Retry-After", "ETag"} <= set(exposed.split(", "))
        assert "access-control-allow-credentials" not in answer.headers
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_unexpected_error_has_cors_headers(client_factory: ClientFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_factory(cors_origins=(APP,))

    def fail(*args: object) -> None:
        raise ArithmeticError("boom")

    monkeypatch.setattr(model, "describe", fail)
    response = client.get("/model", headers={"Origin": APP})
    problem(response, 500, "internal")
    assert response.headers["access-control-allow-origin"] == APP
    assert "X-Request-Id" in response.headers["access-control-expose-headers"].split(", ")
    assert response.headers["x-request-id"] and response.headers["x-content-type-options"] == "nosniff"


def test_unknown_host_has_cors_headers(client_factory: ClientFactory) -> None:
    client = client_factory(cors_origins=(APP,), allowed_hosts=("api.example.org",))
    headers = {"Origin": APP, "Host": "example.com"}
    assert client.options("/predict", headers=PREFLIGHT | headers).status_code == 204  # or no page could read the 421
    for origin, allowed in ((APP, APP), ("https://evil.example.org", None)):
        response = client.get("/model", headers=headers | {"Origin": origin})
        problem(response, 421, "unknown-host")
        assert response.headers.get("access-control-allow-origin") == allowed


def test_refusal_for_want_of_room_can_be_read_by_a_page(client_factory: ClientFactory) -> None:
    client = client_factory(cors_origins=(APP,), queue_limit=1)
    with client.app.state.runtime.admission.ticket("127.0.0.1") as ticket:  # type: ignore[attr-defined]  # any ASGI app
        ticket.join()
        answer = client.post("/predict", content=png(), headers=RAW | {"Origin": APP})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (429, APP)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"Origin": "https://evil.example.org"}, "origin"),
        ({"Access-Control-Request-Method": "PUT"}, "method"),
        ({"Access-Control-Request-Headers": "x-other"}, "headers"),
    ],
)
def test_other_pages_methods_and_headers_are_refused(
    client_factory: ClientFactory, change: dict[str, str], what: str
) -> None:
    client = client_factory(cors_origins=(APP,))
    answer = client.options("/predict", headers=PREFLIGHT | change)
    assert problem(answer, 403, "forbidden") == f"{what} not allowed for cross-origin requests (CAMCAL_CORS_ORIGINS)"
    if what == "origin":
        assert "access-control-allow-origin" not in answer.headers


def test_every_origin(client_factory: ClientFactory) -> None:
    client = client_factory(cors_origins=("*",))
    answer = client.post("/predict", content=png(), headers=RAW | {"Origin": "https://any.example.com"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("host", ["api.example.org", "API.example.org:8000", "api.example.org.", "a.b.example.com"])
def test_allowed_host(client_factory: ClientFactory, host: str) -> None:
    client = client_factory(allowed_hosts=("api.example.org", "*.example.com"))
    assert client.get("/model", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["example.com", "evil.org", "", "api.example.org.evil.org", "127.0.0.1:8000", "[::1]"])
def test_other_host(client_factory: ClientFactory, host: str) -> None:
    client = client_factory(allowed_hosts=("api.example.org", "*.example.com"))
    answer = client.post("/predict", content=png(), headers=RAW | {"Host": host})
    assert "CAMCAL_ALLOWED_HOSTS" in problem(answer, 421, "unknown-host")
    assert answer.headers["x-request-id"]
    assert "error" in client.get("/v2", headers={"Host": host}).json()
    for path in ("/health/live", "/health/ready", "/v2/health/ready"):  # probes call by address
        assert client.get(path, headers={"Host": host}).status_code == 200


def test_any_host_by_default(client: TestClient) -> None:
    assert client.get("/model", headers={"Host": "evil.org"}).status_code == 200


def test_origins_of_the_environment(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    monkeypatch.setenv("CAMCAL_CORS_ORIGINS", f"{APP},http://localhost:3000")
    assert Settings(bundle=bundle.path).cors_origins == (APP, "http://localhost:3000")
