"""Checks API keys, and delays addresses that send invalid ones."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fastapi import Depends, Request
from starlette.types import Scope

from camcal.service.address import client_address
from camcal.service.http.errors import Problem
from camcal.service.http.rates import limit
from camcal.service.keys import ApiKey, Group, Keyring
from camcal.service.metrics import Metrics

log = logging.getLogger("camcal")

MAX_WAIT_S = 60.0
FORGET_S = 600.0  # since the last invalid key
MAX_ADDRESSES = 10_000  # remembered at the same time

_KEY = "camcal.key"  # in the scope of a request: its ApiKey


class Attempts:
    """Counts invalid keys per address. After `free` of them, each one doubles the delay, from one second to one minute.

    Args:
        free: number of invalid keys without a delay; 0 turns delays off.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, free: int, clock: Callable[[], float] = time.monotonic):
        self._free = free
        self._clock = clock
        self._failed: OrderedDict[str, tuple[int, float, float]] = OrderedDict()  # count, last, end of the delay

    def __len__(self) -> int:
        return len(self._failed)

    def wait_s(self, address: str) -> float:
        """Seconds until a key from `address` is checked again; 0 if it is checked now."""
        if not self._failed or (entry := self._failed.get(address)) is None:
            return 0.0
        return max(0.0, entry[2] - self._clock())

    def failed(self, address: str) -> float:
        """Count an invalid key, and return the delay in seconds."""
        if not self._free:
            return 0.0
        now = self._clock()
        count, last, _ = self._failed.pop(address, (0, now, now))
        count = 1 if now - last > FORGET_S else count + 1
        wait_s = min(MAX_WAIT_S, 2.0 ** min(count - self._free - 1, 10)) if count > self._free else 0.0
        self._failed[address] = count, now, now + wait_s
        if len(self._failed) > MAX_ADDRESSES:
            self._failed.popitem(last=False)
        return wait_s


def needs(group: Group) -> Any:
    """The dependency of a route in `group`: if the service has keys, the request needs one that may call the group.

    It reads the headers itself: FastAPI's security classes would add two more dependencies to every request.
    """

    async def check(request: Request) -> None:
        if request.app.state.keys:
            _check(request, group)

    return Depends(check)


async def for_metrics(request: Request) -> None:
    """Like `needs("metrics")`, if CAMCAL_METRICS_NEED_KEY is set."""
    if request.app.state.settings.metrics_need_key:
        _check(request, "metrics")


def key_of(scope: Scope) -> ApiKey | None:
    """The key of the request, once it has been checked."""
    key: ApiKey | None = scope.get(_KEY)
    return key


def owner_of(scope: Scope) -> str | None:
    """The name of the key that may read the heatmaps of this request; None if the service has no keys."""
    key = key_of(scope)
    return None if key is None else key.name


def _check(request: Request, group: Group) -> None:
    """Raises Problem 401 or 403 unless the request has a key that may call `group`, and 429 if it exceeds its rate."""
    state, scope = request.app.state, request.scope
    key = scope[_KEY] = _find(request, state.keys, state.attempts, state.metrics)
    if group not in key.routes:
        state.metrics.unauthorized.labels("route").inc()
        message = f"the API key {key.name!r} may not call this route; it may call {', '.join(sorted(key.routes))}"
        raise Problem("forbidden", message, {"Connection": "close"})
    if rate := key.rate or state.settings.key_rate:
        limit(scope, f"key {key.name}", rate, "CAMCAL_API_KEYS_FILE" if key.rate else "CAMCAL_KEY_RATE")


def _find(request: Request, keys: Keyring, attempts: Attempts, metrics: Metrics) -> ApiKey:
    """The key of the request. Raises Problem 401 if it is missing or invalid, 429 if the address has to wait."""
    given = _given(request)
    if not given:
        metrics.unauthorized.labels("missing").inc()
        raise _unauthorized("send the API key")
    address = client_address(request.scope)
    if wait_s := attempts.wait_s(address):
        metrics.unauthorized.labels("wait").inc()
        raise Problem(
            "too-many-attempts",
            f"{address} has sent too many invalid API keys (CAMCAL_KEY_ATTEMPTS); wait for the seconds in Retry-After",
            {"Retry-After": str(math.ceil(wait_s)), "Connection": "close"},
        )
    if key := keys.find(given):
        return key
    metrics.unauthorized.labels("wrong").inc()
    if wait_s := attempts.failed(address):
        log.warning("%s has sent another invalid API key and has to wait for %g s", address, wait_s)
    raise _unauthorized("the API key is invalid; send a valid one")


def _given(request: Request) -> str:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def _unauthorized(message: str) -> Problem:
    headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}  # the client may still be sending the body
    return Problem("unauthorized", f"{message} as `Authorization: Bearer <key>` or `X-API-Key: <key>`", headers)
