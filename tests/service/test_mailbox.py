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


def test_nobody_connects_before_somebody_takes(mailbox: Mailbox) -> None:
    with pytest.raises(ConnectionRefusedError):
        mailbox.connect()
    with pytest.raises(BlockingIOError):
        mailbox.take()


def test_connections_of_several_are_told_apart(mailbox: Mailbox) -> None:
    mailbox.open()
    with ExitStack() as stack:
        clients = [stack.enter_context(mailbox.connect()) for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(b"%d" % number)
        for number, client in enumerate(clients):
            with mailbox.take() as connection:
                assert connection.recv(10) == b"%d" % number
                connection.send(b"answer %d" % number)
            assert client.recv(20) == b"answer %d" % number


def test_a_forked_process_connects(mailbox: Mailbox) -> None:
    mailbox.open()
    pid = os.fork()
    if pid == 0:
        with mailbox.connect() as connection:
            connection.send(b"child")
        os._exit(0)
    wait(mailbox)
    with mailbox.take() as connection:
        connection.setblocking(True)
        assert connection.recv(10) == b"child"
    os.waitpid(pid, 0)


def test_who_waits_when_the_other_ends_is_told(mailbox: Mailbox) -> None:
    mailbox.open()
    with mailbox.connect() as waiting:
        mailbox.clear()
        assert waiting.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        mailbox.connect()


def test_a_connection_has_no_name_by_which_others_could_reach_it(mailbox: Mailbox) -> None:
    mailbox.open()
    with mailbox.connect() as client, mailbox.take() as connection:
        assert [client.getsockname(), connection.getsockname()] == ["", ""]
        assert client.family == socket.AF_UNIX
