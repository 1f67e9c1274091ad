from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from camcal.service.heatmaps.stores import new_id
from camcal.service.heatmaps.stores.memory import MemoryStore
from camcal.service.http.siblings import SharedStore, Siblings
from camcal.service.mailbox import Mailbox


@contextlib.contextmanager
def places(count: int) -> Iterator[list[Siblings]]:
    with contextlib.ExitStack() as stack:
        mailboxes = tuple(stack.enter_context(contextlib.closing(Mailbox())) for _ in range(count))
        yield [Siblings(mailboxes=mailboxes, index=index) for index in range(count)]


def test_each_worker_finds_what_the_others_keep() -> None:
    async def main(siblings: list[Siblings]) -> None:
        own = [MemoryStore(10_000_000) for _ in siblings]
        asked: list[int] = []

        def answer_of(index: int) -> object:
            async def answer(question: str) -> bytes:
                asked.append(index)
                return await own[index].get(question) or b""

            return answer

        stops = [place.serve(answer_of(place.index)) for place in siblings]  # type: ignore[arg-type]
        stores = [SharedStore(kept, place) for kept, place in zip(own, siblings, strict=True)]
        value = bytes(range(256)) * 4000  # a megabyte
        keys = [new_id(index) for index in range(3)]
        for store, key in zip(stores, keys, strict=True):
            await store.put(key, value, 60)
        for index, store in enumerate(stores):
            asked.clear()
            assert [await store.get(key) == value for key in keys] == [True] * 3
            assert asked == [other for other in range(3) if other != index]
            assert await store.get(new_id(1)) is None
            assert await store.get(new_id(3)) is None  # of nobody
        stops[1]()
        with pytest.raises(OSError):
            await stores[0].get(keys[1])
        await stores[1].close()
        assert len(own[1]) == 0
        for stop in stops:
            stop()

    with places(3) as siblings:
        asyncio.run(main(siblings))


def test_others_that_are_away_are_left_out() -> None:
    async def main(siblings: list[Siblings]) -> None:
        async def answer(question: str) -> bytes:
            return question.upper().encode()

        stops = [siblings[index].serve(answer) for index in (1, 3)]
        assert await siblings[0].ask_others("metrics") == {1: b"METRICS", 3: b"METRICS"}
        stops[0]()
        with pytest.raises(ConnectionRefusedError):
            await siblings[0].ask(1, "x")
        siblings[1].serve(answer)  # another takes its place
        assert await siblings[0].ask(1, "x") == b"X"

    with places(4) as siblings:
        asyncio.run(main(siblings))


def test_a_worker_that_hangs_or_ends_half_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camcal.service.http.siblings.ANSWER_S", 0.1)

    async def main(asking: Siblings, hangs: Siblings, ends: Siblings) -> None:
        held: list[socket.socket] = []

        async def end(connection: socket.socket) -> None:
            reader, writer = await asyncio.open_unix_connection(sock=connection)
            await reader.readline()
            writer.write((100).to_bytes(8) + b"the first of them")
            writer.close()

        ending: list[asyncio.Task[None]] = []
        hangs.mailboxes[1].serve(held.append)
        ends.mailboxes[2].serve(lambda connection: ending.append(asyncio.ensure_future(end(connection))))
        with pytest.raises(TimeoutError):
            await asking.ask(1, "metrics")
        with pytest.raises(ConnectionError, match="worker 2 stopped before it responded"):
            await asking.ask(2, "metrics")
        assert await asking.ask_others("metrics") == {}
        for connection in held:
            connection.close()

    with places(3) as (asking, hangs, ends):
        asyncio.run(main(asking, hangs, ends))
