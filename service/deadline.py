"""The header with which a client says how long it will wait."""

from __future__ import annotations

import math
import time
from typing import Annotated

from fastapi import Header

TimeoutMs = Annotated[
    int | None,
    Header(
        alias="X-Request-Timeout-Ms",
        ge=1,
        le=10**9,
        description="The client waits this many milliseconds from the request's arrival: 504.",
    ),
]


def latest(wish_ms: int | None) -> float:
    """The moment, in the time of `time.monotonic`, `wish_ms` from now; infinitely late without a wish."""
    return math.inf if wish_ms is None else time.monotonic() + wish_ms / 1000
