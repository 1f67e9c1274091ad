"""Splits the body of a `multipart/form-data` request that is in memory already; copies nothing of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD_BYTES = 8 * 1024  # of one part

_LINE_END = re.compile(rb"[ \t]*\r\n")  # of a delimiter, after which mail systems may add blanks (RFC 2046, 5.1.1)
_FOLD = re.compile(rb"\r\n[ \t]+")  # within a header that is written on several lines
_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
# `name` and `filename` as browsers write them: quoted, with " as %22 or \"; or bare.
_PARAMETER = re.compile(rb';\s*(name|filename\*?)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))', re.IGNORECASE)


class FormError(ValueError):
    """The body is not the form that its content type promises."""


class TooManyPartsError(FormError):
    """The form has more parts than it may."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a form; a file has a file name, a text field has none."""

    name: str
    is_file: bool
    data: memoryview  # into the body


def parse_form(content_type: str, body: bytes | bytearray, max_parts: int) -> list[Part]:
    """The parts of `body`, in order (RFC 7578).

    Args:
        content_type: the request's header, with its boundary.
        body: all of it.
        max_parts: how many there may be.

    Raises:
        TooManyPartsError: if there are too many.
        FormError: if there is no boundary, a part has no name, or the end is missing.
    """
    boundary = _BOUNDARY.search(content_type)
    if not boundary:
        raise FormError("its content type names no boundary")
    # Every delimiter begins on a line of its own; the first may be the very first line.
    delimiter = b"\r\n--" + (boundary[1] or boundary[2]).encode()
    start = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    parts: list[Part] = []
    while start != -1:
        start += len(delimiter)
        if body[start : start + 2] == b"--":
            return parts
        if len(parts) == max_parts:
            raise TooManyPartsError(f"it has more than {max_parts} parts")
        line_end = _LINE_END.match(body, start, start + MAX_HEAD_BYTES)
        head_end = body.find(b"\r\n\r\n", line_end.end() - 2, start + MAX_HEAD_BYTES) if line_end else -1
        if line_end is None or head_end == -1:
            raise FormError("it does not follow the form of multipart/form-data")
        end = body.find(delimiter, head_end + 4)
        name, is_file = _disposition(bytes(body[line_end.end() : head_end]))
        parts.append(Part(name=name, is_file=is_file, data=memoryview(body)[head_end + 4 : end if end >= 0 else None]))
        start = end
    raise FormError("it ends before its last boundary")


def _disposition(head: bytes) -> tuple[str, bool]:
    """The name of a part with these headers, and whether it is a file."""
    for line in _FOLD.sub(b" ", head).split(b"\r\n"):
        header, colon, value = line.partition(b":")
        if not colon:
            raise FormError("it does not follow the form of multipart/form-data")
        if header.strip().lower() == b"content-disposition":
            found = {key.lower(): quoted or bare for key, quoted, bare in _PARAMETER.findall(value)}
            if name := found.get(b"name"):
                return name.decode(errors="replace"), not found.keys().isdisjoint((b"filename", b"filename*"))
    raise FormError("a part has no name in its Content-Disposition")
