"""Logs and traces: what leaves the service beside its answers."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from models.bundle import Bundle
from service.logs import JsonFormatter
from tests.service.conftest import ClientFactory, GatedSession, png
from tests.service.test_live import process
from tests.service.test_predict import RAW


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What a handler with the JSON format writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def test_json_lines_carry_the_request_id(
    client_factory: ClientFactory, gated: GatedSession, lines: io.StringIO
) -> None:
    client = client_factory(gated, access_log=True)
    gated.failing = True
    response = client.post("/predict", content=png(), headers=RAW | {"X-Request-Id": "trace-1"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "trace-1")
    logging.getLogger("camcal").info("%d %s", 2, "words")
    records = [json.loads(line) for line in lines.getvalue().splitlines() if '"logger":"camcal' in line]
    (access,) = [record for record in records if record["logger"] == "camcal.access"]
    assert (access["request_id"], access["route"], access["code"]) == ("trace-1", "/predict", 500)
    (failure,) = [record for record in records if record["level"] == "error"]
    assert "the model failed" in failure["message"]
    assert "ArithmeticError: boom" in failure["exception"]
    assert records[-1]["message"] == "2 words"
    assert "request_id" not in records[-1]
    assert max(map(len, lines.getvalue().splitlines())) < 5000  # no pixels


def test_server_in_json(bundle: Bundle) -> None:
    with process(bundle, CAMCAL_LOG_FORMAT="json", CAMCAL_ACCESS_LOG="true", CAMCAL_DRAIN_S="0") as (child, url):
        httpx.post(f"{url}/predict", content=png(), headers=RAW | {"X-Request-Id": "one"})
        child.terminate()
        assert child.stderr is not None
        records = [json.loads(line) for line in child.stderr]
    assert {"one"} == {record["request_id"] for record in records if record["logger"] == "camcal.access"}


def test_traces(client_factory: ClientFactory) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = RAW | {"traceparent": caller, "X-Request-Id": "mine"}
    assert client_factory().post("/predict", content=png(), headers=headers).status_code == 200
    assert exporter.get_finished_spans() == ()  # only when asked for
    assert client_factory(otel=True).post("/predict", content=png(), headers=headers).status_code == 200
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /predict"
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" in caller
    assert span.attributes is not None
    assert span.attributes["camcal.request_id"] == "mine"
    assert {name for name in span.attributes if name.endswith("_ms")} == {
        f"camcal.{stage}_ms" for stage in ("decode", "queue", "inference", "post")
    }
