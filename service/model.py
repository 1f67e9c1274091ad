"""A model as requests see it: what one request uses from its first step to its last, and what a reload replaces."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from models.bundle import Manifest
from service.prediction import Ranker
from service.session import Run, Session, load_sessions
from service.settings import Settings


@dataclass(frozen=True, eq=False)
class Model:
    """The sessions of one bundle, one a device, and what follows from its manifest."""

    sessions: tuple[Session, ...]
    runs: tuple[Run, ...] = field(init=False)  # for the batcher: one a lane of each device
    manifest: Manifest = field(init=False)
    ranker: Ranker = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(session.run for session in self.sessions for _ in range(session.lanes)))
        object.__setattr__(self, "manifest", self.sessions[0].bundle.manifest)
        object.__setattr__(self, "ranker", Ranker(self.manifest))

    @property
    def label(self) -> str:
        return f"{self.manifest.name} {self.manifest.version}"


def load_model(settings: Settings) -> Model:
    """The bundle of `settings`, verified, loaded and warmed up; it may be replaced on disk meanwhile.

    Raises:
        BundleError: if the folder is not a bundle that this service can run, or changed while it was loaded.
        DeviceError: if the device that was asked for cannot be used.
    """
    return Model(tuple(load_sessions(settings)))


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of each file of `folder`: another stamp is another bundle. Empty while there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries))
    except OSError:
        return ()
