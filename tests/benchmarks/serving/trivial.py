"""A server that reads a request and answers at once: what the load generator can send at most is measured with it.

`python -m tests.benchmarks.serving.trivial PORT [MS]`: its status is 200, or what the query `?status=` asks for. With
MS it stands for a model that works on one request at a time, for so many milliseconds each.
"""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.parse
from typing import cast

import httptools
import uvloop

ANSWER = json.dumps({"predictions": [{"class_id": 0, "label": "nothing", "probability": 1.0}]}).encode()


class Trivial(asyncio.Protocol):
    """One connection."""

    busy_s = 0.0  # of each request
    free_at = 0.0  # when the last of all waiting requests will be done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class, which has no common base
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        """Called by the parser."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(url.decode()).query)
        self._status = query.get("status", ["200"])[0]

    def on_message_complete(self) -> None:
        """Called by the parser."""
        head = f"HTTP/1.1 {self._status} X\r\nContent-Length: {len(ANSWER)}\r\nContent-Type: application/json\r\n\r\n"
        if self.busy_s:
            loop = asyncio.get_running_loop()
            Trivial.free_at = max(Trivial.free_at, loop.time()) + self.busy_s
            loop.call_at(Trivial.free_at, self._transport.write, head.encode() + ANSWER)
        else:
            self._transport.write(head.encode() + ANSWER)
        self._parser = httptools.HttpRequestParser(self)


async def main(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(Trivial, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    Trivial.busy_s = float(sys.argv[2]) / 1000 if len(sys.argv) > 2 else 0.0
    uvloop.run(main(int(sys.argv[1])))
