"""Several processes behind one port: a supervisor accepts the connections and deals them out to its workers in turn.

One Python process runs its interpreter on one CPU at a time, however many threads it has: where a small model answers
in milliseconds, reading requests and writing answers is what a second CPU cannot help with. A worker is the whole
service over again, with its own share of the CPUs; what it inherits from the supervisor is in memory once.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import multiprocessing
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

from camcal.cpus import take_share
from camcal.service import logs
from camcal.service.engine.large import DecoderProcess
from camcal.service.engine.model import load_proven
from camcal.service.engine.proofs import Proofs
from camcal.service.http.app import keyring
from camcal.service.http.siblings import Siblings
from camcal.service.mailbox import Mailbox
from camcal.service.process import server
from camcal.service.process.listening import Listeners, accept
from camcal.service.process.server import CONNECTION, DRAIN, FAILED, RELOAD, SERVING, SPREAD, STOP, work
from camcal.service.settings import Settings

log = logging.getLogger("camcal")

RESTART_S = 1.0  # before a worker that ended is replaced; twice that after each that could not start
MAX_RESTART_S = 30.0
FAILURES = 5  # workers in a row that could not start, while there is no other: the service ends
SILENCE = 6  # beats that a worker may miss before it is taken to hang
LATE_S = 10.0  # for a worker to end after its last answer
BEHIND_S = 0.01  # before connections are accepted again when no worker had room for one

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class WorkerError(ValueError):
    """A worker could not start; the message is its own."""


@dataclass(eq=False, kw_only=True)
class _Worker:
    index: int
    process: BaseProcess
    channel: socket.socket
    open: bool = True  # the channel
    said: bytes = b""  # of a line that is not complete
    served: bool = False
    version: str | None = None  # of the model that it serves, as long as it is ready
    silent: int = 0  # beats missed
    reason: str | None = None  # why it ends


class Supervisor:
    """Runs `settings.workers` workers until a signal comes; one that ends before is replaced.

    Signals mean what they mean to a single process: SIGTERM drains, SIGINT ends when all is answered, a second one at
    once, SIGHUP loads the bundle again in every worker. A worker that says nothing for half a minute is ended; where
    one that takes its place finds another bundle than the rest serve, the rest load that one too.
    """

    def __init__(self, settings: Settings, listeners: Listeners):
        self._settings = settings
        self._listeners = listeners
        self._proofs = Proofs()
        self._fork = multiprocessing.get_context("fork")
        self._selector = selectors.DefaultSelector()
        self._mailboxes = tuple(Mailbox() for _ in range(settings.workers))
        self._workers: dict[int, _Worker] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._turns = itertools.count()
        self._decoder = DecoderProcess(self._watch, self._selector.unregister)
        self._accepting = self._opened = self._stopping = False
        self._signals = self._failures = 0
        self._failure: str | None = None
        self._exhausted = logs.Seldom(log)

    def run(self) -> None:
        """Serve until a signal comes and everything is answered.

        Raises:
            ListenError: if another service was quicker to listen on the address.
            WorkerError: if the first workers cannot start.
        """
        logs.configure(self._settings.log_format)
        server.allow_open_files()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._selector)
            for mailbox in self._mailboxes:
                stack.callback(mailbox.close)
            stack.callback(self._decoder.close)
            stack.callback(self._kill)
            stack.enter_context(self._signals_heard())
            # What is loaded now is shared by all: collections must not write to it.
            gc.collect()
            gc.freeze()
            for index in range(self._settings.workers):
                self._start(index)
            self._later(server.BEAT_S, self._listen_for_beats)
            while self._workers or self._listeners.sockets:
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

    def _watch(self, descriptor: int, act: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, act)

    # Workers.

    def _start(self, index: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            siblings = Siblings(mailboxes=self._mailboxes, index=index, proofs=self._proofs)
            held = [ours, *self._listeners.sockets, *(worker.channel for worker in self._workers.values())]
            shared = self._decoder.mailbox, self._listeners.metrics
            process = self._fork.Process(target=_work, args=(self._settings, siblings, theirs, *shared, held))
            # Until the worker ignores them, it would write its own signals to the supervisor's.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                process.start()
            except OSError:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.setblocking(False)
        worker = self._workers[index] = _Worker(index=index, process=process, channel=ours)
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(worker))
        self._selector.register(process.sentinel, selectors.EVENT_READ, lambda: self._ended(worker))

    def _replace(self, index: int) -> None:
        if self._signals or self._stopping:
            return
        try:
            self._start(index)
        except OSError as error:
            log.error("no worker takes the place of worker %d yet: %s", index, error)
            self._later(MAX_RESTART_S, lambda: self._replace(index))

    def _hear(self, worker: _Worker) -> None:
        if not worker.open:  # what follows its last words in the same turn
            return
        try:
            said = worker.channel.recv(4096)
        except OSError:
            said = b""
        if not said:
            worker.open = False
            self._selector.unregister(worker.channel)
            return
        *lines, worker.said = (worker.said + said).split(b"\n")
        for line in lines:
            if line.startswith(SERVING):
                self._serves(worker, line.removeprefix(SERVING).decode())
            else:
                worker.reason, worker.version = line.removeprefix(FAILED).decode(), None
                self._tell(STOP, [worker])  # behind the connections that it has yet to take
                self._later(self._settings.answer_s + LATE_S, lambda: self._end(worker))
                if self._opened:
                    self._accept_if_possible()

    def _serves(self, worker: _Worker, version: str) -> None:
        new, worker.version, worker.silent, worker.served = worker.version is None, version, 0, True
        if not new:
            return
        self._failures = 0
        if not self._opened:
            # At first all, so that the earliest clients do not all end up with one; later any is better than none.
            if all(worker.version for worker in self._workers.values()):
                self._open()
            return
        self._accept_if_possible()
        # Clients that keep their connections have them all with the others.
        self._tell(SPREAD, (other for other in self._workers.values() if other is not worker))
        if others := [other for other in self._workers.values() if other.version not in (None, version)]:
            log.info("worker %d found model version %s, which the others now load too", worker.index, version)
            self._tell(RELOAD, others)

    def _listen_for_beats(self) -> None:
        """End the workers that hang. Counted in beats and not in time, which also passes while all are stopped."""
        for worker in self._workers.values():
            if worker.version is not None:
                worker.silent += 1
                if worker.silent > SILENCE:
                    worker.reason = f"worker {worker.index} has hung for {SILENCE * server.BEAT_S:g} s"
                    worker.process.kill()
        self._later(server.BEAT_S, self._listen_for_beats)

    def _end(self, worker: _Worker) -> None:
        """Of a worker that should have ended by itself."""
        if self._workers.get(worker.index) is worker:
            worker.process.kill()

    def _ended(self, worker: _Worker) -> None:
        self._selector.unregister(worker.process.sentinel)
        while worker.open:  # its last words
            self._hear(worker)
        worker.channel.close()
        worker.process.join()
        self._mailboxes[worker.index].clear()
        del self._workers[worker.index]
        if self._stopping:
            return
        reason = worker.reason or f"worker {worker.index} ended with code {worker.process.exitcode}"
        self._failures += not worker.served
        alone = not any(other.version for other in self._workers.values())
        if not self._opened or (alone and self._failures >= FAILURES):
            self._failure = self._failure or reason
            self._stop()
            return
        log.error("%s; another takes its place", reason)
        self._accept_if_possible()
        self._later(min(MAX_RESTART_S, RESTART_S * 2**self._failures), lambda: self._replace(worker.index))

    def _tell(self, word: bytes, workers: Iterable[_Worker] | None = None) -> None:
        for worker in self._workers.values() if workers is None else workers:
            with contextlib.suppress(OSError):  # it is ending
                worker.channel.send(word)

    def _kill(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()
            worker.process.join()

    # Connections.

    def _open(self) -> None:
        """Accept connections from now on."""
        if self._stopping:
            return
        self._listeners.open()
        self._opened = True
        log.info("%d workers listen on %s (press CTRL+C to quit)", len(self._workers), self._listeners.address)
        self._accept(True)

    def _accept_if_possible(self) -> None:
        if self._listeners.sockets:
            self._accept(any(worker.version for worker in self._workers.values()))

    def _accept(self, wanted: bool) -> None:
        if wanted != self._accepting:
            self._accepting = wanted
            for listener in self._listeners.sockets:
                if wanted:
                    self._selector.register(
                        listener, selectors.EVENT_READ, lambda listener=listener: self._deal(listener)
                    )
                else:
                    self._selector.unregister(listener)

    def _deal(self, listener: socket.socket) -> bool:
        """Give the next connection to the next worker; False if there was none, or nobody to take it."""
        takers = self._takers()
        if not takers:
            self._pause(BEHIND_S)
            return False
        try:
            connection = accept(listener)
        except OSError as error:
            self._exhausted("connections wait: %s", error.strerror)
            self._pause(server.FULL_S)
            return False
        if connection is None:
            return False
        with connection:
            for worker in takers:
                with contextlib.suppress(OSError):  # it is ending
                    socket.send_fds(worker.channel, [CONNECTION], [connection.fileno()])
                    return True
        return True

    def _pause(self, seconds: float) -> None:
        """Let connections wait in the kernel for a while."""
        if self._accepting:
            self._accept(False)
            self._later(seconds, self._accept_if_possible)

    def _takers(self) -> list[_Worker]:
        """The workers that can take a connection, first the one whose turn it is.

        A channel is writable while no more than a part of it is in use, so words always find room.
        """
        ready = {worker.channel.fileno(): worker for worker in self._workers.values() if worker.version}
        poll = select.poll()
        for channel in ready:
            poll.register(channel, select.POLLOUT)
        takers = [ready[channel] for channel, event in sorted(poll.poll(0)) if event == select.POLLOUT]
        first = next(self._turns) % max(1, len(takers))
        return takers[first:] + takers[:first]

    # Signals.

    @contextlib.contextmanager
    def _signals_heard(self) -> Iterator[None]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._signalled(ours.recv(64)))
        before = [signal.signal(number, lambda number, frame: None) for number in _SIGNALS]
        fd = signal.set_wakeup_fd(theirs.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in zip(_SIGNALS, before, strict=True):
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
        self._listeners.let_nobody_else_in()
        self._later(server.LAST_S if self._opened else 0.0, self._close)

    def _close(self) -> None:
        """Have the workers end, when the last connections are theirs."""
        if self._opened:
            for listener in self._listeners.sockets:
                while self._deal(listener):  # what has come before
                    pass
            if self._connections_wait() and any(worker.version for worker in self._workers.values()):
                self._later(BEHIND_S, self._close)
                return
        self._accept(False)
        self._listeners.close()
        self._tell(STOP)
        for worker in self._workers.values():
            if not worker.served:  # it still loads its model, and has no connection
                worker.process.kill()

    def _connections_wait(self) -> bool:
        poll = select.poll()
        for listener in self._listeners.sockets:
            poll.register(listener, select.POLLIN)
        return bool(poll.poll(0))


def _work(
    settings: Settings,
    siblings: Siblings,
    channel: socket.socket,
    decoder: Mailbox,
    metrics: list[socket.socket],
    held: list[socket.socket],
) -> None:
    """The life of a worker. `held` are the supervisor's own sockets, which must end with it."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    for other in held:
        other.close()
    logs.configure(settings.log_format)
    cpus = take_share(siblings.index, siblings.count)
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
        keyring(share)  # whose file may have changed since the supervisor looked
        sessions = load_proven(share, siblings.proofs)
    except (ValueError, OSError) as error:
        channel.sendall(FAILED + " ".join(str(error).split()).encode() + b"\n")
        sys.exit(2)
    try:
        work(share, sessions, siblings, channel, decoder, metrics)
    except Exception:
        log.exception("worker %d failed", siblings.index)
        sys.exit(1)
