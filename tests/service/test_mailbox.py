from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from camcal.service.mailbox import Mailbox


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    with closing(Mailbox()) as mailbox:
        yield mailbox


def wait(mailbox: Mailbox) -> None:
    assert select.select([mailbox], [], [], 10)[0]


def test_connections_are_refused_until_a_process_accepts(mailbox: Mailbox) -> None:
    with pytest.raises(ConnectionRefusedError):
        mailbox.connect()
    with pytest.raises(BlockingIOError):
        mailbox.accept()


def test_concurrent_connections(mailbox: Mailbox) -> None:
    mailbox.open()
    with ExitStack() as stack:
        clients = [stack.enter_context(mailbox.connect()) for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(b"%d" % number)
        for number, client in enumerate(clients):
            with mailbox.accept() as connection:
                assert connection.recv(10) == b"%d" % number
                connection.send(b"answer %d" % number)
            assert client.recv(20) == b"answer %d" % number


def test_forked_process_connects(mailbox: Mailbox) -> None:
    mailbox.open()
    pid = os.fork()
    if pid == 0:
        with mailbox.connect() as connection:
            connection.send(b"child")
        os._exit(0)
    wait(mailbox)
    with mailbox.accept() as connection:
        connection.setblocking(True)
        assert connection.recv(10) == b"child"
    os.waitpid(pid, 0)


def test_pending_connections_end_with_the_accepting_process(mailbox: Mailbox) -> None:
    mailbox.open()
    with mailbox.connect() as waiting:
        mailbox.clear()
        assert waiting.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        mailbox.connect()


def test_connections_have_no_address(mailbox: Mailbox) -> None:
    mailbox.open()
    with mailbox.connect() as client, mailbox.accept() as connection:
        assert [client.getsockname(), connection.getsockname()] == ["", ""]
        assert client.family == socket.AF_UNIX
