from __future__ import annotations

import json

import pytest

from camcal.service.stderr import as_json


@pytest.mark.parametrize(
    ("line", "level", "message"),
    [
        (b"words\n", "warning", "words"),
        (b"no newline", "warning", "no newline"),
        (
            b"\x1b[1;31m2026 [E:onnxruntime:, x.cc:572 F] a fault\x1b[m\r\n",
            "error",
            "2026 [E:onnxruntime:, x.cc:572 F] a fault",
        ),
        (b"[F:onnxruntime:, x.cc:572 F] the end\n", "critical", "[F:onnxruntime:, x.cc:572 F] the end"),
        (b"\xff\n", "warning", "�"),
        (b'"quoted"\n', "warning", '"quoted"'),
        (b"[1]\n", "warning", "[1]"),
    ],
)
def test_line_becomes_an_object(line: bytes, level: str, message: str) -> None:
    record = json.loads(as_json(line))
    assert (record["level"], record["message"], record["logger"]) == (level, message, "stderr")
    assert record["time"] > 0


def test_object_is_unchanged() -> None:
    assert as_json(b'{"message": "known"}\n') == b'{"message": "known"}\n'
    assert as_json(b"\n") == b""
