from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.batching import DeadlineError
from service.budget import Budget


def test_never_more_than_the_limit() -> None:
    budget = Budget(10)
    seen: list[int] = []

    def work(nbytes: int) -> None:
        with budget.hold(nbytes):
            seen.append(budget.held)
            time.sleep(0.001)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, [4, 3, 6, 1, 10, 2] * 8))
    assert len(seen) == 48
    assert max(seen) <= 10
    assert budget.held == 0


def test_more_than_all_of_it_waits_to_be_alone() -> None:
    budget, order = Budget(10), list[str]()

    def large() -> None:
        with budget.hold(1000):
            order.append("large")
            assert budget.held == 1000

    with budget.hold(1):
        thread = threading.Thread(target=large)
        thread.start()
        time.sleep(0.02)
        order.append("small")
    thread.join(5)
    assert order == ["small", "large"]


def test_deadline_and_errors_give_everything_back() -> None:
    budget = Budget(10)
    with budget.hold(8):
        with pytest.raises(DeadlineError), budget.hold(3, deadline=time.monotonic() + 0.01):
            pass
        with pytest.raises(KeyError), budget.hold(2):
            raise KeyError
        assert budget.held == 8
    assert budget.held == 0
