"""A bound on the memory that several threads take at once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.batching import DeadlineError


class Budget:
    """`limit` bytes for all threads together. Whoever needs more than all of it waits to be alone."""

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, nbytes: int, deadline: float = math.inf) -> Iterator[None]:
        """Hold `nbytes` for a while; first wait, in this thread, until there is room.

        Args:
            nbytes: how much.
            deadline: end of the wait, in the time of `time.monotonic`.

        Raises:
            DeadlineError: if there is no room until then.
        """
        with self._changed:
            wait_s = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            if not self._changed.wait_for(lambda: not self.held or self.held + nbytes <= self.limit, wait_s):
                raise DeadlineError
            self.held += nbytes
        try:
            yield
        finally:
            with self._changed:
                self.held -= nbytes
                self._changed.notify_all()
