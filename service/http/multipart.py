"""Parses the body of a `multipart/form-data` request that is already in memory, without copying it."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD_BYTES = 8 * 1024  # headers of one part

_LINE_END = re.compile(rb"[ \t]*\r\n")  # after a delimiter, with optional whitespace (RFC 2046, 5.1.1)
_FOLD = re.compile(rb"\r\n[ \t]+")  # in a header that spans several lines
_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
# `name` and `filename` as browsers send them: quoted, with " as %22 or \", or unquoted.
_PARAMETER = re.compile(rb';\s*(name|filename\*?)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))', re.IGNORECASE)


class FormError(ValueError):
    """The body is not a valid form."""


class TooManyPartsError(FormError):
    """The form has too many parts."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a form. A file has a file name, a text field does not."""

    name: str
    is_file: bool
    data: memoryview  # of the body


def parse_form(content_type: str, body: bytes | bytearray, max_parts: int) -> list[Part]:
    """The parts of `body`, in order (RFC 7578).

    Args:
        content_type: the header of the request, with the boundary.
        body: the whole body.
        max_parts: maximum number of parts.

    Raises:
        TooManyPartsError: if there are too many.
        FormError: if the boundary, the name of a part or the end is missing.
    """
    boundary = _BOUNDARY.search(content_type)
    if not boundary:
        raise FormError("the content type has no boundary")
    # Every delimiter starts a new line; the first may be the first line of the body.
    delimiter = b"\r\n--" + (boundary[1] or boundary[2]).encode()
    start = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    parts: list[Part] = []
    while start != -1:
        start += len(delimiter)
        if body[start : start + 2] == b"--":
            return parts
        if len(parts) == max_parts:
            raise TooManyPartsError(f"the form has more than {max_parts} parts")
        line_end = _LINE_END.match(body, start, start + MAX_HEAD_BYTES)
        head_end = body.find(b"\r\n\r\n", line_end.end() - 2, start + MAX_HEAD_BYTES) if line_end else -1
        if line_end is None or head_end == -1:
            raise FormError("the body is not valid multipart/form-data")
        end = body.find(delimiter, head_end + 4)
        name, is_file = _disposition(bytes(body[line_end.end() : head_end]))
        parts.append(Part(name=name, is_file=is_file, data=memoryview(body)[head_end + 4 : end if end >= 0 else None]))
        start = end
    raise FormError("the body ends before the last boundary")


def _disposition(head: bytes) -> tuple[str, bool]:
    """The name in the headers of a part, and whether the part is a file."""
    for line in _FOLD.sub(b" ", head).split(b"\r\n"):
        header, colon, value = line.partition(b":")
        if not colon:
            raise FormError("the body is not valid multipart/form-data")
        if header.strip().lower() == b"content-disposition":
            found = {key.lower(): quoted or bare for key, quoted, bare in _PARAMETER.findall(value)}
            if name := found.get(b"name"):
                return name.decode(errors="replace"), not found.keys().isdisjoint((b"filename", b"filename*"))
    raise FormError("a part has no name in its Content-Disposition")
