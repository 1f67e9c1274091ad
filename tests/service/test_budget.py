from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable

import pytest

from service.batching import DeadlineError
from service.budget import Budget
from service.decoding import NoRoomError
from tests.service.conftest import ClientFactory, png
from tests.service.test_live import wait_for
from tests.service.test_predict import RAW


async def waiter(budget: Budget, nbytes: int, deadline: float = math.inf) -> asyncio.Task[Callable[[], None]]:
    """Somebody who waits already."""
    task = asyncio.ensure_future(budget.wait(nbytes, deadline))
    await asyncio.sleep(0)
    return task


def test_never_more_than_the_limit() -> None:
    budget, seen = Budget(10), list[int]()

    def work(nbytes: int) -> None:
        with budget.hold(nbytes):
            seen.append(budget.held)
            time.sleep(0.001)

    async def take(nbytes: int) -> None:
        try:
            await asyncio.to_thread(work, nbytes)
        except NoRoomError as error:
            give_back = await budget.wait(error.nbytes, math.inf)
            seen.append(budget.held)
            await asyncio.to_thread(give_back)

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*map(take, [4, 3, 6, 1, 10, 2] * 8)), 20)

    asyncio.run(main())
    assert len(seen) == 48
    assert max(seen) <= 10
    assert (budget.held, budget._passed) == (0, 0)


def test_more_than_all_of_it_waits_to_be_alone() -> None:
    async def main() -> None:
        budget = Budget(10)
        with budget.hold(1):
            large = await waiter(budget, 1000)
            with pytest.raises(NoRoomError), budget.hold(1):
                pass
            assert not large.done()
        give_back = await large
        assert budget.held == 1000
        give_back()
        assert budget.held == 0

    asyncio.run(main())


def test_in_order_of_arrival() -> None:
    async def main() -> None:
        budget = Budget(10)
        with budget.hold(8):
            first, second, third = [await waiter(budget, nbytes) for nbytes in (7, 6, 4)]
        (await first)()
        await asyncio.gather(second, third)
        assert budget.held == 10

    asyncio.run(main())


def test_small_ones_pass_without_delay_for_the_first_that_waits() -> None:
    async def main() -> None:
        budget = Budget(10)
        with budget.hold(6):
            large = await waiter(budget, 7)
            with budget.hold(2):
                small = await waiter(budget, 3)
                with pytest.raises(NoRoomError), budget.hold(2):  # room there is, but not beside the large one
                    pass
                assert not small.done()
            give_back = await small
        await large
        assert budget.held == 10
        with pytest.raises(NoRoomError), budget.hold(1):
            pass
        give_back()
        with budget.hold(3):
            assert budget.held == 10

    asyncio.run(main())


def test_deadline_and_errors_give_everything_back() -> None:
    async def main() -> None:
        budget = Budget(10)
        with budget.hold(8):
            with pytest.raises(DeadlineError):
                await budget.wait(3, time.monotonic() + 0.01)
            with pytest.raises(KeyError), budget.hold(2):
                raise KeyError
            large, small = await waiter(budget, 9), await waiter(budget, 2)
            assert not small.done()  # beside the large one there is no room for it
            large.cancel()
            (await small)()
            late = await waiter(budget, 3)
        late.cancel()  # in the moment in which there is room
        await asyncio.wait({large, late})
        assert large.cancelled() and late.cancelled()
        assert (budget.held, budget._passed) == (0, 0)

    asyncio.run(main())


def test_image_that_waits_for_memory_takes_no_thread(client_factory: ClientFactory) -> None:
    client = client_factory(decode_threads=1, decode_bytes=5_000_000)
    budget = client.app.state.runtime.decoding  # type: ignore[attr-defined]  # any ASGI app
    answers: list[int] = []

    def post_large() -> None:
        answers.append(client.post("/predict", content=png(size=(600, 400)), headers=RAW).status_code)

    large = threading.Thread(target=post_large)
    with budget.hold(1_000_000):
        large.start()
        wait_for(lambda: budget._waiting)
        assert client.post("/predict", content=png(), headers=RAW).status_code == 200
        assert not answers
    large.join(10)
    assert answers == [200]
    assert budget.held == 0
