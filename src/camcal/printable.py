"""Text of others, made safe to print: what it holds can neither begin a line of its own nor steer a terminal."""

from __future__ import annotations

import re

# Control characters, the separators of lines and paragraphs, the marks that change the direction of writing, and halves
# of surrogate pairs, which cannot be written at all.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with an escape like \\u001b, which JSON reads too, for each character that is not safe to print."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def printable_lines(text: str) -> str:
    """The same of several lines, which stay apart."""
    return "\n".join(map(printable, text.split("\n")))
