"""The steps from a recipe to a bundle, each of which reads what the one before left in the run's folder."""

from camcal.training.pipeline.steps import calibrate_run, evaluate_run, export_run, open_run
from camcal.training.pipeline.training import fit_run, train

__all__ = ["calibrate_run", "evaluate_run", "export_run", "fit_run", "open_run", "train"]
