"""Rate limits for addresses and API keys: token buckets."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import Scope

MAX_BUCKETS = 10_000  # remembered at the same time

_PAID = "camcal.buckets"  # in the scope of a request: name and rate of each bucket that it took a token from


class RateLimitError(RuntimeError):
    """A client exceeds its rate limit. `retry_after_s` is when to retry, in whole seconds."""

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimits:
    """One token bucket per name. Used from one event loop only, so it needs no lock.

    A bucket is stored as the time when it will be full. If there are too many, the least recently used one is dropped,
    which makes it full.

    Args:
        burst_s: seconds of tokens in a full bucket, which holds at least one token.
        workers: number of processes that share each rate.
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
        """Take the token for one request from the bucket of `name`.

        Args:
            name: an address, or `key` and the name of a key.
            rate: tokens per second, for all workers together.
            setting: the setting of this limit, for the error message.

        Raises:
            RateLimitError: if the bucket is empty.
        """
        token_s = self._workers / rate
        now = self._clock()
        full_at = max(now, self._full_at.get(name, now))
        wait_s = full_at + token_s - now - max(self._burst_s, token_s)
        if wait_s > 1e-6:
            limit = f"{rate:g} requests per second" if rate >= 1 else f"one request per {1 / rate:g} s"
            raise RateLimitError(f"{name} may send {limit} ({setting}); wait for {wait_s:.1f} s", math.ceil(wait_s))
        self._full_at[name] = full_at + token_s
        self._full_at.move_to_end(name)
        if len(self._full_at) > MAX_BUCKETS:
            self._full_at.popitem(last=False)

    def owe(self, name: str, rate: float, tokens: int) -> None:
        """Take more `tokens`, even if the bucket does not have them. The next request then waits longer."""
        if name in self._full_at:
            self._full_at[name] += tokens * self._workers / rate


def limit(scope: Scope, name: str, rate: float, setting: str) -> None:
    """Take a token for the request of `scope`, like `RateLimits.spend`. `charge_images` takes more for its images.

    The check of API keys calls this with the key: `limit(scope, f"key {name}", rate, "CAMCAL_KEY_RATE")`.
    """
    limits: RateLimits = scope["app"].state.rates
    limits.spend(name, rate, setting)
    scope.setdefault(_PAID, []).append((name, rate))


def charge_images(scope: Scope, images: int) -> None:
    """Count each image of a request as one request."""
    limits: RateLimits = scope["app"].state.rates
    for name, rate in scope.get(_PAID, ()):
        limits.owe(name, rate, images - 1)
