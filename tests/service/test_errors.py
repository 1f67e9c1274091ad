"""Exceptions and the problems they become; through HTTP the other tests see most of them."""

from __future__ import annotations

import pytest
from starlette.exceptions import HTTPException

from service.admission import QueueFullError
from service.batching import ClosedError, InferenceError
from service.errors import KINDS, Problem, problem_of


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
        (InferenceError("inside"), "internal", "the service failed on this request; its log says why"),
        (MemoryError("inside"), "internal", "the service failed on this request; its log says why"),
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
