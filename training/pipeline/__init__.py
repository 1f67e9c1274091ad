"""The steps from a recipe to a bundle, each of which reads what the one before left in the run's folder."""

from camcal.training.pipeline.steps import (
    calibrate_run,
    default_device,
    evaluate_run,
    export_run,
    fit_run,
    load,
    mapped,
    recipe_of,
    train,
)

__all__ = [
    "calibrate_run",
    "default_device",
    "evaluate_run",
    "export_run",
    "fit_run",
    "load",
    "mapped",
    "recipe_of",
    "train",
]
