"""The small routes: model, health, metrics, page, and what holds for all of them."""

from __future__ import annotations

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from camcal.models.bundle import Bundle, BundleError
from camcal.service.http.app import create_app
from camcal.service.http.routes.model import describe
from camcal.service.http.schemas import Contributions, ModelDescription, Prediction
from camcal.service.metrics import STAGES, Metrics
from camcal.service.settings import Settings
from tests.service.conftest import KEY, ClientFactory, GatedSession, TestClient, png
from tests.service.http.routes.test_predict import RAW, problem
from tests.service.test_live import wait_for


def test_model(client: TestClient, bundle: Bundle) -> None:
    body = client.get("/model").json()
    ModelDescription.model_validate(body, extra="forbid")
    assert body == json.loads(json.dumps(describe(bundle)))
    assert sum(body["groups"].values()) == len(body["classes"]) == 10
    assert body["calibration"]["priors"] == ["balanced", "train"]
    assert body["figures"] == bundle.manifest.figures
    report = json.loads((bundle.path / "report.json").read_text())
    assert body["reliability"] == report["reliability"]
    assert len(body["reliability"]["trained"]) == 15
    assert body["by_predicted_group"] == report["by_predicted_group"]
    assert body["by_predicted_group"]["calibrated"].keys() >= {"many", "medium", "few", "head", "middle", "tail"}


def test_answers_follow_their_schemas(client: TestClient) -> None:
    body = client.post("/predict?logits=all", content=png(), headers=RAW).json()
    Prediction.model_validate(body, extra="forbid")
    numbers = client.get(body["cam"]["url"], params={"format": "json"}).json()
    Contributions.model_validate(numbers, extra="forbid")


def test_health(client: TestClient, bundle: Bundle) -> None:
    assert client.get("/health/live").json() == {"status": "alive"}
    assert client.get("/health/ready").json() == {
        "status": "ready",
        "model": {"name": bundle.manifest.name, "version": bundle.manifest.version},
        "provider": "CPUExecutionProvider",
        "device_fallback": None,
    }
    assert "camcal_ready 1.0" in client.get("/metrics").text


def test_draining_is_not_ready_but_serves(client: TestClient) -> None:
    client.app.state.runtime.drain()  # type: ignore[attr-defined]  # any ASGI app
    response = client.get("/health/ready")
    assert "draining" in problem(response, 503, "not-ready")
    assert response.headers["connection"] == "close"
    assert client.get("/health/live").status_code == 200
    assert client.post("/predict", content=png(), headers=RAW).status_code == 200
    assert "camcal_ready 0.0" in client.get("/metrics").text


def test_a_model_that_fails_on_every_batch_is_neither_ready_nor_alive(
    client_factory: ClientFactory, gated: GatedSession
) -> None:
    client = client_factory(gated)
    health = ("/health/ready", "/health/live", "/v2/health/ready", "/v2/health/live")
    gated.failing = True
    for count in range(5):
        assert [client.get(path).status_code for path in health] == [200] * 4, count
        assert client.post("/predict", content=png(), headers=RAW).status_code == 500
    wait_for(lambda: client.get("/health/ready").status_code == 503)
    assert [client.get(path).status_code for path in health] == [503] * 4
    said = problem(client.get("/health/live"), 503, "not-ready")
    assert re.fullmatch("the model failed 6 times in a row; see the log", said)
    assert "camcal_ready 0.0" in client.get("/metrics").text
    gated.failing = False
    assert client.post("/predict", content=png(), headers=RAW).status_code == 200
    assert [client.get(path).status_code for path in health] == [200] * 4


def test_very_many_faults_of_one_request_are_not_all_told(client: TestClient) -> None:
    response = client.get("/cam/" + "a" * 22 + "?" + "&".join(f"p{number}" for number in range(3000)))
    said = problem(response, 422, "invalid-parameter")
    assert len(response.json()["errors"]) == 20 and said.endswith("; and 2980 more")


def test_scrapes_at_once_are_one(client_factory: ClientFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_factory()
    rendered: list[Metrics] = []
    render = Metrics.render

    def slowly(self: Metrics) -> bytes:
        rendered.append(self)
        if len(rendered) == 1:  # until all have asked
            wait_for(lambda: b"camcal_in_flight 8.0" in render(self))
        return render(self)

    monkeypatch.setattr(Metrics, "render", slowly)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: client.get("/metrics"), range(8)))
    assert {answer.status_code for answer in answers} == {200} and len(rendered) < 3
    assert client.get("/metrics").status_code == 200


def test_without_a_model_nothing_is_ready(bundle: Bundle) -> None:
    client = TestClient(create_app(Settings(bundle=bundle.path)))  # never started
    for response in (
        client.get("/health/ready"),
        client.get("/model"),
        client.get("/cam/" + "a" * 22),
        client.post("/predict", content=png(), headers=RAW),
    ):
        assert problem(response, 503, "not-ready") == "the model is not loaded"
    assert client.get("/health/live").status_code == 200
    assert 'camcal_rejected_total{reason="not_ready"} 4.0' in client.get("/metrics").text


