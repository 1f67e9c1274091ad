"""A loaded model. A request uses the same `Model` from start to end; a reload replaces it for new requests."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from camcal.models.bundle import MAX_FILES, Manifest
from camcal.service.engine.proofs import Proofs
from camcal.service.engine.ranking import Ranker
from camcal.service.engine.session import RunBatch, Session, load_sessions
from camcal.service.settings import Settings


@dataclass(frozen=True, eq=False)
class Model:
    """The sessions of one bundle, one per device, and its manifest."""

    sessions: tuple[Session, ...]
    runs: tuple[RunBatch, ...] = field(init=False)  # for the batcher: one per lane of each device
    manifest: Manifest = field(init=False)
    ranker: Ranker = field(init=False)
    digest: str = field(init=False)  # checksum of the manifest

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(session.run for session in self.sessions for _ in range(session.lanes)))
        object.__setattr__(self, "manifest", self.sessions[0].bundle.manifest)
        object.__setattr__(self, "digest", self.sessions[0].bundle.digest)
        object.__setattr__(self, "ranker", Ranker(self.manifest))

    @property
    def label(self) -> str:
        return f"{self.manifest.name} {self.manifest.version}"


def load_proven(settings: Settings, proofs: Proofs) -> list[Session]:
    """Test the bundle of `settings` in a separate process, then load its sessions.

    The loaded bundle is the tested one: its manifest has the same checksum, and lists the checksums of all other files.

    Raises:
        BundleError: if the bundle is invalid, fails the test, or changed while it was loaded.
        DeviceError: if the device is not available.
    """
    return load_sessions(settings, digest=proofs.require(settings))


def load_model(settings: Settings, proofs: Proofs) -> Model:
    """Like `load_proven`, but returns a `Model`."""
    return Model(tuple(load_proven(settings, proofs)))


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and modification times of the files of `folder`, to detect changes. Empty if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            files = itertools.islice(entries, 2 * MAX_FILES)  # a bundle has fewer
            return tuple(sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in files))
    except OSError:
        return ()
