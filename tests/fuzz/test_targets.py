"""The parsers under hypothesis: the same targets as `make fuzz` has, for a few seconds each, and what it found once."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

BOUNDED = settings(
    max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@st.composite
def changed(draw: st.DrawFn, name: str) -> bytes:
    """One of a target's seeds, with up to four pieces replaced."""
    data = bytearray(draw(st.sampled_from(TARGETS[name].seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8) | st.sampled_from(PIECES))
    return bytes(data)


PIECES = [b"\r\n", b"\r\n\r\n", b"--b", b'"', b"[[[[", b"{}", b"-1", b"1e999", b"NaN", b"null", b"\xff" * 4, b"\x80"]


@pytest.mark.parametrize("name", TARGETS)
def test_parser_fails_on_nothing_but_its_own_kind_of_error(name: str) -> None:
    @BOUNDED
    @given(changed(name))
    def check(data: bytes) -> None:
        TARGETS[name].check(data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_of_a_target_pass(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].check(seed)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("inference", b"\n" + b"[" * 100_000),
        ("inference", b'\n{"inputs":' + b"[" * 100_000),
        ("inference", b"1" * 11 + b"\n{}"),
        ("inference", b'\n{"inputs":[{"name":"images","shape":[1e400],"datatype":"UINT8"}]}'),
        (
            "inference",
            b'\n{"inputs":[{"name":"images","shape":[1,4,4,3],"datatype":"UINT8","data":[' + b"9" * 5000,
        ),
        ("multipart", b"multipart/form-data; boundary=b\n--b\r\n" + b"\r\n " * 3000),
        ("manifest", b"[" * 100_000),
        ("manifest", b'{"schema_version": ' + b"[" * 100_000),
        ("manifest", b'{"schema_version": ' + b"1" * 5000 + b"}"),
        ("manifest", b"\xff\xfe{}"),
        ("manifest", b'{"schema_version": 1, "name": "\\ud800"}'),
        ("model", b"\xff" * 100_000),
        ("model", b"\x3a" * 100_000),
        ("model", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
    ],
)
def test_hostile_input_is_refused(name: str, data: bytes) -> None:
    TARGETS[name].check(data)
