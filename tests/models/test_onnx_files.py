from __future__ import annotations

import time

import onnx
import pytest
from onnx import helper

from camcal.models.onnx_files import MAX_DEPTH, external_files


def test_a_graph_within_a_graph_is_searched() -> None:
    tensor = helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], bytes(4), raw=True)
    onnx.external_data_helper.set_external_data(tensor, "inner.bin")
    body = helper.make_graph([], "body", [], [], initializer=[tensor])
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=helper.make_graph([], "no", [], []))
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    assert external_files(model.SerializeToString()) == {"inner.bin"}


def message(number: int, content: bytes) -> bytes:
    size, digits = len(content), b""
    while size > 0x7F:
        digits += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + digits + bytes([size]) + content


@pytest.mark.parametrize(
    "data", [b"\xff" * 3_000_000, b"\x08" + b"\xff" * 3_000_000, b"\x3a\x7f", b"\x80", b"\x0b\x00"]
)
def test_what_is_no_model_is_refused_at_once(data: bytes) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"ten bytes|cut off|wire type"):
        external_files(data)
    assert time.process_time() - begun < 1


def test_depth_is_bounded() -> None:
    graph = b""
    for _ in range(MAX_DEPTH):  # a graph within an attribute of a node of a graph
        graph = message(1, message(5, message(6, graph)))
    with pytest.raises(ValueError, match="messages nested over 100 deep"):
        external_files(message(7, graph))
