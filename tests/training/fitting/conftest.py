from __future__ import annotations

import pytest

from camcal.training.data import Dataset, load_dataset
from camcal.training.recipe import Recipe, load_recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("digits", ["fit.epochs=3", "data.imbalance=20", "fit.warmup_epochs=1"])


@pytest.fixture(scope="module")
def data(recipe: Recipe) -> Dataset:
    return load_dataset(recipe.data, recipe.seed)
