"""Figures of a bundle's graph on the test part of its recipe's data, compared with its report. K classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console

from camcal.models.bundle import REPORT_FILE, Bundle
from camcal.models.report import Figures, Report
from camcal.training import metrics
from camcal.training.data import Dataset
from camcal.training.export import precision
from camcal.training.priors import even_prior, prior_weights, shift_prior
from camcal.training.recipe import Recipe, RecipeError, parse_recipe
from camcal.training.report.evaluate import by_predicted_group
from camcal.training.report.summary import errors_table, figures_table, group_table

JUDGED = ("probabilities", "calibrated_probabilities", "calibrated_logits")
"""The graph outputs that figures are computed from."""
ALLOWED = 0.001  # difference of accuracy and ECE: arithmetic differs between machines, and some images are borderline


class VerifyError(ValueError):
    """A bundle that does not match its report."""


def recipe_of(bundle: Bundle, overrides: Sequence[str]) -> Recipe:
    """The recipe of a bundle; `data.root=PATH`, the only override, is where its data is now.

    Raises:
        RecipeError: if there is another override.
    """
    if wrong := [override for override in overrides if not override.strip().startswith("data.root=")]:
        raise RecipeError(f"--set {wrong[0]}: only data.root can change: a bundle is verified on its own data")
    raw = bundle.manifest.model_dump(mode="json")["recipe"]
    return parse_recipe(raw, str(bundle.path / "manifest.json"), overrides)


def verify(bundle: Bundle, data: Dataset, console: Console) -> dict[str, Figures]:
    """Print and return figures of the graph's probabilities on the test part.

    Plain and calibrated, and calibrated for the training prior on the test part weighted to it.

    Raises:
        VerifyError: if the data has other classes, or accuracy or ECE differ from the report.
    """
    manifest, report = bundle.manifest, Report.read(bundle.path / REPORT_FILE)
    if data.classes != [info.name for info in manifest.classes]:
        raise VerifyError(f"the data has {len(data.classes)} classes, which are not those of the bundle")
    groups_K: list[str] = [info.group for info in manifest.classes]
    labels_N = data.test.labels.numpy()
    counts_K = np.array([info.train_count for info in manifest.classes], dtype=np.float64)
    prior_K = counts_K / counts_K.sum()
    even_N, under_N = (prior_weights(labels_N, wanted_K) for wanted_K in (even_prior(len(prior_K)), prior_K))
    outputs = list(precision.served(bundle.model_path, data.test))
    graph = {name: np.concatenate([output[name] for output in outputs]).astype(np.float64) for name in JUDGED}
    temperature = manifest.calibration.prior_temperatures.get("train", manifest.calibration.temperature)
    shifted_NK = shift_prior(metrics.softmax(graph["calibrated_logits"] / temperature), prior_K)
    judged = {
        "probabilities": (graph["probabilities"], even_N, report.test["scalar"]),
        "calibrated_probabilities": (graph["calibrated_probabilities"], even_N, report.test["calibrated"]),
        "training prior": (shifted_NK, under_N, report.test_under_train_prior["calibrated"]),
    }
    found: dict[str, Figures] = {}
    rows: dict[str, Figures] = {}
    for name, (probabilities_NK, weights_N, reported) in judged.items():
        found[name] = metrics.figures(probabilities_NK, labels_N, groups_K, weights_N)
        rows |= {name: found[name], f"{name}, by the report": reported}
    title = f"{manifest.name} {manifest.version}, {len(labels_N)} test images"
    console.print(figures_table(title, report.data.groups, rows))
    console.print(errors_table(rows))
    groups = {
        name: by_predicted_group(probabilities_NK, labels_N, manifest.train_counts(), weights_N)
        for name, (probabilities_NK, weights_N, _) in judged.items()
    }
    console.print(group_table(report, groups))
    for name, (_, weights_N, reported) in judged.items():
        # The report is of the network in fp32. One image may always differ, even the only one of a class.
        allowed = ALLOWED if manifest.precision == "fp32" else precision.ALLOWED
        allowed = max(allowed, float(weights_N.max() / weights_N.sum())) + 1e-9
        here = found[name]
        pairs = {"accuracy": (here.accuracy, reported.accuracy), "ece": (here.ece, reported.ece)}
        for figure, (measured, expected) in pairs.items():
            if abs(measured - expected) > allowed:
                raise VerifyError(
                    f"the {figure} of the {name} is {measured:.2%} here and {expected:.2%} by the report: this is "
                    "other data, or another graph"
                )
    return found
