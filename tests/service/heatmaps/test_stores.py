from __future__ import annotations

import asyncio

import pytest

from camcal.service.heatmaps.stores import is_id, new_id, owner
from camcal.service.heatmaps.stores.memory import OVERHEAD_BYTES, MemoryStore
from camcal.service.settings import MAX_WORKERS


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_ids() -> None:
    assert is_id(new_id())
    assert new_id() != new_id()
    assert [owner(new_id(worker)) for worker in range(MAX_WORKERS)] == list(range(MAX_WORKERS))
    assert all(is_id(new_id(worker)) for worker in range(MAX_WORKERS))
    for bad in ("", "abc", "../../../../etc/passwd", "a" * 23, "a" * 21 + "/", "a" * 22 + "\n"):
        assert not is_id(bad)


def test_put_and_get() -> None:
    async def main() -> None:
        store = MemoryStore(10_000)
        await store.put("a", b"1", 60)
        assert await store.get("a") == b"1"
        assert await store.get("b") is None
        assert (len(store), store.nbytes) == (1, 1 + OVERHEAD_BYTES)
        await store.close()
        assert (len(store), store.nbytes) == (0, 0)

    asyncio.run(main())


def test_entries_expire() -> None:
    async def main() -> None:
        clock, reasons = Clock(), list[str]()
        store = MemoryStore(10_000, reasons.append, clock)
        await store.put("a", b"1", 60)
        clock.now = 30
        await store.put("b", b"2", 60)
        clock.now = 60
        assert await store.get("a") is None
        assert await store.get("b") == b"2"
        assert reasons == ["expired"]
        clock.now = 90
        await store.put("c", b"3", 60)
        assert (len(store), reasons) == (1, ["expired"] * 2)

    asyncio.run(main())


def test_delete() -> None:
    async def main() -> None:
        clock, reasons = Clock(), list[str]()
        store = MemoryStore(10_000, reasons.append, clock)
        await store.put("a", b"1", 60)
        await store.put("b", b"2", 60)
        assert await store.delete("a") is True
        assert await store.delete("a") is False
        assert (await store.get("a"), await store.get("b")) == (None, b"2")
        assert store.nbytes == 1 + OVERHEAD_BYTES
        clock.now = 60
        assert await store.delete("b") is False
        assert reasons == ["deleted", "expired"]

    asyncio.run(main())


def test_shorter_lifetime_after_a_longer_one() -> None:
    async def main() -> None:
        clock = Clock()
        store = MemoryStore(10_000, clock=clock)
        await store.put("long", b"1", 60)
        await store.put("short", b"2", 10)
        clock.now = 20
        assert await store.get("short") is None
        assert await store.get("long") == b"1"

    asyncio.run(main())


def test_oldest_entries_are_evicted_when_full() -> None:
    async def main() -> None:
        reasons: list[str] = []
        store = MemoryStore(3 * (10 + OVERHEAD_BYTES), reasons.append)
        for key in "abcd":
            await store.put(key, bytes(10), 60)
        assert [await store.get(key) is not None for key in "abcd"] == [False, True, True, True]
        assert reasons == ["full"]
        assert store.nbytes <= store.max_bytes

    asyncio.run(main())


def test_entry_larger_than_the_store() -> None:
    async def main() -> None:
        store = MemoryStore(1000)
        await store.put("a", b"1", 60)
        with pytest.raises(ValueError, match=r"; the limit is 1000 \(CAMCAL_CAM_MAX_BYTES\)"):
            await store.put("b", bytes(1000), 60)
        assert await store.get("a") == b"1"

    asyncio.run(main())
