from __future__ import annotations

import json

import pytest

from camcal.printable import printable, printable_lines


@pytest.mark.parametrize("text", ["", "Äpfel, 林檎, 🍎, a\\b", "família 👩‍👩‍👧", "عربي"])
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    "unsafe", ["\n", "\r", "\t", "\x00", "\x07", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\u202e", "\ud800"]
)
def test_control_characters_are_escaped(unsafe: str) -> None:
    text = printable(f"a{unsafe}[31mb")
    assert text == f"a\\u{ord(unsafe):04x}[31mb"
    assert text.isprintable()
    assert json.loads(f'"{text}"') == f"a{unsafe}[31mb"


def test_line_breaks_are_kept() -> None:
    assert printable_lines("a\x1b\nb\r") == "a\\u001b\nb\\u000d"
