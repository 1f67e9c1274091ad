from __future__ import annotations

from contextlib import ExitStack

import pytest

from camcal.service.engine.admission import Admission, BodyTooLargeError, QueueFullError, Ticket


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_ticket_releases_everything() -> None:
    admission = Admission(queue_limit=2, queue_bytes=100)
    with admission.ticket("one") as ticket:
        ticket.reserve(60)
        ticket.join()
        assert (admission.depth, admission.nbytes) == (1, 60)
        ticket.leave()
        ticket.leave()
        assert (admission.depth, admission.nbytes) == (0, 60)
    assert (admission.depth, admission.nbytes) == (0, 0)


def test_bytes_stay_reserved_while_kept() -> None:
    admission = Admission(queue_limit=2, queue_bytes=100)
    with admission.ticket("one") as ticket:
        ticket.reserve(60)
        ticket.join()
        ticket.keep()()
        drop = ticket.keep()
    assert (admission.depth, admission.nbytes) == (0, 60)
    drop()
    assert admission.nbytes == 0


def test_full_in_requests() -> None:
    admission = Admission(queue_limit=1, queue_bytes=100)
    with admission.ticket("one") as first:
        first.join()
        with admission.ticket("one") as second, pytest.raises(QueueFullError, match="CAMCAL_QUEUE_LIMIT") as caught:
            second.join()
        assert admission.depth == 1
    assert (caught.value.reason, caught.value.retry_after_s) == ("queue_full", 1)


def test_full_in_bytes() -> None:
    admission = Admission(queue_limit=9, queue_bytes=100)
    with admission.ticket("one") as first, admission.ticket("one") as second:
        first.reserve(60)
        with pytest.raises(QueueFullError, match="60 bytes of images are waiting; the limit is 100") as caught:
            second.reserve(50)
        second.reserve(40)
    assert caught.value.reason == "queue_bytes"
    assert admission.nbytes == 0


def test_wait_follows_the_rate_of_a_queue_that_is_not_empty() -> None:
    clock = Clock()
    admission = Admission(queue_limit=100, queue_bytes=100, clock=clock)
    for _ in range(2):  # far apart, with an empty queue between them: not a measurement
        with admission.ticket("one") as ticket:
            ticket.join()
            clock.now += 100
    waiting = [admission.ticket("one") for _ in range(60)]
    for ticket in waiting:
        ticket.join()
    assert (admission.wait_s(), admission.retry_after_s()) == (0, 1)
    for ticket in waiting[:20]:  # two per second
        clock.now += 0.5
        ticket.leave()
    assert admission.wait_s() == pytest.approx(40 / 2)
    assert admission.retry_after_s() == 20
    for ticket in waiting:
        ticket.leave()
    assert admission.wait_s() == 0


def test_batches_that_empty_the_queue_do_not_count() -> None:
    clock = Clock()
    admission = Admission(queue_limit=1000, queue_bytes=100, clock=clock)

    def batch(tickets: list[Ticket]) -> None:
        clock.now += 0.4
        for ticket in tickets:
            ticket.leave()
            clock.now += 0.00001

    def join(count: int) -> list[Ticket]:
        tickets = [admission.ticket("one") for _ in range(count)]
        for ticket in tickets:
            ticket.join()
        return tickets

    for _ in range(50):  # 8 clients that send their next request after each response
        batch(join(8))
    waiting = join(80)
    assert admission.wait_s() == 0
    batch(waiting[:8])
    assert admission.wait_s() == 0  # it is unknown how long the device was busy before
    batch(waiting[8:16])
    batch(waiting[16:24])
    assert admission.wait_s() == pytest.approx(56 / 8 * 0.4, rel=0.01)


def test_long_expected_wait_rejects_unless_few_requests_wait() -> None:
    clock = Clock()
    admission = Admission(queue_limit=9, queue_bytes=100, queue_s=2.5, patient=3, clock=clock)
    waiting = [admission.ticket("one") for _ in range(8)]
    for ticket in waiting:
        ticket.join()
    for ticket in waiting[:3]:  # one per second
        clock.now += 1
        ticket.leave()
    newcomer = admission.ticket("one")
    with pytest.raises(QueueFullError, match=r"5 requests .* expected wait of 5.0 s; the limit is 2.5 s ") as caught:
        admission.check("one")
    assert (caught.value.reason, caught.value.retry_after_s) == ("queue_full", 5)
    newcomer.join()  # a request is not rejected after its body was read
    for ticket in (newcomer, *waiting[3:5]):
        ticket.leave()
    admission.check("one")
    clock.now += 30
    waiting[5].leave()
    waiting[6].join()
    assert admission.depth == 3 and admission.wait_s() > 2.5
    with pytest.raises(QueueFullError):
        admission.check("one")
    waiting[6].leave()
    admission.check("one")  # fewer than `patient` wait


