"""Token buckets: how many requests a second an address or an API key may send."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import Scope

MAX_BUCKETS = 10_000  # remembered at once

_PAID = "camcal.buckets"  # in a request's scope: the name and rate of each bucket that it took a token from


class RateLimitError(RuntimeError):
    """Somebody sends faster than allowed; one request is allowed again in `retry_after_s`, in whole seconds."""

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimits:
    """A token bucket for each name. Used from one event loop only, so it needs no lock.

    A bucket is one number: when it will be full again. The name that was idle longest is forgotten for a new one; its
    bucket then counts as full.

    Args:
        burst_s: a full bucket holds the tokens of so many seconds, and at least one.
        workers: processes that share each rate.
        clock: the time, in seconds.
    """

    def __init__(self, burst_s: float, workers: int = 1, clock: Callable[[], float] = time.monotonic):
        self._burst_s = burst_s
        self._workers = workers
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def spend(self, name: str, rate: float, setting: str) -> None:
        """Take the token of one request from the bucket of `name`.

        Args:
            name: an address, or `key` and the name of a key.
            rate: tokens a second, of all workers together.
            setting: what the operator calls this limit.

        Raises:
            RateLimitError: if the bucket is empty.
        """
        token_s = self._workers / rate
        now = self._clock()
        full_at = max(now, self._full_at.get(name, now))
        wait_s = full_at + token_s - now - max(self._burst_s, token_s)
        if wait_s > 1e-6:
            limit = f"{rate:g} requests a second" if rate >= 1 else f"one request in {1 / rate:g} s"
            raise RateLimitError(f"{name} may send {limit} ({setting}); wait for {wait_s:.1f} s", math.ceil(wait_s))
        self._full_at[name] = full_at + token_s
        self._full_at.move_to_end(name)
        if len(self._full_at) > MAX_BUCKETS:
            self._full_at.popitem(last=False)

    def owe(self, name: str, rate: float, tokens: int) -> None:
        """Take more `tokens`, even if the bucket does not have them: the next request then waits the longer."""
        if name in self._full_at:
            self._full_at[name] += tokens * self._workers / rate


def limit(scope: Scope, name: str, rate: float, setting: str) -> None:
    """Let the request of `scope` spend a token as `RateLimits.spend`, and pay for its images later.

    The check of API keys calls this once it knows the key: `limit(scope, f"key {name}", rate, "CAMCAL_KEY_RATE")`.
    """
    limits: RateLimits = scope["app"].state.rates
    limits.spend(name, rate, setting)
    scope.setdefault(_PAID, []).append((name, rate))


def charge_images(scope: Scope, images: int) -> None:
    """Count each image of a request with several as a request."""
    limits: RateLimits = scope["app"].state.rates
    for name, rate in scope.get(_PAID, ()):
        limits.owe(name, rate, images - 1)
