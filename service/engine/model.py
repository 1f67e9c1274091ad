"""A model as requests see it: what one request uses from its first step to its last, and what a reload replaces."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from camcal.models.bundle import MAX_FILES, Manifest
from camcal.service.engine.prediction import Ranker
from camcal.service.engine.proofs import Proofs
from camcal.service.engine.session import Run, Session, load_sessions
from camcal.service.settings import Settings


@dataclass(frozen=True, eq=False)
class Model:
    """The sessions of one bundle, one a device, and what follows from its manifest."""

    sessions: tuple[Session, ...]
    runs: tuple[Run, ...] = field(init=False)  # for the batcher: one a lane of each device
    manifest: Manifest = field(init=False)
    ranker: Ranker = field(init=False)
    digest: str = field(init=False)  # of the bundle

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(session.run for session in self.sessions for _ in range(session.lanes)))
        object.__setattr__(self, "manifest", self.sessions[0].bundle.manifest)
        object.__setattr__(self, "digest", self.sessions[0].bundle.digest)
        object.__setattr__(self, "ranker", Ranker(self.manifest))

    @property
    def label(self) -> str:
        return f"{self.manifest.name} {self.manifest.version}"


def load_proven(settings: Settings, proofs: Proofs) -> list[Session]:
    """The sessions of the bundle of `settings`, tried in a process of its own and then loaded here.

    What is loaded is what was tried: the checksum of the manifest is the same, and those of all files are in it.

    Raises:
        BundleError: if the folder is not a bundle that this service can run, or changed while it was loaded.
        DeviceError: if the device that was asked for cannot be used.
    """
    return load_sessions(settings, digest=proofs.require(settings))


def load_model(settings: Settings, proofs: Proofs) -> Model:
    """As `load_proven`, as a model."""
    return Model(tuple(load_proven(settings, proofs)))


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the files of `folder`: another stamp is another bundle. Empty while there is no folder."""
    try:
        with os.scandir(folder) as entries:
            some = itertools.islice(entries, 2 * MAX_FILES)  # a bundle has no more
            return tuple(sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in some))
    except OSError:
        return ()
