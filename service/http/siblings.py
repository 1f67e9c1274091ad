"""Requests between the workers of one service: for heatmaps that another worker stores, and for metrics."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from camcal.service.engine.proofs import Proofs
from camcal.service.heatmaps.stores import MapStore, owner
from camcal.service.mailbox import Mailbox

Answer = Callable[[str], Awaitable[bytes]]

ANSWER_S = 2.0  # timeout, so that a hanging worker does not block the others
_LENGTH = 8  # bytes
DELETE = "delete "  # followed by an id


@dataclass(frozen=True, kw_only=True)
class Siblings:
    """One worker and its siblings. Worker i answers the requests to `mailboxes[i]`.

    A request is one line. A response is its length and as many bytes; no bytes if there is no such heatmap. All workers
    share `proofs`.
    """

    mailboxes: tuple[Mailbox, ...]
    index: int
    proofs: Proofs = field(default_factory=Proofs)

    @property
    def count(self) -> int:
        return len(self.mailboxes)

    def serve(self, answer: Answer) -> Callable[[], None]:
        """Answer requests of the other workers until the returned function is called."""
        replies = set[asyncio.Task[None]]()

        async def reply(connection: socket.socket) -> None:
            reader, writer = await asyncio.open_unix_connection(sock=connection)
            try:
                question = await reader.readline()
                answered = await answer(question.decode().rstrip("\n"))
                writer.write(len(answered).to_bytes(_LENGTH) + answered)
                await writer.drain()
            except OSError:
                pass  # the other worker has disconnected
            finally:
                writer.close()

        def begin(connection: socket.socket) -> None:
            task = asyncio.ensure_future(reply(connection))
            replies.add(task)  # a reference, or it could be garbage-collected
            task.add_done_callback(replies.discard)

        return self.mailboxes[self.index].serve(begin)

    async def ask(self, index: int, question: str) -> bytes:
        """The response of worker `index`. Raises OSError if it cannot be reached or does not respond in time."""
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(sock=self.mailboxes[index].connect())
            try:
                writer.write(f"{question}\n".encode())
                return await reader.readexactly(int.from_bytes(await reader.readexactly(_LENGTH)))
            except EOFError:
                raise ConnectionError(f"worker {index} stopped before it responded") from None
            finally:
                writer.close()

    async def ask_others(self, question: str) -> dict[int, bytes]:
        """The responses of the other workers by index, without those that cannot be reached."""

        async def reached(index: int) -> tuple[int, bytes] | None:
            with contextlib.suppress(OSError):
                return index, await self.ask(index, question)
            return None

        others = (reached(index) for index in range(self.count) if index != self.index)
        return dict(filter(None, await asyncio.gather(*others)))


class SharedStore:
    """A `MapStore` across all workers: each stores its own maps, and asks the worker in the id for others."""

    def __init__(self, own: MapStore, siblings: Siblings):
        self._own = own
        self._siblings = siblings

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Store `value` in this worker."""
        await self._own.put(key, value, ttl_s)

    async def get(self, key: str) -> bytes | None:
        """The value, from the worker that stores it."""
        index = owner(key)
        if index == self._siblings.index:
            return await self._own.get(key)
        return await self._siblings.ask(index, key) or None if index < self._siblings.count else None

    async def delete(self, key: str) -> bool:
        """Delete the value in the worker that stores it."""
        index = owner(key)
        if index == self._siblings.index:
            return await self._own.delete(key)
        return index < self._siblings.count and bool(await self._siblings.ask(index, DELETE + key))

    async def close(self) -> None:
        """Delete the values of this worker."""
        await self._own.close()
