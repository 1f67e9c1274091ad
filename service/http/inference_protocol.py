"""The Open Inference Protocol v2: parses request bodies into arrays, and builds response bodies from arrays.

Tensors are JSON lists, or bytes after the JSON (the binary tensor data extension):
https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from camcal.models.bundle import OUTPUTS, Manifest
from camcal.service.settings import sentence

HEADER_LENGTH = "Inference-Header-Content-Length"
# Parsing JSON holds the GIL, about 30 ms per MiB. The limit is 1 MiB, or the size of one image if that is larger.
MAX_JSON_BYTES, JSON_BYTES = 2**20, 8  # in total, and per number of one image
MAX_DIMENSIONS = 8
DATATYPES = {"top_classes": "INT64"}  # of outputs; the others are FP32


class ProtocolError(ValueError):
    """The body is not a valid request for this model; the message says why."""


class TooLongError(ProtocolError):
    """The JSON exceeds the limit."""


class RequestTensor(BaseModel):
    """An input. Its values are in `data`, flat or nested, or in `parameters.binary_data_size` bytes after the JSON."""

    name: str
    shape: list[Annotated[int, Field(ge=1, le=2**31)]] = Field(max_length=MAX_DIMENSIONS)
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class RequestedOutput(BaseModel):
    """An output. With `parameters.binary_data`, its values are bytes after the JSON."""

    name: str
    parameters: dict[str, Any] = {}


class InferenceRequest(BaseModel):
    """Inputs: `images` (UINT8, N×H×W×3) and optionally `top_k` (INT64, one value). By default all outputs."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[RequestTensor] = Field(max_length=16)
    outputs: list[RequestedOutput] | None = Field(None, max_length=16)


class InferenceError(BaseModel):
    """An error of this protocol."""

    error: str


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A parsed request."""

    id: str | None
    images: NDArray[np.uint8]  # N×H×W×3
    top_k: int | None
    outputs: list[tuple[str, bool]]  # names, and whether they are binary


class TensorMetadata(BaseModel):
    """An input or output of the model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1 stands for any size.")


def input_metadata(manifest: Manifest) -> list[TensorMetadata]:
    """The inputs of the model."""
    size = manifest.preprocessing.input_size
    return [
        TensorMetadata(name="images", datatype="UINT8", shape=[-1, size, size, 3]),
        TensorMetadata(name="top_k", datatype="INT64", shape=[1]),
    ]


def output_metadata(manifest: Manifest) -> list[TensorMetadata]:
    """The outputs of the model."""
    shapes = {"top_classes": [-1, -1], "maps": [-1, -1, *manifest.grid]}
    classes = [-1, len(manifest.classes)]
    return [
        TensorMetadata(name=name, datatype=DATATYPES.get(name, "FP32"), shape=shapes.get(name, classes))
        for name in OUTPUTS
    ]


def parse(body: bytearray, header_length: str | None, input_size: int, max_images: int) -> Inference:
    """Parse `body`, whose first `header_length` bytes are JSON; all of it by default.

    Raises:
        TooLongError: if the JSON exceeds the limit.
        ProtocolError: if the request is invalid, with an error message for the client.
    """
    length = -1
    if header_length is None:
        length = len(body)
    elif header_length.isdecimal() and len(header_length) < 12:
        length = int(header_length)
    if not 0 <= length <= len(body):
        raise ProtocolError(
            f"{HEADER_LENGTH} is {(header_length or '')[:100]!r}; expected at most the body's {len(body)} bytes"
        )
    limit = max(MAX_JSON_BYTES, JSON_BYTES * 3 * input_size**2)
    if length > limit:
        raise TooLongError(f"the JSON has {length} bytes; the limit is {limit}: send binary tensors")
    try:
        request = InferenceRequest.model_validate(orjson.loads(memoryview(body)[:length]))
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"the request is not valid JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the request"
        raise ProtocolError(f"{where}: {sentence(first['msg'])}") from None
    for tensor in request.inputs:
        _check_shape(tensor, input_size, max_images)
    tensors = _tensors(request, memoryview(body)[length:])
    if "images" not in tensors:
        raise ProtocolError("the input 'images' is missing")
    images, top_k = tensors["images"].astype(np.uint8, copy=False), tensors.get("top_k")
    return Inference(
        id=request.id, images=images, top_k=None if top_k is None else int(top_k.item()), outputs=_wanted(request)
    )


