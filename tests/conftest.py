"""Shared fixtures: one small training run on real digits, trained once per session."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from camcal.training import pipeline
from camcal.training.recipe import Recipe, load_recipe
from camcal.training.run import RunFolder


@pytest.fixture(scope="session")
def digits_recipe() -> Recipe:
    """The shipped recipe `digits`."""
    return load_recipe("digits")


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, digits_recipe: Recipe) -> RunFolder:
    """A finished run: trained, calibrated, evaluated and exported."""
    run = RunFolder(tmp_path_factory.mktemp("digits") / "run")
    pipeline.train(digits_recipe, run, Console(file=io.StringIO()))
    return run


@pytest.fixture(scope="session")
def digits_bundle(digits_run: RunFolder) -> Path:
    """The bundle of that run: 10 classes, 32×32 images, an 8×8 grid."""
    return digits_run.bundle
