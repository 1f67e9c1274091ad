"""Files that nobody has vouched for yet: read only if they are regular, within their folder and of bounded size."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_DEPTH = 64  # of nested JSON; ours has 6
MAX_WHOLE = 2**53  # of whole numbers in JSON, which other readers keep as floating point

# Control characters, line separators, bidirectional overrides and lone surrogates: text with them can forge a line of
# a log, or steer a terminal. Marks that scripts and emoji need (ZWJ, ZWNJ, LRM, RLM) are fine.
_ILLEGIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class BundleError(ValueError):
    """A folder that is not a bundle, or no longer the bundle that its manifest describes."""


def illegible(text: str) -> str | None:
    """The first character of `text` that no name may have, as U+XXXX; None if there is none."""
    found = _ILLEGIBLE.search(text)
    return f"U+{ord(found[0]):04X}" if found else None


@contextlib.contextmanager
def opened(folder: Path, name: str, max_bytes: int) -> Iterator[tuple[BufferedReader, int]]:
    """The file `name` of `folder`, and its size.

    Raises:
        BundleError: if it is missing, no regular file, outside the folder or larger than `max_bytes`. Pipes and devices
            are not opened.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            raise BundleError(f"{path} is a link out of its folder; put the file itself there")
        _require_regular(path, real.stat().st_mode)
        # Should a pipe take its place now, opening must not wait for a writer.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(real, flags), "rb") as file:
            found = os.fstat(file.fileno())
            _require_regular(path, found.st_mode)
            if found.st_size > max_bytes:
                raise BundleError(f"{path} has {found.st_size} bytes; the limit is {max_bytes}")
            yield file, found.st_size
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a complete bundle: {name} is missing") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else None
        raise BundleError(f"{path} cannot be read: {reason or error}") from None


def read(folder: Path, name: str, max_bytes: int) -> bytes:
    """The bytes of a file; raises as `opened`, and if its size changes meanwhile."""
    with opened(folder, name, max_bytes) as (file, size):
        data = file.read(size + 1)
    if len(data) != size:
        raise BundleError(f"{folder / name} changed while it was read")
    return data


def checksum(folder: Path, name: str, max_bytes: int) -> str:
    """The hexadecimal SHA-256 of a file; raises as `opened`."""
    with opened(folder, name, max_bytes) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(data: bytes, shown: Path, *, strict: bool) -> dict[str, Any]:
    """The JSON object in `data`, no deeper than `MAX_DEPTH`.

    Args:
        shown: the file, for messages.
        strict: also refuse names that stand twice, numbers that are not finite or whole and over 2**53, and text that
            is `illegible`.

    Raises:
        BundleError: if there is no such object.
    """
    hooks: dict[str, Any] = {}
    if strict:
        hooks = {
            "parse_constant": _no_constant,
            "parse_float": _finite,
            "parse_int": _whole,
            "object_pairs_hook": _no_name_twice,
        }
    try:
        value = json.loads(data, **hooks)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BundleError(f"{shown} cannot be read: {reason}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{shown} must hold a JSON object")
    _check(value, shown, strict)
    return value


def _check(value: dict[str, Any], shown: Path, strict: bool) -> None:
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            if strict and (found := illegible(item)):
                raise BundleError(f"{shown} holds {ascii(item)[:80]}: the character {found} is not allowed in its text")
        elif isinstance(item, (dict, list)):
            if depth > MAX_DEPTH:
                raise BundleError(f"{shown} cannot be read: it is nested over {MAX_DEPTH} deep")
            inside = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            waiting += [(part, depth + 1) for part in inside if isinstance(part, (str, dict, list))]


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        raise BundleError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}; expected a file")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is not a finite number")
    return value


def _whole(digits: str) -> int:
    if len(digits) > 17 or abs(value := int(digits)) > MAX_WHOLE:
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"{ascii(twice)[:80]} stands twice in one object")
    return value
