"""Runs for tests: on the CPU, in silence."""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from camcal.models.classifier import LongTailClassifier
from camcal.models.report import FittedCalibration, Report
from camcal.training.calibration.calibrate import calibrate
from camcal.training.data import Dataset
from camcal.training.recipe import Recipe
from camcal.training.report.evaluate import evaluate
from camcal.training.run import Run, RunFolder

CPU = torch.device("cpu")


def make_run(
    recipe: Recipe,
    folder: RunFolder | Path,
    data: Dataset | None = None,
    console: Console | None = None,
    device: torch.device = CPU,
) -> Run:
    """A run in a folder; its images are loaded when needed, if not given."""
    return Run(
        recipe=recipe,
        folder=folder if isinstance(folder, RunFolder) else RunFolder(folder),
        console=console or Console(file=io.StringIO(), width=200),
        device=device,
        given=data,
    )


def calibrated(network: LongTailClassifier, data: Dataset, recipe: Recipe) -> FittedCalibration:
    """What calibration finds for a network, in a folder that is gone afterwards."""
    with TemporaryDirectory() as folder:
        return calibrate(make_run(recipe, Path(folder), data), network)


def evaluated(network: LongTailClassifier, data: Dataset, recipe: Recipe, fitted: FittedCalibration) -> Report:
    """The report on a network, made in a folder that is gone afterwards."""
    with TemporaryDirectory() as folder:
        return evaluate(make_run(recipe, Path(folder), data), network, fitted)
