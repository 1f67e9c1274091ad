"""The run itself: in every round each server is started, loaded in the same way and stopped, one after another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.serving.load import Load, Outcome
from tests.benchmarks.serving.servers import (
    CAMCAL,
    OURS,
    ROOT,
    SERVERS,
    Running,
    Server,
    ServerError,
    ask,
    install,
    running,
)
from tests.benchmarks.serving.summary import Figures, closed_loop, open_loop, overload

SKIP_S = 1.0  # of every step: connections are made and batches find their size
WARM_UP_S = 4.0  # after the first prediction: every worker of a server has to come up
OPEN_SHARE = 0.8  # of a server's own peak
SAME_SHARE = 0.6  # of the ceiling: the same load for every server
OVERLOAD_TIMES = 3.0
PAIRS_CLIENTS = 32  # of the comparison of maps on and off
GROWTH_SAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """For one model."""

    bundle: Path
    clients: list[int]
    rounds: int
    seconds: float
    overload_s: float


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def generate(load: Load) -> Outcome:
    """Run the load generator in a process of its own. Raises ServerError if it fails."""
    command = [sys.executable, "-m", "tests.benchmarks.serving.load"]
    result = subprocess.run(command, input=load.model_dump_json(), capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise ServerError(f"the load generator failed: {result.stderr.strip()[-300:]}")
    return Outcome.model_validate_json(result.stdout)


class Bench:
    """Servers by name, where they run from, and the photographs they all see."""

    def __init__(self, work: Path, camcal: Path, names: list[str]):
        self.work = work
        self.photos = work / "photos"
        self._photo = min(self.photos.glob("*.jpg")).read_bytes()
        self._failed: dict[str, str] = {}
        self._bin: dict[str, Path] = {}
        for name in names:
            say(f"{name}: preparing its environment")
            try:
                self._bin[name] = camcal if name in OURS else install(name, work / "environments")
            except ServerError as error:
                self._fail(name, str(error))

    def _fail(self, name: str, reason: str) -> None:
        say(f"{name}: {reason}")
        self._failed[name] = reason

    def send(self, running: Running, **load: Any) -> Outcome:
        """Run the generator against a server."""
        server = running.server
        asked = {"port": running.port, "path": "/predict", "form": server.form, "field": server.field}
        return generate(Load.model_validate(asked | {"photos": self.photos} | load))

    def generator(self, seconds: float) -> dict[str, float]:
        """What the generator can do against a server that does nothing: it must not be the bottleneck."""
        trivial = Server(
            name="trivial",
            command=lambda _, __, port: [sys.executable, "-m", "tests.benchmarks.serving.trivial", str(port)],
        )
        with running(trivial, Path(sys.executable).parent, ROOT, self._photo, self._log(trivial)) as server:
            outcome = self.send(server, clients=32, seconds=seconds + SKIP_S)
        figures = closed_loop(outcome.records, SKIP_S, seconds)
        found = {"rate": figures["rate"], "cpu_us": 1e6 * outcome.cpu_s / len(outcome.records)}
        say(f"generator: at most {found['rate']:.0f} requests/s, {found['cpu_us']:.0f} µs of CPU each")
        return found

    def measure(self, plan: Plan) -> Iterator[dict[str, Any]]:
        """The results after each round."""
        measured: dict[str, Any] = {"bundle": _describe(plan.bundle), "rounds": [], "failed": self._failed}
        for number in range(plan.rounds):
            say(f"{plan.bundle.name}: round {number + 1} of {plan.rounds}")
            entry: dict[str, Any] = {"ceiling": self._ceiling(plan), "servers": {}}
            # Another order in each round, so that nobody always follows the same neighbour.
            names = [name for name in self._bin if name not in self._failed]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                server = SERVERS[name]
                try:
                    with running(server, self._bin[name], plan.bundle, self._photo, self._log(server)) as up:
                        last = number + 1 == plan.rounds
                        entry["servers"][name] = self._serve(up, plan, SAME_SHARE * entry["ceiling"]["best"], last)
                except (ServerError, OSError) as error:  # one that breaks down must not end the run of the others
                    self._fail(name, f"{error} (see {self._log(server).name})")
            measured["rounds"].append(entry)
            yield measured

    def _log(self, server: Server) -> Path:
        return self.work / f"{server.name}.log"

    def _serve(self, server: Running, plan: Plan, same_rate: float, last: bool) -> dict[str, Any]:
        """All steps against one running server; `same_rate` is that of the open loop that is the same for all."""
        entry: dict[str, Any] = {"ready_s": server.ready_s, "top1": self._top1(server), "closed": {}}
        self.send(server, clients=8, seconds=WARM_UP_S)
        for clients in plan.clients:
            outcome = self.send(server, clients=clients, seconds=plan.seconds + SKIP_S)
            entry["closed"][str(clients)] = figures = closed_loop(outcome.records, SKIP_S, plan.seconds)
            _say(server, f"{clients} clients", figures)
        entry["memory_mb"] = server.memory_mb()
        peak = max(figures["rate"] for figures in entry["closed"].values())
        if peak:
            for step, rate in ("open", OPEN_SHARE * peak), ("same", same_rate):
                outcome = self.send(server, rate=rate, seconds=plan.seconds + SKIP_S)
                entry[step] = open_loop(outcome.records, SKIP_S, plan.seconds) | {"offered": rate}
                _say(server, f"open loop, {rate:.0f}/s", entry[step])
        if server.server.name in OURS:
            entry["maps"] = self._maps(server, plan)
            if last and plan.overload_s:
                outcome = self.send(server, rate=OVERLOAD_TIMES * peak, seconds=plan.overload_s)
                entry["overload"] = overload(outcome.records, plan.overload_s) | {"peak": peak}
                say(f"  {server.server.name}: overload {entry['overload']}")
        return entry

    def _top1(self, server: Running) -> list[int]:
        """The most probable class of each photograph: every server must say the same."""
        found = [ask(server.server, server.port, path.read_bytes()) for path in sorted(self.photos.glob("*.jpg"))]
        return [predictions[0]["class_id"] for predictions in found]

    def _maps(self, server: Running, plan: Plan) -> list[dict[str, float]]:
        """Pairs of short stretches with and without heatmaps: too close to tell apart by two long ones."""
        seconds, pairs = max(1.0, plan.seconds / 2), []
        for _ in range(2):
            pair = {}
            for cam in ("true", "false"):
                load = {"clients": PAIRS_CLIENTS, "seconds": seconds + SKIP_S, "path": f"/predict?cam={cam}"}
                pair[cam] = closed_loop(self.send(server, **load).records, SKIP_S, seconds)["rate"]
            pairs.append({"on": pair["true"], "off": pair["false"]})
        return pairs

    def _ceiling(self, plan: Plan) -> dict[str, float]:
        seconds = str(max(1.0, plan.seconds / 2))
        command = [sys.executable, "-m", "tests.benchmarks.serving.ceiling"]
        command += [str(plan.bundle), str(self.photos), seconds]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        found: dict[str, float] = json.loads(result.stdout)
        say(f"  ceiling: {found['best']:.0f} images/s; one image alone {found['decode_inference_ms']:.1f} ms")
        return found

    def growth(self, plan: Plan, requests: int) -> dict[str, Any]:
        """Camcal's memory, first after a tenth of the requests (its map store is then full), then to the end."""
        log = self._log(CAMCAL)
        with running(CAMCAL, self._bin[CAMCAL.name], plan.bundle, self._photo, log) as server:
            samples, sent = [], 0
            for sample in range(GROWTH_SAMPLES):
                count = requests * (sample + 1) // GROWTH_SAMPLES - sent
                outcome = self.send(server, clients=PAIRS_CLIENTS, seconds=3600, count=count)
                sent += len(outcome.records)
                errors = sum(status != 200 for _, _, status in outcome.records)
                samples.append({"requests": sent, "memory_mb": server.memory_mb(), "errors": errors})
                say(f"  {sent} requests, {samples[-1]['memory_mb']:.1f} MB, {errors} errors")
        start, end = samples[GROWTH_SAMPLES // 10 - 1]["memory_mb"], samples[-1]["memory_mb"]
        return {"samples": samples, "growth": end / start - 1}


def _say(server: Running, step: str, figures: Figures) -> None:
    times = "" if figures["p50_ms"] is None else f", p50 {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.1f} ms"
    errors = f", errors {figures['errors']}" if figures["errors"] else ""
    say(f"  {server.server.name}: {step}: {figures['rate']:.1f}/s{times}{errors}")


def _describe(bundle: Path) -> dict[str, Any]:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    return {
        "name": manifest["name"],
        "version": manifest["version"],
        "classes": len(manifest["classes"]),
        "input_size": manifest["preprocessing"]["input_size"],
        "backbone": manifest["recipe"]["model"]["backbone"],
    }
