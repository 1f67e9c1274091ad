from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.siblings import SharedStore, Siblings
from service.stores import new_id
from service.stores.memory import MemoryStore


def test_each_worker_finds_what_the_others_keep(tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "siblings"
        folder.mkdir()
        places = [Siblings(folder=folder, index=index, count=3) for index in range(3)]
        own = [MemoryStore(10_000_000) for _ in places]
        asked: list[int] = []

        def answer_of(index: int) -> object:
            async def answer(question: str) -> bytes:
                asked.append(index)
                return await own[index].get(question) or b""

            return answer

        servers = [await place.serve(answer_of(place.index)) for place in places]  # type: ignore[arg-type]
        stores = [SharedStore(kept, place) for kept, place in zip(own, places, strict=True)]
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
        servers[1].close()
        places[1].leave()
        with pytest.raises(OSError):
            await stores[0].get(keys[1])
        await stores[1].close()
        assert len(own[1]) == 0
        for server, place in zip(servers, places, strict=True):
            server.close()
            place.leave()
        assert not folder.exists()

    asyncio.run(main())


def test_others_that_are_away_are_left_out(tmp_path: Path) -> None:
    async def main() -> None:
        async def answer(question: str) -> bytes:
            return question.upper().encode()

        servers = [await Siblings(folder=tmp_path, index=index, count=4).serve(answer) for index in (1, 3)]
        assert await Siblings(folder=tmp_path, index=0, count=4).ask_others("metrics") == {1: b"METRICS", 3: b"METRICS"}
        again = await Siblings(folder=tmp_path, index=1, count=4).serve(answer)  # as after a crash
        assert await Siblings(folder=tmp_path, index=0, count=4).ask(1, "x") == b"X"
        for server in (*servers, again):
            server.close()

    asyncio.run(main())


def test_a_worker_that_hangs_or_ends_half_way_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.siblings.ANSWER_S", 0.1)

    async def main() -> None:
        async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()  # until whoever asks gives up
            writer.close()

        async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write((100).to_bytes(8) + b"the first of them")
            writer.close()

        place = Siblings(folder=tmp_path, index=0, count=3)
        async with await asyncio.start_unix_server(hang, tmp_path / "1"):
            async with await asyncio.start_unix_server(end, tmp_path / "2"):
                with pytest.raises(TimeoutError):
                    await place.ask(1, "metrics")
                with pytest.raises(ConnectionError, match="worker 2 ended before its answer"):
                    await place.ask(2, "metrics")
                assert await place.ask_others("metrics") == {}

    asyncio.run(main())
