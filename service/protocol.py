"""uvicorn's HTTP protocol with limits on a request's head: uvicorn waits for one forever, and of any size."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024


def guarded(head_timeout_s: float) -> type[asyncio.Protocol]:
    """The protocol class for `uvicorn.Config(http=…)`: a head must be complete after `head_timeout_s`."""

    class GuardedProtocol(HttpToolsProtocol):
        head_bytes = 0
        in_body = False
        head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._have_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.head_timer is None and (self.cycle is None or self.cycle.response_complete):
                self._await_head()
            super().data_received(data)
            if self.head_timer is not None and not self.in_body:
                self.head_bytes += len(data)
                if self.head_bytes > MAX_HEAD_BYTES:
                    self._refuse(b"431 Request Header Fields Too Large")

        def on_headers_complete(self) -> None:
            self._have_head()
            self.in_body = True
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._have_head()  # what came after an early answer was the rest of a body
            self.in_body = False
            super().on_message_complete()

        def _await_head(self) -> None:
            self.head_bytes = 0
            self.head_timer = self.loop.call_later(head_timeout_s, self._refuse, b"408 Request Timeout")

        def _have_head(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def _refuse(self, status: bytes) -> None:
            self._have_head()
            if not self.transport.is_closing():
                if self.head_bytes:
                    self.transport.write(b"HTTP/1.1 %b\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % status)
                self.transport.close()

    return GuardedProtocol
