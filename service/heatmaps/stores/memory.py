"""A store in the memory of this process, limited in bytes and time."""

from __future__ import annotations

import time
from collections.abc import Callable

OVERHEAD_BYTES = 200  # per entry, in addition to its value: key, tuple, float and dictionary slot


class MemoryStore:
    """Evicts expired entries, and the oldest entries when the store is full.

    Args:
        max_bytes: maximum size of all entries together.
        on_evict: called with the reason of each removal: `expired`, `full` or `deleted`.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        max_bytes: int,
        on_evict: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._on_evict = on_evict
        self._clock = clock
        self._entries: dict[str, tuple[float, bytes]] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._entries)

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Store `value`. Raises ValueError if it alone exceeds `max_bytes`."""
        size = len(value) + OVERHEAD_BYTES
        if size > self.max_bytes:
            raise ValueError(f"the entry has {size} bytes; the limit is {self.max_bytes} (CAMCAL_CAM_MAX_BYTES)")
        self._drop_expired()
        while self.nbytes + size > self.max_bytes:
            self._drop(next(iter(self._entries)), "full")
        self._entries[key] = (self._clock() + ttl_s, value)
        self.nbytes += size

    async def get(self, key: str) -> bytes | None:
        """The value, or None if it is unknown or expired."""
        self._drop_expired()
        entry = self._entries.get(key)
        return None if entry is None or entry[0] <= self._clock() else entry[1]

    async def delete(self, key: str) -> bool:
        """Delete the value. Returns False if it is unknown or expired."""
        self._drop_expired()
        if key not in self._entries:
            return False
        self._drop(key, "deleted")
        return True

    async def close(self) -> None:
        """Delete all entries."""
        self._entries.clear()
        self.nbytes = 0

    def _drop_expired(self) -> None:
        # All entries of a service have the same lifetime, so the oldest expires first.
        now = self._clock()
        while self._entries and self._entries[oldest := next(iter(self._entries))][0] <= now:
            self._drop(oldest, "expired")

    def _drop(self, key: str, reason: str) -> None:
        self.nbytes -= len(self._entries.pop(key)[1]) + OVERHEAD_BYTES
        self._on_evict(reason)
