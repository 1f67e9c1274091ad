from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camcal.service.http.multipart import FormError, parse_form

TYPE = "multipart/form-data; boundary=x"


def part(head: str, data: bytes) -> bytes:
    return b"--x\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n"


@given(st.lists(st.tuples(st.text(min_size=1), st.binary(max_size=200)), min_size=1, max_size=5))
def test_what_a_client_sends_is_what_arrives(sent: list[tuple[str, bytes]]) -> None:
    request = httpx.Request("POST", "http://x/", files=[("image", (name, data)) for name, data in sent])
    parts = parse_form(request.headers["content-type"], request.read(), max_parts=5)
    assert [(p.name, p.is_file, bytes(p.data)) for p in parts] == [("image", True, data) for _, data in sent]


def test_data_that_looks_like_a_delimiter() -> None:
    data = b"--x\r\n\r\n-x\r\n--"
    body = part('Content-Disposition: form-data; name="a"; filename="b"', data) + b"--x--\r\n"
    (only,) = parse_form(TYPE, body, 1)
    assert bytes(only.data) == data


@pytest.mark.parametrize(
    ("head", "name", "is_file"),
    [
        ('Content-Disposition: form-data; name="image"; filename="a.png"', "image", True),
        ("content-disposition:form-data;name=image;filename=a.png", "image", True),
        ("Content-Type: image/png\r\nContent-Disposition: form-data; filename*=UTF-8''a; name=image", "image", True),
        ('Content-Disposition: form-data; name="image"; filename=""', "image", True),
        ('Content-Disposition: form-data; name="ima; filename=ge"', "ima; filename=ge", False),
        ('Content-Disposition: form-data; name="image"', "image", False),
        ('Content-Disposition: form-data;\r\n name="image";\r\n\t filename="a.png"\r\nA: b', "image", True),
    ],
)
def test_dispositions(head: str, name: str, is_file: bool) -> None:
    (only,) = parse_form(TYPE, part(head, b"data") + b"--x--", 1)
    assert (only.name, only.is_file, bytes(only.data)) == (name, is_file, b"data")


def test_preamble_epilogue_and_quoted_boundary() -> None:
    body = b"before\r\n" + part('Content-Disposition: form-data; name="a"', b"1") + b"--x--\r\nafter"
    for content_type in ('multipart/form-data; boundary="x"', "multipart/form-data; charset=utf-8; Boundary=x"):
        assert [bytes(p.data) for p in parse_form(content_type, bytearray(body), 1)] == [b"1"]


def test_blanks_after_a_delimiter() -> None:
    head = b'Content-Disposition: form-data; name="a"\r\n\r\n'
    body = b"--x \t\r\n" + head + b"1\r\n--x  \r\n" + head + b"2\r\n--x-- \r\n"
    assert [bytes(p.data) for p in parse_form(TYPE, body, 2)] == [b"1", b"2"]
    for delimiter in (b"--x y\r\n", b"--x \n", b"--x" + b" " * 10_000 + b"\r\n"):
        with pytest.raises(FormError, match="is not valid multipart"):
            parse_form(TYPE, delimiter + head + b"1\r\n--x--", 1)


def test_nothing_is_copied() -> None:
    body = bytearray(part('Content-Disposition: form-data; name="a"', b"1") + b"--x--")
    (only,) = parse_form(TYPE, body, 1)
    assert only.data.obj is body


def test_head_without_end() -> None:
    body = b"--x\r\n" + b"A: b\r\n" * 100_000 + b"\r\n\r\n--x--"
    with pytest.raises(FormError, match="is not valid multipart"):
        parse_form(TYPE, body, 1)


@given(st.binary(max_size=60), st.integers(0, 100))
def test_damaged_forms_raise_only_form_errors(noise: bytes, place: int) -> None:
    whole = part('Content-Disposition: form-data; name="a"', b"1") + b"--x--"
    try:
        parse_form(TYPE, whole[:place] + noise + whole[place:], 3)
        parse_form(noise.decode("latin-1"), whole, 3)
    except FormError as error:
        assert "\n" not in str(error)
