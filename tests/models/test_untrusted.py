from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from camcal.models.untrusted import BundleError, checksum, illegible, parse_json, read


def test_reads_a_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text")
    (tmp_path / "inner").symlink_to("a")
    assert read(tmp_path, "a", 4) == read(tmp_path, "inner", 4) == b"text"
    assert checksum(tmp_path, "a", 4).startswith("982d9e3eb996f559")


def test_a_folder_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "a").write_bytes(b"text")
    (tmp_path / "current").symlink_to("bundle")
    assert read(tmp_path / "current", "a", 4) == b"text"


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "device").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        said = {
            "pipe": "is a pipe; expected a file",
            "folder": "is a folder; expected a file",
            "socket": "is a socket; expected a file",
            "device": "is a link out of its folder",
            "loop": "cannot be read",
            "nothing": "nothing is missing",
        }
        for name, sentence in said.items():
            with pytest.raises(BundleError, match=sentence):
                read(folder, name, 10)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**33)
    for look in (read, checksum):
        with pytest.raises(BundleError, match="huge has .* bytes; the limit is 10"):
            look(tmp_path, "huge", 10)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested over 64 deep"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": 99999999999999999999}', "is too large a number"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is too large a number"),
        (b'{"a": 1, "a": 2}', "'a' stands twice in one object"),
        (b'{"a": "\\u001b[2J"}', r"U\+001B is not allowed"),
        (b'{"a\\u202eb": 1}', r"U\+202E is not allowed"),
        (b'{"a": ["\\ud800"]}', r"U\+D800 is not allowed"),
        (b"[]", "must hold a JSON object"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_json_that_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        parse_json(data, Path("x.json"), strict=True)


def test_a_report_may_hold_what_python_writes() -> None:
    value = parse_json(b'{"a": NaN, "b": "two\\nlines"}', Path("x.json"), strict=False)
    assert value["b"] == "two\nlines"
    with pytest.raises(BundleError, match="nested over 64 deep"):
        parse_json(b'{"a":' * 100 + b"1" + b"}" * 100, Path("x.json"), strict=False)


@pytest.mark.parametrize("name", ["Größe", "日本", "کتاب‌خانه", "👩‍🔬", "שלום\u200e", "a b-c'd"])
def test_names_of_all_scripts_are_legible(name: str) -> None:
    assert illegible(name) is None


@pytest.mark.parametrize("character", ["\n", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066", "\ud800"])
def test_what_could_forge_a_line(character: str) -> None:
    assert illegible(f"a{character}b") == f"U+{ord(character):04X}"
