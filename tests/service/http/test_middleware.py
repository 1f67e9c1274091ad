"""What the middleware refuses; test_routes and test_logs have the ids and the last resort."""

from __future__ import annotations

import pytest

from camcal.models.bundle import Bundle
from tests.service.conftest import KEY, ClientFactory, png
from tests.service.http.routes.test_predict import RAW, problem


@pytest.mark.parametrize(
    "template",
    ["/predict", "/predict/batch", "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"],
)
def test_full_queue_is_known_before_anything_else(client_factory: ClientFactory, bundle: Bundle, template: str) -> None:
    client = client_factory(queue_limit=1, api_key=KEY)
    path = template.format(name=bundle.manifest.name, version=bundle.manifest.version)
    with client.app.state.runtime.admission.ticket("one") as ticket:  # type: ignore[attr-defined]  # any ASGI app
        ticket.join()
        refused = client.post(path, content=b"anything", headers={"X-Request-Id": "mine"})
        assert refused.headers["x-request-id"] == "mine"
        assert refused.headers["retry-after"] == "1"
        sentence = "1 requests are waiting; the limit is 1 (CAMCAL_QUEUE_LIMIT)"
        if template.startswith("/v2"):
            assert (refused.status_code, refused.json()) == (429, {"error": sentence})
        else:
            assert problem(refused, 429, "queue-full") == sentence
    counted = client.get("/metrics").text
    assert f'camcal_requests_total{{code="429",route="{template}"}} 1.0' in counted
    assert 'camcal_rejected_total{reason="queue_full"} 1.0' in counted
    problem(client.post("/predict", content=png(), headers=RAW), 401, "unauthorized")


def test_what_needs_no_model_is_answered_by_a_full_service(client_factory: ClientFactory) -> None:
    client = client_factory(queue_limit=1)
    with client.app.state.runtime.admission.ticket("one") as ticket:  # type: ignore[attr-defined]  # any ASGI app
        ticket.join()
        assert client.get("/health/ready").status_code == 200
        problem(client.get("/predict"), 405, "method-not-allowed")
        problem(client.post("/nothing"), 404, "not-found")
