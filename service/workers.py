"""Several processes behind one port: a supervisor accepts the connections and deals them out to its workers in turn.

One Python process runs its interpreter on one CPU at a time, however many threads it has: where a small model answers
in milliseconds, reading requests and writing answers is what a second CPU cannot help with. A worker is the whole
service over again, with its own share of the CPUs; what it inherits from the supervisor is in memory once.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import logging
import multiprocessing
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from service import logs
from service.cpus import take_share
from service.server import CONNECTION, DRAIN, RELOAD, STOP, work
from service.session import load_sessions
from service.settings import Settings
from service.siblings import Siblings

log = logging.getLogger("camcal")

BACKLOG = 2048  # connections that wait to be accepted; the kernel has a limit of its own
RESTART_S = 1.0  # before a worker that ended is replaced


class WorkerError(ValueError):
    """A worker could not start; the message is its own."""


@dataclass(eq=False, kw_only=True)
class _Worker:
    index: int
    process: BaseProcess
    channel: socket.socket
    open: bool = True  # the channel
    ready: bool = False
    said: bytes = b""  # before it was ready: why it will not be


class Supervisor:
    """Runs `settings.workers` workers until a signal comes; one that ends before is replaced.

    Signals mean what they mean to a single process: SIGTERM drains, SIGINT ends when all is answered, a second one at
    once, SIGHUP loads the bundle again in every worker.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._fork = multiprocessing.get_context("fork")
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}
        self._listeners: list[socket.socket] = []
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._turns = itertools.count()
        self._accepting = self._opened = self._stopping = False
        self._signals = 0
        self._failure: str | None = None

    def run(self) -> None:
        """Serve until a signal comes and everything is answered.

        Raises:
            OSError: if the address cannot be listened on.
            WorkerError: if the first workers cannot start.
        """
        logs.configure(self._settings.log_format)
        with contextlib.ExitStack() as stack:
            self._folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="camcal-", ignore_cleanup_errors=True))
            )
            stack.enter_context(self._selector)
            stack.callback(self._kill)
            self._listeners = _bind(self._settings.host, self._settings.port)
            stack.enter_context(self._signals_heard())
            # What is loaded now is shared by all: collections must not write to it.
            gc.collect()
            gc.freeze()
            for index in range(self._settings.workers):
                self._start(index)
            while self._workers or not self._stopping:
                self._turn()
        if self._failure is not None:
            raise WorkerError(self._failure)

    def _turn(self) -> None:
        """Wait for the next thing to happen, and see to it."""
        due = min((at for at, _ in self._timers), default=None)
        for key, _ in self._selector.select(None if due is None else max(0.0, due - time.monotonic())):
            key.data()
        now = time.monotonic()
        late = [timer for timer in self._timers if timer[0] <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for _, act in late:
            act()

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self._timers.append((time.monotonic() + seconds, act))

    # Workers.

    def _start(self, index: int) -> None:
        if self._signals or self._stopping:
            return
        ours, theirs = socket.socketpair()
        siblings = Siblings(folder=self._folder, index=index, count=self._settings.workers)
        held = [ours, *self._listeners, *(worker.channel for worker in self._workers.values())]
        process = self._fork.Process(target=_work, args=(self._settings, siblings, theirs, held))
        process.start()
        theirs.close()
        ours.setblocking(False)
        worker = self._workers[index] = _Worker(index=index, process=process, channel=ours)
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(worker))
        self._selector.register(process.sentinel, selectors.EVENT_READ, lambda: self._ended(worker))

    def _hear(self, worker: _Worker) -> None:
        if not worker.open:  # what follows its last words in the same turn
            return
        try:
            said = worker.channel.recv(4096)
        except OSError:
            said = b""
        if said == b"+":
            worker.ready = True
            # At first all, so that the earliest clients do not all end up with one; later any is better than none.
            if self._opened or all(worker.ready for worker in self._workers.values()):
                self._accept_from_now()
        elif said:
            worker.said += said
        else:
            worker.open = False
            self._selector.unregister(worker.channel)

    def _ended(self, worker: _Worker) -> None:
        self._selector.unregister(worker.process.sentinel)
        while worker.open:  # its last words
            self._hear(worker)
        worker.channel.close()
        worker.process.join()
        del self._workers[worker.index]
        if self._stopping:
            return
        reason = worker.said.decode() or f"worker {worker.index} ended with code {worker.process.exitcode}"
        if not self._opened:
            self._failure = self._failure or reason
            self._stop()
            return
        log.error("%s; another takes its place", reason)
        if not any(worker.ready for worker in self._workers.values()):
            self._accept(False)
        self._later(RESTART_S, lambda: self._start(worker.index))

    def _tell(self, word: bytes) -> None:
        for worker in self._workers.values():
            with contextlib.suppress(OSError):  # it is ending
                worker.channel.send(word)

    def _kill(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()
            worker.process.join()

    # Connections.

    def _accept_from_now(self) -> None:
        if self._stopping:
            return
        if not self._opened:
            self._opened = True
            for listener in self._listeners:
                listener.listen(BACKLOG)
            host, port = self._listeners[0].getsockname()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            log.info("%d workers on http://%s (Press CTRL+C to quit)", len(self._workers), address)
        self._accept(True)

    def _accept(self, wanted: bool) -> None:
        if wanted != self._accepting:
            self._accepting = wanted
            for listener in self._listeners:
                if wanted:
                    self._selector.register(
                        listener, selectors.EVENT_READ, lambda listener=listener: self._deal(listener)
                    )
                else:
                    self._selector.unregister(listener)

    def _deal(self, listener: socket.socket) -> bool:
        """Give the next connection to the next worker; False if there was none, or nobody to take it."""
        ready = [worker for worker in self._workers.values() if worker.ready]
        if not ready:
            return False
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:  # the client is gone, or no file descriptor is left
            log.warning("a connection could not be accepted: %s", error)
            time.sleep(0.01)
            return True
        with connection:
            first = next(self._turns)
            for place in range(len(ready)):
                with contextlib.suppress(OSError):  # it is ending, or so far behind that the channel is full
                    socket.send_fds(ready[(first + place) % len(ready)].channel, [CONNECTION], [connection.fileno()])
                    return True
        return True

    # Signals.

    @contextlib.contextmanager
    def _signals_heard(self) -> Iterator[None]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._signalled(ours.recv(64)))
        wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = [signal.signal(number, lambda number, frame: None) for number in wanted]
        fd = signal.set_wakeup_fd(theirs.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in zip(wanted, before, strict=True):
                signal.signal(number, handler)
            ours.close()
            theirs.close()

    def _signalled(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGHUP:
                self._tell(RELOAD)
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._signals += 1
                if self._signals > 1:
                    self._stop()
                    self._kill()
                else:
                    drain_s = self._settings.drain_s if number == signal.SIGTERM and self._opened else 0.0
                    log.info("draining: not ready, serving for %g s more", drain_s)
                    self._tell(DRAIN)
                    self._later(drain_s, self._stop)

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        if self._accepting:
            self._accept(False)
            for listener in self._listeners:
                while self._deal(listener):  # what has come before
                    pass
        for listener in self._listeners:
            listener.close()
        self._tell(STOP)


def _bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host` that this machine has, not yet listening."""
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for number, (family, kind, _, _, address) in enumerate(found, 1):
            listener = socket.socket(family, kind)
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                listener.bind(address)
            except OSError as error:
                listener.close()
                # Such as ::1, which `localhost` may also mean where there is no IPv6.
                if error.errno != errno.EADDRNOTAVAIL or not (listeners or number < len(found)):
                    raise
            else:
                listeners.append(listener)
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return listeners


def _work(settings: Settings, siblings: Siblings, channel: socket.socket, held: list[socket.socket]) -> None:
    """The life of a worker. `held` are the supervisor's own sockets, which must end with it."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for other in held:
        other.close()
    logs.configure(settings.log_format)
    cpus = take_share(siblings.index, siblings.count)
    share = settings.model_copy(
        update={
            "intra_threads": settings.intra_threads or cpus,
            "decode_threads": settings.decode_threads or cpus,
            "decode_bytes": max(1, settings.decode_bytes // siblings.count),
            "cam_max_bytes": max(1, settings.cam_max_bytes // siblings.count),
        }
    )
    try:
        sessions = load_sessions(share)
    except (ValueError, OSError) as error:
        channel.sendall(str(error).encode())
        sys.exit(2)
    work(share, sessions, siblings, channel)
