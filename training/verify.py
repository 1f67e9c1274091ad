"""What a bundle's graph makes of the test part of its recipe's data, beside what its report says. K classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from models.bundle import Bundle
from training import metrics, precision
from training.config import Recipe, parse_recipe
from training.data import Dataset
from training.evaluate import figures_table
from training.priors import even_prior, prior_weights

STEPS = {"probabilities": "scalar", "calibrated_probabilities": "calibrated"}
"""The graph's outputs, and the steps of the report whose figures are theirs."""
ALLOWED = 0.001  # of the accuracy and of the ECE: arithmetic differs between machines, and some images stand on an edge


class VerifyError(ValueError):
    """A bundle that does not do what it says of itself."""


def recipe_of(bundle: Bundle, overrides: Sequence[str]) -> Recipe:
    """The recipe that the bundle was made by, changed by `section.key=value` overrides."""
    raw = bundle.manifest.model_dump(mode="json")["recipe"]
    return parse_recipe(raw, str(bundle.path / "manifest.json"), overrides)


def verify(bundle: Bundle, data: Dataset, console: Console) -> dict[str, Any]:
    """Print and return the figures of the graph's probabilities, plain and calibrated, on the test part.

    Raises:
        VerifyError: if the data has other classes, or accuracy or ECE are not what the report says.
    """
    manifest = bundle.manifest
    if data.classes != [info.name for info in manifest.classes]:
        raise VerifyError(f"the data has {len(data.classes)} classes, and they are not those of the bundle")
    groups_K: list[str] = [info.group for info in manifest.classes]
    labels_N = data.test.labels.numpy()
    even_N = prior_weights(labels_N, even_prior(len(data.classes)))
    if "by_chance" not in bundle.report:  # older ones let each image weigh the same
        even_N = np.ones(len(labels_N))
    outputs = list(precision.served(bundle.model_path, data.test))
    found: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, step in STEPS.items():
        probabilities_NK = np.concatenate([output[name] for output in outputs]).astype(np.float64)
        found[name] = dict(metrics.figures(probabilities_NK, labels_N, groups_K, even_N))
        rows |= {name: found[name], f"{name}, by the report": bundle.report["test"][step]}
    # The report is of the network in fp32. One image may always differ, even the only one of its class.
    allowed = ALLOWED if manifest.precision == "fp32" else precision.ALLOWED
    allowed = max(allowed, float(even_N.max() / even_N.sum())) + 1e-9
    title = f"{manifest.name} {manifest.version}, {len(labels_N)} test images"
    console.print(figures_table(title, bundle.report["data"]["groups"], rows))
    for name, step in STEPS.items():
        for figure in ("accuracy", "ece"):
            said = bundle.report["test"][step][figure]
            if abs(found[name][figure] - said) > allowed:
                raise VerifyError(
                    f"the {figure} of the {name} is {found[name][figure]:.2%} here and {said:.2%} by the report: it is "
                    "not this data, or not this graph"
                )
    return found