def compose(inference: Inference, manifest: Manifest, arrays: dict[str, NDArray[Any]]) -> tuple[bytes, int | None]:
    """The body of the response, and the length of its JSON if binary tensors follow."""
    outputs: list[dict[str, Any]] = []
    tail: list[memoryview] = []
    for name, binary in inference.outputs:
        array = np.ascontiguousarray(arrays[name])
        output: dict[str, Any] = {"name": name, "shape": array.shape, "datatype": DATATYPES.get(name, "FP32")}
        if binary:
            output["parameters"] = {"binary_data_size": array.nbytes}
            tail.append(array.data.cast("B"))
        else:
            output["data"] = array.ravel()
        outputs.append(output)
    answer: dict[str, Any] = {"model_name": manifest.name, "model_version": manifest.version, "outputs": outputs}
    if inference.id is not None:
        answer["id"] = inference.id
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([head, *tail]), len(head) if tail else None


def _check_shape(tensor: RequestTensor, input_size: int, max_images: int) -> None:
    """Check the shape before reading any data."""
    if tensor.name == "images":
        if tensor.shape[1:] != [input_size, input_size, 3] or tensor.shape[0] > max_images:
            expected = f"[N, {input_size}, {input_size}, 3] with N from 1 to {max_images} (CAMCAL_MAX_IMAGES)"
            raise ProtocolError(f"the input 'images' has shape {tensor.shape}; expected {expected}")
    elif tensor.name == "top_k" and math.prod(tensor.shape) != 1:
        raise ProtocolError(f"the input 'top_k' has shape {tensor.shape}; expected [1]")


def _tensors(request: InferenceRequest, tail: memoryview) -> dict[str, NDArray[Any]]:
    """The inputs by name. `tail` holds the binary inputs one after another."""
    datatypes: dict[str, tuple[str, type[np.integer[Any]]]] = {
        "images": ("UINT8", np.uint8),
        "top_k": ("INT64", np.int64),
    }
    tensors: dict[str, NDArray[Any]] = {}
    for tensor in request.inputs:
        if tensor.name not in datatypes or tensor.name in tensors:
            raise ProtocolError(f"the input {tensor.name[:100]!r} is unknown or sent twice; expected images and top_k")
        name, dtype = datatypes[tensor.name]
        if tensor.datatype != name:
            raise ProtocolError(f"the input {tensor.name!r} is {tensor.datatype[:20]!r}; expected {name}")
        size = tensor.parameters.get("binary_data_size")
        if tensor.data is not None and size is None:
            tensors[tensor.name] = _from_json(tensor, dtype)
        elif tensor.data is None and isinstance(size, int) and 0 <= size <= len(tail):
            tensors[tensor.name], tail = _from_bytes(tensor, dtype, tail[:size]), tail[size:]
        else:
            raise ProtocolError(
                f"the input {tensor.name!r} needs either data or a binary_data_size within the {len(tail)} bytes "
                "that follow the JSON"
            )
    if len(tail):
        raise ProtocolError(f"{len(tail)} bytes after the JSON belong to no input")
    return tensors


def _from_json(tensor: RequestTensor, dtype: type[np.integer[Any]]) -> NDArray[Any]:
    values = np.array(_numbers(tensor.data or []))
    limits = np.iinfo(dtype)
    whole = values.size and values.dtype.kind == "i" and limits.min <= values.min() <= values.max() <= limits.max
    if not whole or values.size != math.prod(tensor.shape):
        raise ProtocolError(
            f"the data of {tensor.name!r} must be {math.prod(tensor.shape)} integers from {limits.min} to {limits.max} "
            f"for the shape {tensor.shape}"
        )
    return values.reshape(tensor.shape)


def _numbers(values: list[Any]) -> list[int]:
    """The integers of a flat or rectangular nested list; an empty list if it holds anything else."""
    for _ in range(MAX_DIMENSIONS):
        if set(map(type, values)) != {list}:
            break
        values = list(chain.from_iterable(values)) if len(set(map(len, values))) == 1 else []
    return values if set(map(type, values)) == {int} else []


def _from_bytes(tensor: RequestTensor, dtype: type[np.integer[Any]], data: memoryview) -> NDArray[Any]:
    expected = math.prod(tensor.shape) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise ProtocolError(
            f"the input {tensor.name!r} has {len(data)} bytes; its shape {tensor.shape} needs {expected}"
        )
    return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).reshape(tensor.shape)


def _wanted(request: InferenceRequest) -> list[tuple[str, bool]]:
    default = request.parameters.get("binary_data_output") is True
    if not request.outputs:
        return [(name, default) for name in OUTPUTS]
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise ProtocolError(f"the model has no output {output.name[:100]!r}; it has {', '.join(OUTPUTS)}")
    return [(output.name, output.parameters.get("binary_data", default) is True) for output in request.outputs]
