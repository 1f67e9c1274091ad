from __future__ import annotations

import pytest

from camcal.service.http import rates
from camcal.service.http.rates import RateLimitError, RateLimits
from tests.service.conftest import ClientFactory, png
from tests.service.engine.test_admission import Clock
from tests.service.http.routes.test_batch import files
from tests.service.http.routes.test_predict import RAW, problem


def spend(limits: RateLimits, name: str, rate: float) -> int | None:
    """None if a token was spent, or else when the next is there."""
    try:
        limits.spend(name, rate, "CAMCAL_ADDRESS_RATE")
    except RateLimitError as error:
        return error.retry_after_s
    return None


def test_burst_then_rate() -> None:
    clock = Clock()
    limits = RateLimits(2.0, clock=clock)
    assert [spend(limits, "one", 5) for _ in range(11)] == [None] * 10 + [1]
    assert spend(limits, "other", 5) is None
    clock.now += 0.1
    assert spend(limits, "one", 5) == 1
    clock.now += 0.1
    assert [spend(limits, "one", 5) for _ in range(2)] == [None, 1]
    clock.now += 100
    assert [spend(limits, "one", 5) for _ in range(11)] == [None] * 10 + [1]


def test_a_request_in_half_a_minute() -> None:
    clock = Clock()
    limits = RateLimits(2.0, clock=clock)
    assert [spend(limits, "one", 1 / 30) for _ in range(2)] == [None, 30]
    with pytest.raises(RateLimitError, match=r"one may send one request per 30 s \(CAMCAL_ADDRESS_RATE\)"):
        limits.spend("one", 1 / 30, "CAMCAL_ADDRESS_RATE")
    clock.now += 29.5
    assert spend(limits, "one", 1 / 30) == 1
    clock.now += 0.5  # when it was told to come back
    assert spend(limits, "one", 1 / 30) is None


def test_workers_share_the_rate() -> None:
    clock = Clock()
    limits = RateLimits(2.0, workers=4, clock=clock)
    assert [spend(limits, "one", 8) for _ in range(5)] == [None] * 4 + [1]
    clock.now += 0.5
    assert [spend(limits, "one", 8) for _ in range(2)] == [None, 1]


def test_debt_is_paid_before_the_next_request() -> None:
    clock = Clock()
    limits = RateLimits(2.0, clock=clock)
    limits.owe("nobody", 5, 100)
    assert spend(limits, "one", 5) is None
    limits.owe("one", 5, 63)
    assert spend(limits, "one", 5) == 11  # 54 of 64 images above the burst of 10, and one for the request
    clock.now += 11
    assert spend(limits, "one", 5) is None


def test_who_was_idle_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MAX_BUCKETS", 3)
    limits = RateLimits(1.0, clock=Clock())
    for name in ("a", "b", "c", "a", "d"):
        assert spend(limits, name, 5) is None
    assert list(limits._full_at) == ["c", "a", "d"]
    assert len(limits) == 3


def test_address_over_its_rate(client_factory: ClientFactory) -> None:
    client = client_factory(address_rate=0.01, rate_burst_s=200, trusted_proxies="192.0.2.0/24")
    assert [client.get("/model").status_code for _ in range(2)] == [200, 200]
    refused = client.post("/predict", content=png(), headers=RAW)
    assert "may send one request per 100 s (CAMCAL_ADDRESS_RATE)" in problem(refused, 429, "rate-limited")
    assert refused.headers["retry-after"] == "100"
    problem(client.get("/nothing"), 429, "rate-limited")
    counted = client.get("/metrics")  # and probes are always answered
    assert client.get("/health/ready").status_code == 200
    assert 'camcal_rejected_total{reason="rate_limited"} 2.0' in counted.text
    assert 'camcal_requests_total{code="429",route="/predict"} 1.0' in counted.text


def test_images_of_a_batch_count(client_factory: ClientFactory) -> None:
    client = client_factory(address_rate=0.01, rate_burst_s=300)
    assert client.post("/predict/batch", files=files(png(), png(), png(), png())).status_code == 200
    refused = client.post("/predict", content=png(), headers=RAW)
    problem(refused, 429, "rate-limited")
    assert int(refused.headers["retry-after"]) == 200
