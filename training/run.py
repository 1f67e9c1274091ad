"""One run: what every step from training to export needs, and the files that each step leaves for the next."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console

from camcal.training.data import Dataset, load_dataset
from camcal.training.distributed import ALONE, Processes
from camcal.training.priors import given_prior
from camcal.training.recipe import Recipe

if sys.platform != "win32":
    import fcntl


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


@dataclass(frozen=True)
class RunFolder:
    """The files under one `--out` folder."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """Network and optimiser after the last finished epoch."""
        return self.path / "checkpoint.safetensors"

    @property
    def network(self) -> Path:
        """The calibrated network."""
        return self.path / "network.safetensors"

    @property
    def before_refit(self) -> Path:
        """The calibrated network before the second training, which has not seen the held-out images."""
        return self.path / "before-refit.safetensors"

    @property
    def logits(self) -> Path:
        """Cached logits of the trained network."""
        return self.path / "logits.safetensors"

    @property
    def refit(self) -> RunFolder:
        """The folder of the second training."""
        return RunFolder(self.path / "refit")

    @property
    def head(self) -> RunFolder:
        """The folder of the head's training, where that comes before the whole network's."""
        return RunFolder(self.path / "head")

    def teachers(self, count: int = 1) -> list[RunFolder]:
        """The folders of the teachers that are trained for this run."""
        return [RunFolder(self.path / ("teacher" if i == 1 else f"teacher-{i}")) for i in range(1, count + 1)]

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The report as a page."""
        return self.path / "report.html"

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    def make(self) -> None:
        """Create the folder if it is missing. Raises RunError if a file is in the way."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise RunError(f"{self.path} cannot be created: it, or a folder above it, is a file") from None

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the folder, which must exist, against other trainings.

        Raises:
            RunError: if another process trains in it.
        """
        if sys.platform == "win32":
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path} is in use by another training: choose another --out") from None
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(folder)


def default_device() -> torch.device:
    """CUDA if available."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the steps of one run share.

    given: the images, where they have been loaded already; otherwise `data` loads them when a step first needs them.
    processes: those that train together; the other steps run in one.
    """

    recipe: Recipe
    folder: RunFolder
    console: Console
    device: torch.device
    processes: Processes = ALONE
    given: Dataset | None = None

    @cached_property
    def data(self) -> Dataset:
        """The images. A prior in the recipe that does not fit their classes is refused here, before any work.

        Raises:
            DataError: if the images cannot be read or do not fit the recipe.
            ValueError: if `calibrate.prior` does not fit the classes.
        """
        data = self.given
        if data is None:
            with self.console.status("reading images"):
                data = load_dataset(self.recipe.data, self.recipe.seed)
        if self.recipe.calibrate.prior is not None:
            given_prior(self.recipe.calibrate.prior, data.classes)
        return data
