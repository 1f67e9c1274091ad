"""Reads request bodies within the limits on size and time, and extracts their images."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from fastapi import Request
from starlette.requests import ClientDisconnect

from camcal.service.engine.admission import BodyTooLargeError, Ticket
from camcal.service.engine.decoding import Data
from camcal.service.http.errors import Problem
from camcal.service.http.multipart import FormError, Part, TooManyPartsError, parse_form
from camcal.service.settings import ENVELOPE_BYTES, Settings

FIELD = "image"
FORM = "multipart/form-data"
ACCEPTED_TYPES = f"{FORM} with the field `{FIELD}`, or the raw image with the content type image/*"

OTHER_PARTS = 15  # maximum number of other parts in a form
QUICK_BYTES = 256 * 1024  # a larger form is parsed in a thread

# The client may still be sending the body, so the connection cannot be used for another request.
CLOSE = {"Connection": "close"}

# A body larger than SMALL_BYTES has to arrive at CAMCAL_MIN_BODY_RATE. Faster parts allow a pause of up to PAUSE_S.
SMALL_BYTES, PAUSE_S = 64 * 1024, 10.0


async def read_body(
    request: Request, settings: Settings, ticket: Ticket, *, max_bytes: int, too_large: str
) -> bytearray:
    """The whole body of `request`, which must not have been read yet.

    Args:
        request: the request.
        settings: the limits on time and rate.
        ticket: reserves the bytes.
        max_bytes: the limit on the size.
        too_large: the error message for a larger body.

    Raises:
        Problem: 408, 413 or 499.
        QueueFullError: if the queue has no room for the body.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise Problem("too-large", too_large, CLOSE)
    body, rate, clock = bytearray(), settings.min_body_rate, asyncio.get_running_loop().time
    end = clock() + settings.body_timeout_s
    due = math.inf  # when the body is too slow
    try:
        if declared.isdecimal():
            ticket.check_length(int(declared))
        async with asyncio.timeout_at(end) as limit:
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise Problem("too-large", too_large, CLOSE)
                ticket.reserve(len(chunk))
                body += chunk
                if rate and len(body) > SMALL_BYTES:
                    due = min(due + len(chunk) / rate, clock() + PAUSE_S)
                    limit.reschedule(min(due, end))
    except BodyTooLargeError as error:
        raise Problem("too-large", str(error), CLOSE) from None
    except TimeoutError:
        message = f"the body was not complete after {settings.body_timeout_s:g} s (CAMCAL_BODY_TIMEOUT_S)"
        if due < end:
            message = f"the body arrived at less than {rate} bytes per second (CAMCAL_MIN_BODY_RATE)"
        raise Problem("body-timeout", message, CLOSE) from None
    except ClientDisconnect:
        raise Problem("client-gone", "the client disconnected before the body was complete") from None
    return body


async def read_large_body(request: Request, settings: Settings, ticket: Ticket, what: str) -> bytearray:
    """Like `read_body`, for a request with several images. `what` names its body in the error message."""
    limit = settings.max_body_bytes
    too_large = f"the {what} exceeds the limit of {limit} bytes (CAMCAL_MAX_BODY_BYTES)"
    return await read_body(request, settings, ticket, max_bytes=limit, too_large=too_large)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A request body with one image: raw, or in the field `image` of a form."""

    content_type: str
    body: bytearray
    max_bytes: int

    @property
    def takes_long(self) -> bool:
        """Whether `read` would block the event loop for too long."""
        return len(self.body) > QUICK_BYTES and _kind(self.content_type) == FORM

    def read(self) -> tuple[Data, list[Part]]:
        """The bytes of the image, and the other fields of the form.

        Raises:
            Problem: 400 or 413.
        """
        image: Data = self.body
        fields: list[Part] = []
        if _kind(self.content_type) == FORM:
            images, fields = _parts(self.content_type, self.body, 1)
            if len(images) != 1:
                raise _bad_field(f"expected one file in the field {FIELD!r}; the form has {len(images)}")
            image = images[0]
        check_size(image, self.max_bytes)
        return image, fields


async def read_upload(request: Request, settings: Settings, ticket: Ticket) -> Upload:
    """The body of `request` with one image. Like `read_body`, and raises Problem 415 for another content type."""
    content_type = request.headers.get("content-type", "")
    kind = _kind(content_type)
    if kind != FORM and not kind.startswith("image/"):
        raise _other_type(kind, ACCEPTED_TYPES)
    max_bytes = settings.max_bytes
    body = await read_body(
        request,
        settings,
        ticket,
        max_bytes=max_bytes + (ENVELOPE_BYTES if kind == FORM else 0),
        too_large=_too_large(max_bytes),
    )
    return Upload(content_type=content_type, body=body, max_bytes=max_bytes)


def images_of_form(content_type: str, body: bytearray, max_images: int) -> tuple[list[memoryview], list[Part]]:
    """The files in the field `image` of a form, in order, and the other fields. Too slow for the event loop.

    Raises:
        Problem: 400 or 415.
    """
    images, fields = _parts(content_type, body, max_images)
    if len(images) > max_images:
        limit = f"{max_images}, the smaller of CAMCAL_MAX_IMAGES and a client's share of CAMCAL_QUEUE_LIMIT"
        raise _bad_field(f"the form has {len(images)} images; the limit is {limit}")
    return images, fields


def require_form(content_type: str) -> None:
    """Raises Problem 415 unless the content type is a form's."""
    if (kind := _kind(content_type)) != FORM:
        raise _other_type(kind, f"{FORM} with one or more files in the field `{FIELD}`")


def check_size(image: Data, max_bytes: int) -> None:
    """Raises Problem 400 for an empty image, 413 for more than `max_bytes`."""
    if not image:
        raise Problem("malformed-request", f"the image is empty; send {ACCEPTED_TYPES}")
    if len(image) > max_bytes:
        raise Problem("too-large", _too_large(max_bytes))


def _parts(content_type: str, body: bytearray, max_images: int) -> tuple[list[memoryview], list[Part]]:
    max_parts = max_images + OTHER_PARTS
    try:
        parts = parse_form(content_type, body, max_parts)
    except TooManyPartsError:
        limits = f"{max_images} images and {OTHER_PARTS} other fields"
        raise _bad_field(f"the form has more than {max_parts} parts; the limit is {limits}") from None
    except FormError as error:
        raise Problem("malformed-request", f"the form cannot be parsed: {error}") from None
    images = [part for part in parts if part.name == FIELD]
    if not images:
        raise _bad_field(f"expected a file in the field {FIELD!r}; the form has {_names(parts)}")
    if not all(part.is_file for part in images):
        raise _bad_field(f"the field {FIELD!r} is text; send it as a file, with a file name")
    return [part.data for part in images], [part for part in parts if part.name != FIELD]


def _names(parts: list[Part]) -> str:
    return ", ".join(repr(part.name[:40]) for part in parts) or "nothing"


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _other_type(kind: str, accepted: str) -> Problem:
    sent = f"the content type is {kind[:100]!r}" if kind else "there is no content type"
    return Problem("unsupported-format", f"{sent}; send {accepted}", CLOSE)


def _bad_field(message: str) -> Problem:
    return Problem("malformed-request", message, errors=[{"in": "body", "field": FIELD, "message": message}])


def _too_large(max_bytes: int) -> str:
    return f"the image exceeds the limit of {max_bytes} bytes (CAMCAL_MAX_BYTES)"
