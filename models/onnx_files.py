"""The external files that an ONNX model reads, found without the package onnx."""

from __future__ import annotations

from collections.abc import Iterator

MAX_DEPTH = 100  # of nested messages, as in protobuf's own readers

# Which fields of onnx.proto lead to a tensor: message → {field number: message it holds}.
_TENSOR_PATHS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}


def external_files(model: bytes) -> set[str]:
    """The file names from which an ONNX model would read weights (TensorProto.external_data, key `location`).

    Raises:
        ValueError: if `model` is not a readable ONNX file.
    """
    found: set[str] = set()
    waiting = [("model", memoryview(model), 1)]
    try:
        while waiting:
            kind, message, depth = waiting.pop()
            if kind == "external":
                entry = {number: bytes(value).decode() for number, value in _fields(message)}
                if entry.get(1) == "location":
                    found.add(entry.get(2, ""))
                continue
            if depth > MAX_DEPTH:
                raise ValueError(f"messages nested over {MAX_DEPTH} deep")
            for number, value in _fields(message):
                if child := _TENSOR_PATHS[kind].get(number):
                    waiting.append((child, value, depth + 1))
    except IndexError:
        raise ValueError("a message is cut off") from None
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of one protobuf message: (field number, bytes)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number has over ten bytes")

    while at < len(message):
        key = varint()
        match key & 7:
            case 0:
                varint()
            case 1:
                at += 8
            case 2:
                size = varint()
                if at + size > len(message):
                    raise IndexError
                yield key >> 3, message[at : at + size]
                at += size
            case 5:
                at += 4
            case kind:
                raise ValueError(f"protobuf wire type {kind}")
