"""One run: measure the capacity, then traffic, bad clients, faults and samples side by side until the time is up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from tests.soak.faults import Current, Faults
from tests.soak.journal import Journal, Sample
from tests.soak.nuisance import Nuisance
from tests.soak.server import Server
from tests.soak.traffic import Traffic

CALIBRATION_S = 10.0  # at most; a short run takes a tenth of its time


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does. `share` is of the measured capacity; the others are seconds between things of one kind."""

    seconds: float
    workers: int
    share: float
    samples_every: float
    faults_every: float
    bad_every: float
    seed: int


async def run(plan: Plan, server: Server, current: Current, cases: list[Path], photos: Path) -> tuple[Journal, float]:
    """What happened, and the requests per second that were sent."""
    async with Traffic(server.url, journal := Journal(), photos, plan.seed).connected() as traffic:
        stretch = min(CALIBRATION_S, plan.seconds / 10)
        await traffic.capacity(stretch)  # the first answers are slower
        rate = plan.share * await traffic.capacity(stretch)
        journal.start()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(traffic.run(rate)),
                group.create_task(Nuisance(server.url, journal, cases, plan.seed).run(plan.bad_every)),
                group.create_task(_sample(server, journal, plan.samples_every)),
            ]
            faults = Faults(server, current, plan.workers, journal, plan.seed)
            await asyncio.gather(faults.run(plan.faults_every, plan.seconds), asyncio.sleep(plan.seconds))
            for task in tasks:
                task.cancel()
    return journal, rate


async def _sample(server: Server, journal: Journal, every: float) -> None:
    while True:
        usage = await asyncio.to_thread(server.usage)
        journal.samples.append(Sample(at=journal.now(), usage=usage))
        await asyncio.sleep(every)
