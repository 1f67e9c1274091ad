"""Splits the body of a `multipart/form-data` request that is in memory already; never touches the disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

MAX_PARTS = 16


class FormError(ValueError):
    """The body is not the form that its content type promises."""


@dataclass
class Part:
    """One part of a form; a file has a file name, a text field has none."""

    name: str = ""
    filename: str | None = None
    data: bytearray = field(default_factory=bytearray)


def parse_form(content_type: str, body: bytes) -> list[Part]:
    """The parts of `body`, in order.

    Args:
        content_type: the request's header, with its boundary.
        body: all of it.

    Raises:
        FormError: if there is no boundary, a part has no name, there are more than 16, or the end is missing.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise FormError("its content type names no boundary")
    collector = _Collector()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": collector.begin,
                "on_header_begin": collector.begin_header,
                "on_header_field": collector.header_name,
                "on_header_value": collector.header_value,
                "on_header_end": collector.end_header,
                "on_part_data": collector.part_data,
                "on_end": collector.end,
            },
        )
        parser.write(body)
    except FormParserError:
        raise FormError("it does not follow the form of multipart/form-data") from None
    if not collector.ended:
        raise FormError("it ends before its last boundary")
    if not all(part.name for part in collector.parts):
        raise FormError("a part has no name in its Content-Disposition")
    return collector.parts


class _Collector:
    """What the parser found so far."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._header = bytearray()
        self._value = bytearray()

    def begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise FormError(f"it has more than {MAX_PARTS} parts")
        self.parts.append(Part())

    def begin_header(self) -> None:
        self._header.clear()
        self._value.clear()

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def end_header(self) -> None:
        if self._header.lower() != b"content-disposition":
            return
        options = parse_options_header(bytes(self._value))[1]
        part = self.parts[-1]
        part.name = options.get(b"name", b"").decode(errors="replace")
        if b"filename" in options:
            part.filename = options[b"filename"].decode(errors="replace")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data += memoryview(data)[start:end]

    def end(self) -> None:
        self.ended = True
