"""Exceptions and the problems they become; through HTTP the other tests see most of them."""

from __future__ import annotations

import pytest
from starlette.exceptions import HTTPException

from camcal.service.engine import predictor
from camcal.service.engine.admission import QueueFullError
from camcal.service.engine.batching import ClosedError, InferenceError
from camcal.service.http.errors import KINDS, Problem, problem_of
from tests.service.conftest import ClientFactory, png
from tests.service.http.routes.test_predict import RAW


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_form(kind: str) -> None:
    problem = Problem(kind, "why")
    assert list(problem.body()) == ["type", "title", "status", "detail"]
    response = problem.response({"type": "http", "path": "/predict"})
    assert (response.status_code, response.media_type) == (problem.status, "application/problem+json")


@pytest.mark.parametrize(
    ("error", "kind", "detail"),
    [
        (ClosedError("the service is shutting down"), "not-ready", "the service is shutting down"),
        (InferenceError("inside"), "internal", "the request failed; see the service's log"),
        (ArithmeticError("inside"), "internal", "the request failed; see the service's log"),
        (MemoryError("inside"), "out-of-memory", "not enough memory for this request; try again later"),
        (HTTPException(400, "odd"), "malformed-request", "odd"),
        (HTTPException(502, "odd"), "internal", "odd"),
    ],
)
def test_problem_of(error: Exception, kind: str, detail: str) -> None:
    problem = problem_of(error)
    assert (problem.kind, problem.detail) == (kind, detail)


def test_client_that_still_sends_is_cut_off() -> None:
    full = QueueFullError("no room", reason="queue_bytes", retry_after_s=7)
    assert problem_of(full).headers == {"Retry-After": "7", "Connection": "close"}
    full = QueueFullError("no room", reason="queue_full", retry_after_s=7)
    assert problem_of(full).headers == {"Retry-After": "7"}


def test_too_little_memory_is_not_the_clients_fault(
    client_factory: ClientFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starve(*arguments: object, **options: object) -> None:
        raise MemoryError

    client = client_factory()
    with monkeypatch.context() as starved:
        starved.setattr(predictor, "decode", starve)
        answer = client.post("/predict", content=png(), headers=RAW)
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:camcal:error:out-of-memory")
    assert answer.headers["retry-after"] == "1"
    assert 'camcal_rejected_total{reason="memory"} 1.0' in client.get("/metrics").text
    assert client.post("/predict", content=png(), headers=RAW).status_code == 200
