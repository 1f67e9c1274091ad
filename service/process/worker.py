"""A worker process: gets its connections and commands from the supervisor."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from camcal.cpus import pin_to_share
from camcal.service import logs
from camcal.service.engine.model import load_proven
from camcal.service.http.app import keyring
from camcal.service.http.dependencies import running
from camcal.service.http.siblings import Siblings
from camcal.service.mailbox import Mailbox
from camcal.service.process import channel as channel_module
from camcal.service.process.channel import CONNECTION, DRAIN, FAILED, RELOAD, SERVING, SPREAD
from camcal.service.process.listening import FULL_S
from camcal.service.process.server import Server, prepare
from camcal.service.settings import Settings

log = logging.getLogger("camcal")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # handled by the supervisor


class Worker(Server):
    """Serves the connections and executes the commands that the supervisor sends through `channel`.

    Only the supervisor handles signals. If the supervisor dies, the worker finishes its requests and exits.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, channel: socket.socket):
        super().__init__(config, app)
        self._channel = channel

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel, self._receive)
        self._beat()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        pass

    def _beat(self) -> None:
        if runtime := running(self._app):
            # If the model is broken, a new process may work; the supervisor then sends STOP.
            broken = runtime.broken
            line = FAILED + broken.encode() if broken else SERVING + runtime.manifest.version.encode()
            with contextlib.suppress(OSError):  # the supervisor has ended
                self._channel.send(line + b"\n")
            if not broken:
                self._loop.call_later(channel_module.BEAT_S, self._beat)

    def _receive(self) -> None:
        if self.full() and self._next_command() == CONNECTION:
            self._loop.remove_reader(self._channel)
            self._loop.call_later(FULL_S, self._loop.add_reader, self._channel, self._receive)
            return
        try:
            command, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1)
        except BlockingIOError:
            return
        except OSError:
            command, descriptors = b"", []
        if command == CONNECTION:
            if descriptors:
                self.take(socket.socket(fileno=descriptors[0]))
            else:
                self._exhausted("cannot take a connection: too many open files")
        elif command == RELOAD:
            self.reload()
        elif command == SPREAD:
            for open_connection in self.server_state.connections:
                open_connection.leave()  # type: ignore[union-attr]  # of camcal.service.http.protocol
        elif command == DRAIN:
            self.drain()
        else:
            self._loop.remove_reader(self._channel)
            self.drain()
            self.stop()

    def _next_command(self) -> bytes:
        try:
            return self._channel.recv(1, socket.MSG_PEEK)
        except OSError:
            return b""


def run_worker(
    settings: Settings,
    siblings: Siblings,
    channel: socket.socket,
    decoder: Mailbox,
    metrics: list[socket.socket],
    inherited: list[socket.socket],
) -> None:
    """Run a worker in its forked process, until it exits.

    Args:
        settings: the settings of the whole service.
        siblings: all workers.
        channel: the channel to the supervisor.
        decoder: the mailbox of the decoder process for large images.
        metrics: the sockets for /metrics.
        inherited: sockets of the supervisor, which the worker closes, so that only the supervisor keeps them open.
    """
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for inherited_socket in inherited:
        inherited_socket.close()
    logs.configure(settings.log_format)
    cpus = pin_to_share(siblings.index, siblings.count)
    share = settings.model_copy(
        update={
            "intra_threads": settings.intra_threads or max(1, cpus // settings.sessions),
            "decode_threads": settings.decode_threads or cpus,
            "queue_bytes": settings.queue_bytes_of(siblings.count),
            "decode_bytes": max(1, settings.decode_bytes // siblings.count),
            "cam_max_bytes": max(1, settings.cam_max_bytes // siblings.count),
        }
    )
    try:
        keyring(share)  # the keys file may have changed since the supervisor started
        sessions = load_proven(share, siblings.proofs)
    except (ValueError, OSError) as error:
        channel.sendall(FAILED + " ".join(str(error).split()).encode() + b"\n")
        sys.exit(2)
    try:
        own_metrics = metrics if siblings.index == 0 else []  # the first worker serves CAMCAL_METRICS_PORT
        config, app = prepare(share, sessions, own_metrics, siblings, decoder)
        Worker(config, app, channel).run()
    except Exception:
        log.exception("worker %d crashed", siblings.index)
        sys.exit(1)
