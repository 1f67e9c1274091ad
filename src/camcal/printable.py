"""Escape untrusted text before printing: it can neither start a new line nor control a terminal."""

from __future__ import annotations

import re

# Control characters, line and paragraph separators, marks that change the text direction, and lone surrogates, which
# cannot be encoded.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with unsafe characters escaped as in JSON, such as \\u001b."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def printable_lines(text: str) -> str:
    """Like `printable`, but keep line breaks."""
    return "\n".join(map(printable, text.split("\n")))
