"""Where explanations wait for their heatmaps to be asked for."""

from __future__ import annotations

import re
import secrets
import string
from typing import Protocol

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"


class MapStore(Protocol):
    """Keeps bytes under an id for a while. A lost entry is no fault: its heatmap is then answered 404."""

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keep `value` for `ttl_s` seconds at most. May raise anything: the prediction goes out without a map."""

    async def get(self, key: str) -> bytes | None:
        """The value, or None if it is unknown or its life is over."""

    async def delete(self, key: str) -> bool:
        """Forget the value; False if there was none."""

    async def close(self) -> None:
        """Give back what the store holds."""


def new_id(owner: int = 0) -> str:
    """An id that nobody can guess, 122 random bits, of an entry that worker `owner` keeps."""
    return _DIGITS[owner] + secrets.token_urlsafe(16)[1:]


def owner(key: str) -> int:
    """The worker that keeps the entry of an id."""
    return _DIGITS.index(key[0])


def is_id(key: str) -> bool:
    """Whether `key` looks like an id of `new_id`; anything else never reaches a store."""
    return _ID.fullmatch(key) is not None
