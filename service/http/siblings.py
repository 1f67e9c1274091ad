"""What the workers of one service ask each other: the heatmaps that another one made, and everyone's metrics."""

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

ANSWER_S = 2.0  # for an answer: a worker that hangs must not make the others hang
_LENGTH = 8  # bytes
DELETE = "delete "  # and an id: the question that is a request


@dataclass(frozen=True, kw_only=True)
class Siblings:
    """The place of one worker among all. Worker i answers what comes to `mailboxes[i]`.

    A question is a line; the answer is its length and as many bytes, none for what is not known. `proofs` are common
    to all.
    """

    mailboxes: tuple[Mailbox, ...]
    index: int
    proofs: Proofs = field(default_factory=Proofs)

    @property
    def count(self) -> int:
        return len(self.mailboxes)

    def serve(self, answer: Answer) -> Callable[[], None]:
        """Answer the others' questions until the function that is returned is called."""
        replies = set[asyncio.Task[None]]()

        async def reply(connection: socket.socket) -> None:
            reader, writer = await asyncio.open_unix_connection(sock=connection)
            try:
                question = await reader.readline()
                answered = await answer(question.decode().rstrip("\n"))
                writer.write(len(answered).to_bytes(_LENGTH) + answered)
                await writer.drain()
            except OSError:
                pass  # whoever asked is gone
            finally:
                writer.close()

        def begin(connection: socket.socket) -> None:
            replies.add(task := asyncio.ensure_future(reply(connection)))  # kept, or it might vanish before its end
            task.add_done_callback(replies.discard)

        return self.mailboxes[self.index].serve(begin)

    async def ask(self, index: int, question: str) -> bytes:
        """What worker `index` answers. Raises OSError if it cannot be reached, or not in time."""
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(sock=self.mailboxes[index].connect())
            try:
                writer.write(f"{question}\n".encode())
                return await reader.readexactly(int.from_bytes(await reader.readexactly(_LENGTH)))
            except EOFError:
                raise ConnectionError(f"worker {index} ended before its answer") from None
            finally:
                writer.close()

    async def ask_others(self, question: str) -> dict[int, bytes]:
        """What the others answer, by their indices, without those that cannot be reached."""

        async def reached(index: int) -> tuple[int, bytes] | None:
            with contextlib.suppress(OSError):
                return index, await self.ask(index, question)
            return None

        others = (reached(index) for index in range(self.count) if index != self.index)
        return dict(filter(None, await asyncio.gather(*others)))


class SharedStore:
    """A `MapStore` over all workers: each keeps what it made, and asks the one that an id names for the rest."""

    def __init__(self, own: MapStore, siblings: Siblings):
        self._own = own
        self._siblings = siblings

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keep `value` in this worker."""
        await self._own.put(key, value, ttl_s)

    async def get(self, key: str) -> bytes | None:
        """The value, from whichever worker has it."""
        index = owner(key)
        if index == self._siblings.index:
            return await self._own.get(key)
        return await self._siblings.ask(index, key) or None if index < self._siblings.count else None

    async def delete(self, key: str) -> bool:
        """Forget the value, in whichever worker has it."""
        index = owner(key)
        if index == self._siblings.index:
            return await self._own.delete(key)
        return index < self._siblings.count and bool(await self._siblings.ask(index, DELETE + key))

    async def close(self) -> None:
        """Forget what this worker keeps."""
        await self._own.close()
