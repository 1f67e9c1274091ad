"""Reads the one image of a request body, raw or multipart, within the limits on bytes and time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.errors import Problem
from service.multipart import FormError, parse_form

FIELD = "image"
ACCEPTED_TYPES = "multipart/form-data with the field `image`, or the image itself with the content type image/*"

ENVELOPE_BYTES = 64 * 1024  # what a multipart body may hold beside the image

# The client may still be sending: the connection cannot carry another request.
CLOSE = {"Connection": "close"}


async def read_image(request: Request, *, max_bytes: int, timeout_s: float, reserve: Callable[[int], None]) -> bytes:
    """The bytes of the image in the body of `request`.

    Args:
        request: its body must not have been read.
        max_bytes: limit on the image.
        timeout_s: limit on the time for the whole body.
        reserve: told of bytes before they are kept; may raise.

    Raises:
        Problem: 400, 408, 413 or 415, with a sentence for the client.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        body = await _read(request, max_bytes + ENVELOPE_BYTES, max_bytes, timeout_s, reserve)
        image = _image_of(request.headers["content-type"], body)
        if len(image) > max_bytes:
            raise _too_large(max_bytes)
    elif kind.startswith("image/"):
        image = await _read(request, max_bytes, max_bytes, timeout_s, reserve)
    else:
        sent = f"the content type is {kind[:100]!r}" if kind else "there is no content type"
        raise Problem("unsupported-format", f"{sent}; send {ACCEPTED_TYPES}", CLOSE)
    if not image:
        raise Problem("malformed-request", f"the image is empty; send {ACCEPTED_TYPES}")
    return image


async def _read(
    request: Request, limit: int, max_bytes: int, timeout_s: float, reserve: Callable[[int], None]
) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise _too_large(max_bytes)
                reserve(len(chunk))
                body += chunk
    except TimeoutError:
        message = f"the body was not complete after {timeout_s:g} s (CAMCAL_BODY_TIMEOUT_S)"
        raise Problem("body-timeout", message, CLOSE) from None
    except ClientDisconnect:
        raise Problem("client-gone", "the client left before its body was complete") from None
    return bytes(body)


def _image_of(content_type: str, body: bytes) -> bytes:
    try:
        parts = parse_form(content_type, body)
    except FormError as error:
        raise Problem("malformed-request", f"the form cannot be read: {error}") from None
    images = [part for part in parts if part.name == FIELD]
    if len(images) != 1:
        found = len(images) or ", ".join(repr(part.name[:40]) for part in parts) or "nothing"
        raise _bad_field(f"expected one file in the field {FIELD!r}; the form has {found}")
    if images[0].filename is None:
        raise _bad_field(f"the field {FIELD!r} is text; send it as a file, with a file name")
    return bytes(images[0].data)


def _bad_field(message: str) -> Problem:
    return Problem("malformed-request", message, errors=[{"in": "body", "field": FIELD, "message": message}])


def _too_large(max_bytes: int) -> Problem:
    return Problem("too-large", f"the image exceeds the limit of {max_bytes} bytes (CAMCAL_MAX_BYTES)", CLOSE)
