"""Stores for explanations, from which heatmaps are drawn on request."""

from __future__ import annotations

import re
import secrets
import string
from typing import Protocol

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"


class MapStore(Protocol):
    """A key-value store with expiry. It may lose entries: their heatmaps are then 404."""

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Store `value` for at most `ttl_s` seconds. If this raises, the prediction is returned without a heatmap."""

    async def get(self, key: str) -> bytes | None:
        """The value, or None if it is unknown or expired."""

    async def delete(self, key: str) -> bool:
        """Delete the value. Returns False if it is unknown or expired."""

    async def close(self) -> None:
        """Release all resources."""


def new_id(owner: int = 0) -> str:
    """A random id with 122 bits, for an entry in the store of worker `owner`."""
    return _DIGITS[owner] + secrets.token_urlsafe(16)[1:]


def owner(key: str) -> int:
    """The worker whose store has the entry of an id."""
    return _DIGITS.index(key[0])


def is_id(key: str) -> bool:
    """Whether `key` has the format of `new_id`. Other keys are never looked up."""
    return _ID.fullmatch(key) is not None