def test_full_queue_rejects() -> None:
    admission = Admission(queue_limit=1, queue_bytes=100)
    with admission.ticket("one") as first:
        admission.check("one")
        first.join()
        with pytest.raises(QueueFullError, match="1 requests are waiting; the limit is 1"):
            admission.check("one")
    admission.check("one")


def test_retry_after_is_bounded() -> None:
    clock = Clock()
    admission = Admission(queue_limit=10_000, queue_bytes=100, clock=clock)
    tickets = [admission.ticket("one") for _ in range(5000)]
    for ticket in tickets:
        ticket.join()
    for ticket in tickets[:2]:
        clock.now += 4
        ticket.leave()
    assert admission.retry_after_s() == 60


def test_single_client_is_limited_to_its_share() -> None:
    admission = Admission(queue_limit=8, queue_bytes=100, share=0.75)
    with ExitStack() as stack:
        tickets = [stack.enter_context(admission.ticket("one")) for _ in range(7)]
        for ticket in tickets[:6]:
            admission.check("one")
            ticket.join()
        for refuse in (tickets[6].join, lambda: admission.check("one")):
            with pytest.raises(QueueFullError, match=r"6 requests from one are .* 0.75 of 8 ") as caught:
                refuse()
            assert (caught.value.reason, caught.value.retry_after_s) == ("client_full", 1)
        tickets[0].reserve(50)
        tickets[1].reserve(25)
        with pytest.raises(QueueFullError, match=r"75 bytes of images from one .* 0.75 of 100 ") as caught:
            tickets[2].reserve(1)
        assert caught.value.reason == "client_bytes"
    assert (admission.depth, admission.nbytes, admission._clients) == (0, 0, {})


@pytest.mark.parametrize("greedy", [1, 2, 3])
def test_new_client_has_room_beside_greedy_clients(greedy: int) -> None:
    admission = Admission(queue_limit=9, queue_bytes=256 * 2**20, share=0.75)
    with ExitStack() as stack:
        for number in range(greedy):
            with pytest.raises(QueueFullError):
                for _ in range(10_000):
                    stack.enter_context(admission.ticket(str(number))).reserve(2**16)
        stack.enter_context(admission.ticket("newcomer")).reserve(500_000)
        with pytest.raises(QueueFullError, match="from 0 are waiting"):  # its share has shrunk
            stack.enter_context(admission.ticket("0")).reserve(1)


def test_body_larger_than_a_share_is_an_error() -> None:
    admission = Admission(queue_limit=9, queue_bytes=100, share=0.75)
    with admission.ticket("one") as ticket:
        ticket.check_length(75)
        with pytest.raises(BodyTooLargeError, match="the body exceeds 75 bytes"):
            ticket.check_length(76)
        ticket.reserve(50)
        with pytest.raises(BodyTooLargeError):
            ticket.reserve(26)


def test_client_that_fills_the_queue_is_rejected_first() -> None:
    clock = Clock()
    admission = Admission(queue_limit=90, queue_bytes=100, share=0.75, queue_s=2.0, clock=clock)
    waiting = [admission.ticket("greedy") for _ in range(8)]
    for ticket in waiting:
        ticket.join()
    for ticket in waiting[:4]:  # one per second
        clock.now += 1
        ticket.leave()
    assert admission.wait_s() == pytest.approx(4)
    with pytest.raises(QueueFullError, match="CAMCAL_QUEUE_S"):
        admission.check("greedy")
    admission.check("other")  # up to twice the wait
    other = [admission.ticket("other") for _ in range(2)]
    for ticket in other:
        ticket.join()
    with pytest.raises(QueueFullError, match="CAMCAL_QUEUE_S"):
        admission.check("third")
    for ticket in waiting[4:6]:
        ticket.leave()
    assert admission.wait_s() > 2
    for client in ("greedy", "other", "third"):  # no client exceeds its share, so all have the same limit
        with pytest.raises(QueueFullError, match="CAMCAL_QUEUE_S"):
            admission.check(client)
