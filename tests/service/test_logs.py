"""Logs and traces."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from camcal.models.bundle import Bundle
from camcal.service.logs import JsonFormatter, TextFormatter
from tests.service.conftest import ClientFactory, GatedSession, png
from tests.service.http.routes.test_predict import RAW
from tests.service.test_live import ROOT, process


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """The output of a log handler with the JSON format."""
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
    assert "inference failed" in failure["message"]
    assert "ArithmeticError: boom" in failure["exception"]
    assert records[-1]["message"] == "2 words"
    assert "request_id" not in records[-1]
    assert max(map(len, lines.getvalue().splitlines())) < 5000  # no pixels


EVIL = "label\nforged line \x1b[2J\x9b31m\u2028\u202e"


def error_record() -> logging.LogRecord:
    try:
        raise ValueError(f"of {EVIL}\nTraceback forged")
    except ValueError:
        return logging.LogRecord("camcal", logging.ERROR, __file__, 1, "bad %s", (EVIL,), sys.exc_info())


def test_text_cannot_be_forged() -> None:
    first, *rest = TextFormatter().format(error_record()).split("\n")
    assert first == "bad label"
    assert rest and all(line.startswith("  ") and line.isprintable() for line in rest)
    assert "  forged line \\u001b[2J\\u009b31m\\u2028\\u202e" in rest


def test_json_cannot_be_forged() -> None:
    text = JsonFormatter().format(error_record())
    assert text.isprintable()
    assert json.loads(text)["message"] == f"bad {EVIL}"
    assert "ValueError: of label\nforged line" in json.loads(text)["exception"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_server_in_json(bundle: Bundle, workers: str) -> None:
    settings = {"CAMCAL_LOG_FORMAT": "json", "CAMCAL_ACCESS_LOG": "true", "CAMCAL_DRAIN_S": "0"}
    with process(bundle, ("-m", "camcal"), CAMCAL_WORKERS=workers, **settings) as (child, url):
        httpx.post(f"{url}/predict", content=png(), headers=RAW | {"X-Request-Id": "one"})
        child.terminate()
        assert child.stderr is not None
        records = [json.loads(line) for line in child.stderr]
        assert child.wait(20) == 0
    assert {"one"} == {record["request_id"] for record in records if record["logger"] == "camcal.access"}


NOISY = """if True:
    import os, subprocess, threading, warnings
    from camcal.__main__ import main
    from camcal.service.process import server

    class FailsInFinalizer:
        def __del__(self):
            raise ValueError("in a finaliser")

    def fail():
        raise ArithmeticError("in a thread")

    def noise(self):
        os.write(2, b"\\x1b[0;93m2026-11-30 [W:onnxruntime:Default, x.cc:1 F] from C++\\x1b[m\\n")
        print("printed", file=__import__("sys").stderr)
        warnings.warn("careful")
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        subprocess.run(["sh", "-c", "echo from a child >&2"])
        self._loop.call_soon(fail)
        FailsInFinalizer()

    server.Server.reload = noise
    main()"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_line_on_standard_error_is_json(bundle: Bundle, workers: str) -> None:
    settings = {"CAMCAL_LOG_FORMAT": "json", "CAMCAL_DRAIN_S": "0", "CAMCAL_WORKERS": workers}
    with process(bundle, ("-c", NOISY), **settings) as (child, _):
        child.send_signal(signal.SIGHUP)
        assert child.stderr is not None
        records: list[dict[str, Any]] = []
        while sum(record["logger"] == "asyncio" for record in records) < int(workers):  # the last record of each worker
            records.append(json.loads(child.stderr.readline()))
        child.terminate()
        records += map(json.loads, child.stderr)
        assert child.wait(30) == 0
    levels = {record["message"]: record["level"] for record in records}
    assert levels["2026-11-30 [W:onnxruntime:Default, x.cc:1 F] from C++"] == "warning"
    assert {"printed", "from a child", "uncaught ArithmeticError: in a thread"} <= levels.keys()
    assert any("UserWarning: careful" in message for message in levels)
    assert any("in a finaliser" in message for message in levels)
    assert any(record["logger"] == "asyncio" and "in a thread" in record["exception"] for record in records)


def serve(
    *arguments: str, program: tuple[str, str] = ("-m", "camcal"), environment: dict[str, str] | None = None
) -> tuple[int, list[Any]]:
    """Exit code and log records of a service that exits by itself."""
    command = [sys.executable, *program, "serve", "--port", "0", *arguments]
    variables = {"CAMCAL_LOG_FORMAT": "json", **(environment or {})}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=variables)
    return result.returncode, [json.loads(line) for line in result.stderr.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--bundle", "nowhere"], {}, "no bundle at nowhere: expected a folder"),
        (["--bundle", "nowhere", "--workers", "2"], {}, "no bundle at nowhere: expected a folder"),
        (["--port", "x"], {}, "Invalid value for '--port'"),
        (["--nothing"], {}, "No such option: --nothing"),
        ([], {"CAMCAL_MAX_BATCH": "x"}, "CAMCAL_MAX_BATCH is 'x': it should be a valid integer"),
        (["--host", "192.0.2.1"], {}, "host 192.0.2.1 is not an address of this machine"),
    ],
)
def test_failed_start_in_json(arguments: list[str], environment: dict[str, str], message: str) -> None:
    code, records = serve(*arguments, environment=environment)
    assert code == 2
    (record,) = records
    assert record["message"].startswith(message) and record["level"] == "critical"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_internal_error_at_startup_in_json(bundle: Bundle, workers: str) -> None:
    program = """if True:
        from camcal.__main__ import main
        from camcal.service.process import single, worker
        async def startup(self, sockets=None):
            raise ArithmeticError("boom")
        single.DrainingServer.startup = worker.Worker.startup = startup
        main()"""
    arguments = ["--bundle", str(bundle.path), "--workers", workers]
    code, records = serve(*arguments, program=("-c", program))
    assert code == (1 if workers == "1" else 2)
    assert any("ArithmeticError: boom" in record.get("exception", "") for record in records)


def test_last_line_of_an_aborted_process_is_json(bundle: Bundle) -> None:
    program = """if True:
        import os
        from camcal.__main__ import main
        from camcal.service.process import single
        async def startup(self, sockets=None):
            os.write(2, b"terminate called without an active exception\\n")
            os.abort()
        single.DrainingServer.startup = startup
        main()"""
    code, records = serve("--bundle", str(bundle.path), program=("-c", program))
    assert code == -signal.SIGABRT
    assert records[-1]["message"] == "terminate called without an active exception"


def test_traces(client_factory: ClientFactory) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = RAW | {"traceparent": caller, "X-Request-Id": "mine"}
    assert client_factory().post("/predict", content=png(), headers=headers).status_code == 200
    assert exporter.get_finished_spans() == ()  # off by default
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
