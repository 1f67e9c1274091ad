"""Several processes behind one port: a supervisor accepts connections and deals them out to its workers in turn.

One Python process runs its interpreter on one CPU at a time, however many threads it has. Where a small model answers
in milliseconds, reading requests and writing responses is what a second CPU cannot help with. Each worker is the whole
service with its own share of the CPUs; what it inherits from the supervisor is in memory once.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import signal
import socket
from collections.abc import Iterable, Iterator

from camcal.service import logs
from camcal.service.engine.large import DecoderProcess
from camcal.service.engine.proofs import Proofs
from camcal.service.http.siblings import Siblings
from camcal.service.mailbox import Mailbox
from camcal.service.process import channel
from camcal.service.process.channel import DRAIN, RELOAD, SERVING, SPREAD, STOP, WorkerHandle
from camcal.service.process.dealer import BEHIND_S, Dealer
from camcal.service.process.events import Events
from camcal.service.process.listening import Listeners
from camcal.service.process.server import LAST_S, allow_open_files
from camcal.service.process.worker import SIGNALS, run_worker
from camcal.service.settings import Settings

log = logging.getLogger("camcal")

RESTART_S = 1.0  # before a worker that ended is replaced; twice that after each that could not start
MAX_RESTART_S = 30.0
FAILURES = 5  # workers in a row that could not start, while there is no other: the service ends
SILENCE = 6  # beats that a worker may miss before it is taken to hang
LATE_S = 10.0  # for a worker to end after its last response


class WorkerError(ValueError):
    """A worker could not start; the message is its own."""


class Supervisor:
    """Runs `settings.workers` workers until a signal comes; one that ends before is replaced.

    Signals mean what they mean to a single process: SIGTERM drains, SIGINT ends once all requests are answered, a
    second one ends at once, SIGHUP reloads the bundle in every worker. A worker that is silent for half a minute is
    killed. Where one that takes its place finds another bundle than the rest serve, the rest reload too.
    """

    def __init__(self, settings: Settings, listeners: Listeners):
        self._settings = settings
        self._listeners = listeners
        self._proofs = Proofs()
        self._fork = multiprocessing.get_context("fork")
        self._events = Events()
        self._mailboxes = tuple(Mailbox() for _ in range(settings.workers))
        self._workers: dict[int, WorkerHandle] = {}
        self._dealer = Dealer(listeners, self._events, self._workers.values)
        self._decoder = DecoderProcess(self._events.watch, self._events.unwatch)
        self._opened = self._stopping = False
        self._signals = self._failures = 0
        self._failure: str | None = None

    def run(self) -> None:
        """Serve until a signal comes and everything is answered.

        Raises:
            ListenError: if another service was quicker to listen on the address.
            WorkerError: if the first workers cannot start.
        """
        logs.configure(self._settings.log_format)
        allow_open_files()
        with contextlib.ExitStack() as stack:
            stack.callback(self._events.close)
            for mailbox in self._mailboxes:
                stack.callback(mailbox.close)
            stack.callback(self._decoder.close)
            stack.callback(self._kill)
            stack.enter_context(self._watch_signals())
            # What is loaded now is shared by all: collections must not write to it.
            gc.collect()
            gc.freeze()
            for index in range(self._settings.workers):
                self._start(index)
            self._events.later(channel.BEAT_S, self._check_beats)
            while self._workers or self._listeners.sockets:
                self._events.turn()
        if self._failure is not None:
            raise WorkerError(self._failure)

    def _start(self, index: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            siblings = Siblings(mailboxes=self._mailboxes, index=index, proofs=self._proofs)
            held = [ours, *self._listeners.sockets, *(worker.channel for worker in self._workers.values())]
            shared = self._decoder.mailbox, self._listeners.metrics
            process = self._fork.Process(target=run_worker, args=(self._settings, siblings, theirs, *shared, held))
            # Until the worker ignores them, it would write its own signals to the supervisor's.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                process.start()
            except OSError:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.setblocking(False)
        worker = self._workers[index] = WorkerHandle(index=index, process=process, channel=ours)
        self._events.watch(ours, lambda: self._hear(worker))
        self._events.watch(process.sentinel, lambda: self._ended(worker))

    def _replace(self, index: int) -> None:
        if self._signals or self._stopping:
            return
        try:
            self._start(index)
        except OSError as error:
            log.error("worker %d could not be replaced yet: %s", index, error)
            self._events.later(MAX_RESTART_S, lambda: self._replace(index))

    def _hear(self, worker: WorkerHandle) -> None:
        if not worker.open:  # what follows its last line in the same turn
            return
        lines = worker.receive()
        if not worker.open:
            self._events.unwatch(worker.channel)
            return
        for line in lines:
            if line.startswith(SERVING):
                self._serves(worker, line.removeprefix(SERVING).decode())
            else:
                worker.reason, worker.version = line.removeprefix(channel.FAILED).decode(), None
                worker.send(STOP)  # behind the connections that it has yet to take
                self._events.later(self._settings.answer_s + LATE_S, lambda: self._end(worker))
                if self._opened:
                    self._dealer.update()

    def _serves(self, worker: WorkerHandle, version: str) -> None:
        new, worker.version, worker.silent, worker.served = worker.version is None, version, 0, True
        if not new:
            return
        self._failures = 0
        if not self._opened:
            # At first all, so that the earliest clients do not all end up with one; later any is better than none.
            if all(worker.version for worker in self._workers.values()):
                self._open()
            return
        self._dealer.update()
        # Clients that keep their connections have them all with the others.
        self._tell(SPREAD, (other for other in self._workers.values() if other is not worker))
        if others := [other for other in self._workers.values() if other.version not in (None, version)]:
            log.info("worker %d serves model version %s, which the others now load too", worker.index, version)
            self._tell(RELOAD, others)

    def _open(self) -> None:
        """Accept connections from now on."""
        if self._stopping:
            return
        self._listeners.open()
        self._opened = True
        log.info("%d workers listen on %s (press CTRL+C to quit)", len(self._workers), self._listeners.address)
        self._dealer.update()

    def _check_beats(self) -> None:
        """Kill the workers that hang. Counted in beats and not in time, which also passes while all are stopped."""
        for worker in self._workers.values():
            if worker.version is not None:
                worker.silent += 1
                if worker.silent > SILENCE:
                    worker.reason = f"worker {worker.index} has hung for {SILENCE * channel.BEAT_S:g} s"
                    worker.process.kill()
        self._events.later(channel.BEAT_S, self._check_beats)

    def _end(self, worker: WorkerHandle) -> None:
        """Kill a worker that should have ended by itself."""
        if self._workers.get(worker.index) is worker:
            worker.process.kill()

    def _ended(self, worker: WorkerHandle) -> None:
        self._events.unwatch(worker.process.sentinel)
        while worker.open:  # its last lines
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
        self._dealer.update()
        delay_s = min(MAX_RESTART_S, RESTART_S * 2**self._failures)
        self._events.later(delay_s, lambda: self._replace(worker.index))

    def _tell(self, word: bytes, workers: Iterable[WorkerHandle] | None = None) -> None:
        for worker in self._workers.values() if workers is None else workers:
            worker.send(word)

    def _kill(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()
            worker.process.join()

    @contextlib.contextmanager
    def _watch_signals(self) -> Iterator[None]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._events.watch(ours, lambda: self._signalled(ours.recv(64)))
        before = [signal.signal(number, lambda number, frame: None) for number in SIGNALS]
        fd = signal.set_wakeup_fd(theirs.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in zip(SIGNALS, before, strict=True):
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
                    self._events.later(drain_s, self._stop)

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._listeners.let_nobody_else_in()
        self._events.later(LAST_S if self._opened else 0.0, self._close)

    def _close(self) -> None:
        """Have the workers end once the last connections are theirs."""
        if self._opened and not self._dealer.deal_waiting():
            self._events.later(BEHIND_S, self._close)
            return
        self._dealer.stop()
        self._listeners.close()
        self._tell(STOP)
        for worker in self._workers.values():
            if not worker.served:  # it still loads its model, and has no connection
                worker.process.kill()
