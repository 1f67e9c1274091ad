"""Several processes behind one port: a supervisor accepts connections and distributes them to its workers in turn.

A Python process runs its interpreter on one CPU at a time, regardless of its threads. With a small model that takes
only milliseconds, reading requests and writing responses is the bottleneck. Each worker is a complete server with its
share of the CPUs. Workers are forked, so memory inherited from the supervisor is shared.
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
from camcal.service.process.dealer import BUSY_S, Dealer
from camcal.service.process.events import Events
from camcal.service.process.listening import Listeners
from camcal.service.process.server import LAST_S, allow_open_files
from camcal.service.process.worker import SIGNALS, run_worker
from camcal.service.settings import Settings

log = logging.getLogger("camcal")

RESTART_S = 1.0  # delay before a worker is restarted; doubles with each consecutive failed start
MAX_RESTART_S = 30.0
MAX_FAILED_STARTS = 5  # consecutive failed starts after which the service exits, if no worker is ready
MAX_MISSED_BEATS = 6  # missed heartbeats after which a worker counts as hung
LATE_S = 10.0  # time for a worker to exit after its last response


class WorkerError(ValueError):
    """A worker could not start. The message comes from the worker."""


class Supervisor:
    """Runs `settings.workers` workers until a signal, and restarts those that end.

    Signals work as for a single process. SIGTERM drains, SIGINT exits after all requests are finished, a second signal
    exits at once, and SIGHUP reloads the bundle in every worker. A worker without a heartbeat for half a minute is
    killed. If a restarted worker loads another model version, the other workers reload too.
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
        self._signals = self._failed_starts = 0
        self._failure: str | None = None

    def run(self) -> None:
        """Serve until a signal, and finish all requests.

        Raises:
            ListenError: if another process now listens on the address.
            WorkerError: if the workers cannot start.
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
            # All workers share the memory of these objects: garbage collection must not write to it.
            gc.collect()
            gc.freeze()
            for index in range(self._settings.workers):
                self._start(index)
            self._events.later(channel.BEAT_S, self._check_beats)
            while self._workers or self._listeners.sockets:
                self._events.run_once()
        if self._failure is not None:
            raise WorkerError(self._failure)

    def _start(self, index: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            siblings = Siblings(mailboxes=self._mailboxes, index=index, proofs=self._proofs)
            inherited = [ours, *self._listeners.sockets, *(worker.channel for worker in self._workers.values())]
            shared = self._decoder.mailbox, self._listeners.metrics
            process = self._fork.Process(target=run_worker, args=(self._settings, siblings, theirs, *shared, inherited))
            # Until the worker ignores signals, it would write its own into the supervisor's wakeup socket.
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
        self._events.watch(ours, lambda: self._receive(worker))
        self._events.watch(process.sentinel, lambda: self._on_exit(worker))

    def _restart(self, index: int) -> None:
        if self._signals or self._stopping:
            return
        try:
            self._start(index)
        except OSError as error:
            log.error("cannot restart worker %d, retrying: %s", index, error)
            self._events.later(MAX_RESTART_S, lambda: self._restart(index))

    def _receive(self, worker: WorkerHandle) -> None:
        if not worker.open:  # `_on_exit` has read its last line in the same iteration
            return
        lines = worker.receive()
        if not worker.open:
            self._events.unwatch(worker.channel)
            return
        for line in lines:
            if line.startswith(SERVING):
                self._on_serving(worker, line.removeprefix(SERVING).decode())
            else:
                worker.reason, worker.version = line.removeprefix(channel.FAILED).decode(), None
                worker.send(STOP)  # read after the connections that are already in the channel
                self._events.later(self._settings.answer_s + LATE_S, lambda: self._kill_late(worker))
                if self._opened:
                    self._dealer.update()

    def _on_serving(self, worker: WorkerHandle, version: str) -> None:
        new, worker.version, worker.missed_beats, worker.served = worker.version is None, version, 0, True
        if not new:
            return
        self._failed_starts = 0
        if not self._opened:
            # Wait for all workers, or one of them would get all early clients.
            if all(worker.version for worker in self._workers.values()):
                self._open()
            return
        self._dealer.update()
        # All keep-alive connections are with the other workers; let them close some.
        self._send(SPREAD, (other for other in self._workers.values() if other is not worker))
        if others := [other for other in self._workers.values() if other.version not in (None, version)]:
            log.info("worker %d has loaded model version %s; the other workers reload too", worker.index, version)
            self._send(RELOAD, others)

    def _open(self) -> None:
        """Start to accept connections."""
        if self._stopping:
            return
        self._listeners.open()
        self._opened = True
        log.info("%d workers listening on %s (press CTRL+C to quit)", len(self._workers), self._listeners.address)
        self._dealer.update()

    def _check_beats(self) -> None:
        """Kill workers that hang. Counts beats instead of time, which also passes while all processes are suspended."""
        for worker in self._workers.values():
            if worker.version is not None:
                worker.missed_beats += 1
                if worker.missed_beats > MAX_MISSED_BEATS:
                    worker.reason = (
                        f"worker {worker.index} has not responded for {MAX_MISSED_BEATS * channel.BEAT_S:g} s"
                    )
                    worker.process.kill()
        self._events.later(channel.BEAT_S, self._check_beats)

    def _kill_late(self, worker: WorkerHandle) -> None:
        """Kill a worker that should have exited by itself."""
        if self._workers.get(worker.index) is worker:
            worker.process.kill()

    def _on_exit(self, worker: WorkerHandle) -> None:
        self._events.unwatch(worker.process.sentinel)
        while worker.open:  # read its last lines
            self._receive(worker)
        worker.channel.close()
        worker.process.join()
        self._mailboxes[worker.index].clear()
        del self._workers[worker.index]
        if self._stopping:
            return
        reason = worker.reason or f"worker {worker.index} exited with code {worker.process.exitcode}"
        self._failed_starts += not worker.served
        none_ready = not any(other.version for other in self._workers.values())
        if not self._opened or (none_ready and self._failed_starts >= MAX_FAILED_STARTS):
            self._failure = self._failure or reason
            self._stop()
            return
        log.error("%s; restarting it", reason)
        self._dealer.update()
        delay_s = min(MAX_RESTART_S, RESTART_S * 2**self._failed_starts)
        self._events.later(delay_s, lambda: self._restart(worker.index))

    def _send(self, command: bytes, workers: Iterable[WorkerHandle] | None = None) -> None:
        for worker in self._workers.values() if workers is None else workers:
            worker.send(command)

    def _kill(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()
            worker.process.join()

    @contextlib.contextmanager
    def _watch_signals(self) -> Iterator[None]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._events.watch(ours, lambda: self._on_signals(ours.recv(64)))
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

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGHUP:
                self._send(RELOAD)
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._signals += 1
                if self._signals > 1:
                    self._stop()
                    self._kill()
                else:
                    drain_s = self._settings.drain_s if number == signal.SIGTERM and self._opened else 0.0
                    log.info("draining: not ready, but serving for another %g s", drain_s)
                    self._send(DRAIN)
                    self._events.later(drain_s, self._stop)

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._listeners.stop_accepting()
        self._events.later(LAST_S if self._opened else 0.0, self._close)

    def _close(self) -> None:
        """Stop the workers after they have got the last connections."""
        if self._opened and not self._dealer.deal_waiting():
            self._events.later(BUSY_S, self._close)
            return
        self._dealer.stop()
        self._listeners.close()
        self._send(STOP)
        for worker in self._workers.values():
            if not worker.served:  # still loading its model, without any connection
                worker.process.kill()
