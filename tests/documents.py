"""The documents of the repository, and the blocks of code in them.

A block of `bash` or `python` stands below a comment that says whether the tests run it:

    <!-- run -->               in a scratch folder that looks like a clone, after the blocks above it
    <!-- run: background -->   the same, and it goes on: a service, which the blocks below it may use
    <!-- not run: REASON -->

An output is a block of `text`; below `<!-- output -->` it has lines that the block run before it must print.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("bash", "python")

_FENCE = re.compile(r"^ *```(\w*)$")
_MARKER = re.compile(r"^<!-- (run|run: background|not run: \S.*|output) -->$")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block; `marker` is what the comment above it says, None without one."""

    document: Path
    line: int
    language: str
    marker: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """Every Markdown file of the repository."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")]
    return sorted(found)


def prose(document: Path) -> str:
    """The text of a document without its fenced blocks."""
    lines, inside = [], False
    for line in document.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


def blocks(document: Path) -> Iterator[Block]:
    lines = document.read_text(encoding="utf-8").splitlines()
    start = None
    for i, line in enumerate(lines):
        if not (fence := _FENCE.match(line)):
            continue
        if start is None:
            start, language = i, fence[1]
            continue
        marker = _MARKER.match(lines[start - 1]) if start else None
        text = "\n".join(lines[start + 1 : i])
        said = marker[1] if marker else None
        yield Block(document=document, line=start + 1, language=language, marker=said, text=text)
        start = None


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    return set(phony.split())
