from __future__ import annotations

import pytest

from service.admission import Admission, QueueFullError, Ticket


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_ticket_gives_everything_back() -> None:
    admission = Admission(queue_limit=2, queue_bytes=100)
    with admission.ticket() as ticket:
        ticket.reserve(60)
        ticket.join()
        assert (admission.depth, admission.nbytes) == (1, 60)
        ticket.leave()
        ticket.leave()
        assert (admission.depth, admission.nbytes) == (0, 60)
    assert (admission.depth, admission.nbytes) == (0, 0)


def test_bytes_are_held_as_long_as_anybody_keeps_them() -> None:
    admission = Admission(queue_limit=2, queue_bytes=100)
    with admission.ticket() as ticket:
        ticket.reserve(60)
        ticket.join()
        ticket.keep()()
        drop = ticket.keep()
    assert (admission.depth, admission.nbytes) == (0, 60)
    drop()
    assert admission.nbytes == 0


def test_full_in_requests() -> None:
    admission = Admission(queue_limit=1, queue_bytes=100)
    with admission.ticket() as first:
        first.join()
        with admission.ticket() as second, pytest.raises(QueueFullError, match="CAMCAL_QUEUE_LIMIT") as caught:
            second.join()
        assert admission.depth == 1
    assert (caught.value.reason, caught.value.retry_after_s) == ("queue_full", 1)


def test_full_in_bytes() -> None:
    admission = Admission(queue_limit=9, queue_bytes=100)
    with admission.ticket() as first, admission.ticket() as second:
        first.reserve(60)
        with pytest.raises(QueueFullError, match="60 bytes of images are waiting; the limit is 100") as caught:
            second.reserve(50)
        second.reserve(40)
    assert caught.value.reason == "queue_bytes"
    assert admission.nbytes == 0


def test_wait_follows_the_rate_measured_while_somebody_waits() -> None:
    clock = Clock()
    admission = Admission(queue_limit=100, queue_bytes=100, clock=clock)
    for _ in range(2):  # far apart: that says nothing of the rate
        with admission.ticket() as ticket:
            ticket.join()
            clock.now += 100
    waiting = [admission.ticket() for _ in range(60)]
    for ticket in waiting:
        ticket.join()
    assert (admission.wait_s(), admission.retry_after_s()) == (0, 1)
    for ticket in waiting[:20]:  # two a second
        clock.now += 0.5
        ticket.leave()
    assert admission.wait_s() == pytest.approx(40 / 2)
    assert admission.retry_after_s() == 20
    for ticket in waiting:
        ticket.leave()
    assert admission.wait_s() == 0


def test_batches_that_empty_the_queue_say_nothing_of_the_rate() -> None:
    clock = Clock()
    admission = Admission(queue_limit=1000, queue_bytes=100, clock=clock)

    def batch(tickets: list[Ticket]) -> None:
        clock.now += 0.4
        for ticket in tickets:
            ticket.leave()
            clock.now += 0.00001

    def join(count: int) -> list[Ticket]:
        tickets = [admission.ticket() for _ in range(count)]
        for ticket in tickets:
            ticket.join()
        return tickets

    for _ in range(50):  # 8 clients that ask again when they are answered
        batch(join(8))
    waiting = join(80)
    assert admission.wait_s() == 0
    batch(waiting[:8])
    assert admission.wait_s() == 0  # how long the device had been busy with what came before, nobody knows
    batch(waiting[8:16])
    batch(waiting[16:24])
    assert admission.wait_s() == pytest.approx(56 / 8 * 0.4, rel=0.01)


def test_nobody_enters_for_a_long_wait_unless_few_are_there() -> None:
    clock = Clock()
    admission = Admission(queue_limit=9, queue_bytes=100, queue_s=2.5, patient=3, clock=clock)
    waiting = [admission.ticket() for _ in range(8)]
    for ticket in waiting:
        ticket.join()
    for ticket in waiting[:3]:  # one a second
        clock.now += 1
        ticket.leave()
    newcomer = admission.ticket()
    with pytest.raises(QueueFullError, match=r"5 requests .* about 5.0 s; the limit is 2.5 s ") as caught:
        admission.check()
    assert (caught.value.reason, caught.value.retry_after_s) == ("queue_full", 5)
    newcomer.join()  # whose body has come is not sent away
    for ticket in (newcomer, *waiting[3:5]):
        ticket.leave()
    admission.check()
    clock.now += 30
    waiting[5].leave()
    waiting[6].join()
    assert admission.depth == 3 and admission.wait_s() > 2.5
    with pytest.raises(QueueFullError):
        admission.check()
    waiting[6].leave()
    admission.check()  # two are few


def test_nobody_enters_a_full_queue() -> None:
    admission = Admission(queue_limit=1, queue_bytes=100)
    with admission.ticket() as first:
        admission.check()
        first.join()
        with pytest.raises(QueueFullError, match="1 requests are waiting; the limit is 1"):
            admission.check()
    admission.check()


def test_retry_after_is_bounded() -> None:
    clock = Clock()
    admission = Admission(queue_limit=10_000, queue_bytes=100, clock=clock)
    tickets = [admission.ticket() for _ in range(5000)]
    for ticket in tickets:
        ticket.join()
    for ticket in tickets[:2]:
        clock.now += 4
        ticket.leave()
    assert admission.retry_after_s() == 60
