"""uvicorn's HTTP protocol, for clients that are slow, endless, or offer another protocol."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 1024

# What a client may still send after an answer that closes the connection.
LINGER_S, LINGER_BYTES = 5.0, 64 * 2**20

STALL_S = 30.0  # without a byte of its answer being taken, after which a client counts as gone


class _Parser(httptools.HttpRequestParser):
    """Tells its protocol of what follows the offer of another protocol."""

    def __init__(self, protocol: Any):
        super().__init__(protocol)
        self._protocol = protocol
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # uvicorn has no others
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._protocol.overlook(data[offer.args[0] :])


class _Lingering:
    """A transport that closes once the client has sent what it was about to send, or after a while.

    Closing it at once would reset the connection, and the client might never read its answer (RFC 9112, section 9.6).
    """

    def __init__(self, transport: asyncio.Transport, protocol: Any):
        self._transport = transport
        self._protocol = protocol
        self.closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():  # asyncio's own transport drops what is written after its end; uvloop's raises
            self._transport.write(data)

    def close(self) -> None:
        if self._protocol.in_body and not self.is_closing():
            self.closing = True
            self._transport.write_eof()
            self._transport.resume_reading()
            self._protocol.loop.call_later(LINGER_S, self._end)
        else:
            self._end()

    def _end(self) -> None:
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._protocol.await_reader()


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits. It overrides private methods of uvicorn: pyproject.toml caps its version.

    uvicorn waits forever for a request's head, and accepts one of any size: here it must be complete after
    `head_timeout_s`. Offers of another protocol are ignored (RFC 9110, section 7.8), where uvicorn would lose the body
    that follows. A response that comes before the end of the request's body reaches its client. A client that does not
    read its response loses the connection, where uvicorn would keep both. What is not HTTP ends the connection after
    the responses to the requests before it, where uvicorn would write its 400 among them.
    """

    head_timeout_s = 10.0
    head_bytes = 0
    left_over = 0
    in_body = False
    furthered = False
    broken = False
    running: RequestResponseCycle | None = None
    leaving = False
    head_timer: asyncio.TimerHandle | None = None
    write_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]  # has all of its methods
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)
        self._drained()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.await_reader()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._drained()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.broken or self.transport.is_closing():
            self.left_over += len(data)
            if self.left_over > LINGER_BYTES:
                self.transport.abort()
            return
        if self.head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        self.furthered = False
        super().data_received(data)
        # Bytes of a head, of trailers, or of what belongs to a chunk beside its body.
        if not self.furthered and not self.broken:
            self.head_bytes += len(data)
            if self.head_bytes > MAX_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_headers_complete(self) -> None:
        if self._is_offer():
            return
        self._have_head()
        self._further()
        self.in_body = True
        super().on_headers_complete()
        if self.leaving:
            self.cycle.keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_body:  # a trailer is of no use here, and uvicorn would keep them all
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._further()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_offer():
            return
        self._have_head()  # what came after an early answer was the rest of a body
        self.in_body = False
        self._further()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called when what came is not HTTP: the rest of the connection cannot be told apart."""
        self._have_head()
        self.broken = True
        partial = self.cycle if self.in_body else None  # the request that is broken, if its head was sound
        if self.pipeline and self.pipeline[0][0] is partial:
            self.pipeline.popleft()
        elif self.running is not None and self.running is partial:
            partial.disconnected = True
            partial.message_event.set()
            if partial.response_started and not partial.response_complete:
                self.transport.close()
        self._answer_last()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._answer_last()

    def _answer_last(self) -> None:
        """The 400 of what was not HTTP, once all requests before it are answered."""
        done = self.running is None or self.running.response_complete or self.running.disconnected
        if self.broken and done and not self.pipeline and not self.transport.is_closing():
            super().send_400_response("Invalid HTTP request received.")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def idle(self) -> bool:
        """Whether it has answered all, and no next request has begun."""
        return not (self.in_body or self.head_timer or self.cycle is None) and self.cycle.response_complete

    def leave(self) -> None:
        """Close the connection after the next answer, which says so: its client then makes another."""
        self.leaving = True
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def overlook(self, rest: bytes) -> None:
        """Read the request that has just come once more, without its offer of another protocol."""
        if not self._is_offer():
            return
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = _Parser(self)
        self.parser.feed_data(b"\r\n".join([*lines, b"", rest]))

    def _is_offer(self) -> bool:
        # CONNECT counts as an upgrade too. It has no other meaning: the app refuses it.
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _await_head(self) -> None:
        self.head_bytes = 0
        self.head_timer = self.loop.call_later(self.head_timeout_s, self._refuse, b"408 Request Timeout")

    def _have_head(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _further(self) -> None:
        self.furthered, self.head_bytes = True, 0

    def await_reader(self) -> None:
        """Give the connection up when what is not sent yet has stayed as much for a while."""
        if self.write_timer is None:
            size = self.transport.get_write_buffer_size()
            self.write_timer = self.loop.call_later(STALL_S, self._look_again, size)

    def _look_again(self, before: int) -> None:
        self.write_timer = None
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self.await_reader()

    def _drained(self) -> None:
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None

    def _refuse(self, status: bytes) -> None:
        self._have_head()
        if self.cycle is not None and not self.cycle.response_complete:  # of the request before
            self.transport.abort()
        elif not self.transport.is_closing():
            if self.head_bytes:
                self.transport.write(b"HTTP/1.1 %b\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % status)
            self.transport.close()


def guarded(head_timeout_s: float) -> type[GuardedProtocol]:
    """The protocol class for `uvicorn.Config(http=…)`."""
    return type("GuardedProtocol", (GuardedProtocol,), {"head_timeout_s": head_timeout_s})