def test_lifespan_loads_the_bundle_of_the_settings(bundle: Bundle, tmp_path: Path) -> None:
    with TestClient(create_app(Settings(bundle=bundle.path, max_batch=2))) as client:
        assert client.get("/health/ready").status_code == 200
    assert client.get("/health/ready").status_code == 503
    with pytest.raises(BundleError, match="no bundle at"), TestClient(create_app(Settings(bundle=tmp_path / "none"))):
        pass


MODULES = ("api", "card", "charts", "choices", "classes", "controls", "dom", "heatmap", "page", "samples", "upload")
PAGE = {
    "/": "text/html",
    "/page.css": "text/css",
    "/logo.svg": "image/svg+xml",
    **{f"/{module}.js": "text/javascript" for module in MODULES},
    "/docs": "text/html",
    "/docs/docs.js": "text/javascript",
}


@pytest.mark.parametrize("path", PAGE)
def test_page(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.headers["content-type"].startswith(PAGE[path])
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';")
    assert "unsafe" not in policy
    assert "://" not in response.text.replace("http://www.w3.org/2000/svg", "")  # nothing from elsewhere
    assert '"//' not in response.text
    assert "style=" not in response.text  # the policy forbids it
    assert client.head(path).headers["content-length"] == response.headers["content-length"]


@pytest.mark.parametrize("path", PAGE)
def test_page_is_not_sent_again_to_a_browser_that_has_it(client: TestClient, path: str) -> None:
    first = client.get(path)
    for validator in (
        {"If-None-Match": first.headers["etag"]},
        {"If-Modified-Since": first.headers["last-modified"]},
    ):
        again = client.get(path, headers=validator)
        assert (again.status_code, again.content) == (304, b"")
        for name in ("etag", "cache-control", "content-security-policy", "cross-origin-opener-policy"):
            assert again.headers[name] == first.headers[name]
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == first.content


def test_page_behind_a_proxy_that_strips_a_prefix(client: TestClient) -> None:
    behind_a_proxy = TestClient(client.app, root_path="/vision")
    for path in PAGE:  # uvicorn puts the prefix back
        assert behind_a_proxy.get(f"/vision{path}").content == client.get(path).content


def test_samples_are_small_photographs_that_say_where_they_are_from(client: TestClient) -> None:
    names = re.findall(r'"(\w+)"', re.findall(r"const SAMPLES = \[(.*?)\]", client.get("/samples.js").text)[0])
    assert len(names) == 3
    sources = client.get("/samples/SOURCES.txt").text
    assert "CC BY 4.0" in sources
    for name in names:
        response = client.get(f"/samples/{name}.jpg")
        assert response.headers["content-type"] == "image/jpeg"
        assert len(response.content) < 50_000
        assert f"{name}.jpg" in sources
        assert client.post("/predict", content=response.content, headers={"Content-Type": "image/jpeg"}).is_success


def test_swagger_ui_is_served_with_the_documentation(client: TestClient) -> None:
    policy = client.get("/docs").headers["content-security-policy"]
    for name, media_type in (("swagger-ui.css", "text/css"), ("swagger-ui-bundle.js", "text/javascript")):
        assert f'"docs/{name}"' in client.get("/docs").text  # relative, for a prefix of a proxy
        response = client.get(f"/docs/{name}")
        assert response.headers["content-type"].startswith(media_type)
        assert response.headers["content-security-policy"] == policy
        assert client.get(f"/docs/{name}", headers={"If-None-Match": response.headers["etag"]}).status_code == 304


def test_no_page_of_other_hosts_scripts(client: TestClient) -> None:
    for path in ("/redoc", "/docs/oauth2-redirect"):
        problem(client.get(path), 404, "not-found")


def test_unknown_path_and_method(client: TestClient) -> None:
    problem(client.get("/nope"), 404, "not-found")
    problem(client.get("/predict/"), 404, "not-found")
    response = client.get("/predict")
    assert problem(response, 405, "method-not-allowed") == "this path accepts POST"
    assert response.headers["allow"] == "POST"
    for path in ("/", "/health/live"):
        response = client.delete(path)
        assert problem(response, 405, "method-not-allowed") == "this path accepts GET, HEAD"
        assert response.headers["allow"] == "GET, HEAD"
    for path in ("/predict", "/cam/" + "a" * 22):
        problem(client.put(path), 405, "method-not-allowed")


@pytest.mark.parametrize("path", ["/", "/health/live", "/health/ready", "/model", "/openapi.json", "/v2", "/nope"])
def test_head_is_get_without_the_body(client: TestClient, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]


@pytest.mark.parametrize("header", ["Authorization", "X-API-Key"])
def test_api_key(client_factory: ClientFactory, header: str) -> None:
    client = client_factory(api_key=KEY)
    prefix = "Bearer " if header == "Authorization" else ""
    for method, path in (("POST", "/predict"), ("GET", "/cam/" + "a" * 22), ("GET", "/model")):
        for headers in ({}, {header: f"{prefix}wrong"}, {header: f"{prefix}sécret".encode()}):
            response = client.request(method, path, headers=headers)
            problem(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.request(method, path, headers={header: f"{prefix}{KEY}"}).status_code != 401
    for path in ("/", "/health/ready", "/metrics", "/openapi.json"):
        assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/predict"), ("POST", "/predict/batch"), ("GET", "/cam/" + "a" * 22)]
)
def test_misspelt_parameter(client: TestClient, method: str, path: str) -> None:
    response = client.request(method, path, params={"topk": 3})
    assert "'topk' is not a parameter of this route" in problem(response, 422, "invalid-parameter")
    assert response.json()["errors"][0]["field"] == "topk"


def test_request_id(client: TestClient) -> None:
    ids = {client.get("/health/live").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    for given, kept in (("trace-1.a_B", True), ("bad id", False), ("x" * 65, False)):
        answered = client.get("/health/live", headers={"X-Request-Id": given}).headers["x-request-id"]
        assert (answered == given) is kept


def test_access_log(client_factory: ClientFactory, caplog: pytest.LogCaptureFixture) -> None:
    client = client_factory(access_log=True)
    with caplog.at_level(logging.INFO, "camcal.access"):
        client.get("/cam/" + "a" * 22, headers={"X-Request-Id": "me"})
    (line,) = [record.message for record in caplog.records if record.name == "camcal.access"]
    entry = json.loads(line)
    assert (entry["request_id"], entry["route"], entry["code"]) == ("me", "/cam/{id}", 404)


def test_access_log_says_who_sent_how_much(
    client_factory: ClientFactory, caplog: pytest.LogCaptureFixture, bundle: Bundle
) -> None:
    app = client_factory(access_log=True, trusted_proxies="10.0.0.0/8").app
    client = TestClient(app, client=("10.1.2.3", 4711))
    with caplog.at_level(logging.INFO, "camcal.access"):
        answer = client.post("/predict", content=png(), headers=RAW | {"X-Forwarded-For": "2001:db8::1"})
        client.get("/nope", headers={"X-Forwarded-For": 'forged"\x1b'})
    first, second = [json.loads(record.message) for record in caplog.records if record.name == "camcal.access"]
    assert (first["address"], first["key"], first["model"]) == ("2001:db8::1", None, bundle.manifest.version)
    assert (first["bytes_in"], first["bytes_out"]) == (len(png()), len(answer.content))
    assert (second["address"], second["bytes_in"], second["model"]) == ("10.1.2.3", 0, None)


def test_what_nobody_foresaw(session: Any, bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Settings(bundle=bundle.path), session)

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("the secret of the inside")

    with TestClient(app) as client:
        response = client.get("/broken")
        assert "secret" not in problem(response, 500, "internal")
        assert response.headers["x-request-id"] in caplog.text
        assert "the secret of the inside" in caplog.text
        assert 'camcal_requests_total{code="500",route="/broken"} 1.0' in client.get("/metrics").text


def test_metrics(client: TestClient, bundle: Bundle) -> None:
    body = client.post("/predict", content=png(), headers=RAW).json()
    client.get(body["cam"]["url"])
    client.get("/nope/" + "x" * 50)
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    text = response.text
    group = body["predictions"][0]["group"]
    name, version = bundle.manifest.name, bundle.manifest.version
    provider = "CPUExecutionProvider"
    for line in (
        'camcal_requests_total{code="200",route="/predict"} 1.0',
        'camcal_requests_total{code="200",route="/cam/{id}"} 1.0',
        'camcal_requests_total{code="404",route="unmatched"} 1.0',
        'camcal_request_duration_seconds_count{route="/predict"} 1.0',
        *(f'camcal_stage_duration_seconds_count{{stage="{stage}"}} 1.0' for stage in STAGES),
        "camcal_batch_size_count 1.0",
        "camcal_batch_padding_total 0.0",
        "camcal_queue_depth 0.0",
        "camcal_queue_limit 256.0",
        "camcal_queue_bytes 0.0",
        'camcal_rejected_total{reason="queue_full"} 0.0',
        "camcal_cancelled_total 0.0",
        "camcal_in_flight 1.0",  # the reading itself
        "camcal_ready 1.0",
        f'camcal_model_info{{classes="10",name="{name}",provider="{provider}",version="{version}"}} 1.0',
        "camcal_device_fallback 0.0",
        "camcal_cam_store_entries 1.0",
        'camcal_cam_store_reads_total{result="hit"} 1.0',
        f'camcal_predictions_total{{group="{group}"}} 1.0',
        f'camcal_calibrated_confidence_count{{group="{group}"}} 1.0',
        "camcal_calibration_shift_count 1.0",
    ):
        assert f"\n{line}\n" in text, line
    assert body["id"] not in text


def test_apps_do_not_share_metrics(client_factory: ClientFactory) -> None:
    one, other = client_factory(), client_factory()
    one.get("/nope")
    assert 'route="unmatched"' in one.get("/metrics").text
    assert 'route="unmatched"' not in other.get("/metrics").text
